"""Samples and grades the completions that each step of a policy's stage is trained on."""

import dataclasses
import logging
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from grpo_jax.algorithm.config import Algorithm
from grpo_jax.algorithm.sample import last_block, sample, sample_blocks
from grpo_jax.rewards import Failures, TrainerState, name_in
from grpo_jax.run import hosts
from grpo_jax.run.early_grading import dispatch_first
from grpo_jax.run.episodes import records as episodes
from grpo_jax.run.episodes.recorded import RecordedReplies
from grpo_jax.run.episodes.sampling import EpisodeSampler
from grpo_jax.run.graded_texts import on_host
from grpo_jax.run.grading import Grader
from grpo_jax.run.rollout_rewards import RolloutRewards
from grpo_jax.run.rollouts import (
    CollectedBatch,
    HostRewards,
    Position,
    PrefetchedBatches,
    collect_rollout,
    completion_records,
    function_rewards,
    reward_metrics,
)
from grpo_jax.run.selection import select_completions, select_pairs
from grpo_jax.run.setup import Setup
from grpo_jax.run.stages import StageParams
from grpo_jax.types import BaselinedRewards, Params, Prompts, Rollout, Sampling

log = logging.getLogger('grpo_jax')


@dataclasses.dataclass(frozen=True)
class RolloutCollector:
    """Samples and grades the completions of each step; has `sample` and `collect` of a `Stage`.

    Attributes:
      setup: the run.
      algorithm: the algorithm of the `grpo` section.
      grader: computes the rewards of the completions.
      prompts: returns the batch of prompts with a given number, on the devices.
      stage: its name.
      sampler: samples the completions.
      books: the environment's replies to batches that have not been trained on, by number.
    """

    setup: Setup
    algorithm: Algorithm
    grader: Grader
    prompts: PrefetchedBatches[Prompts]
    stage: str
    sampler: EpisodeSampler
    books: dict[int, RecordedReplies] = dataclasses.field(default_factory=dict)

    def sample(self, position: Position, policy: Params, initial: StageParams) -> Iterable[Rollout]:
        """Dispatch a step's first batch; see `Stage.sample`."""
        blocks = self._sample_batch(position.next_batch, policy, initial)
        return [last_block(blocks)] if self.setup.config.grpo.ahead else blocks

    def collect(
        self,
        position: Position,
        sampled: Iterable[Rollout],
        policy: Params,
        initial: StageParams,
    ) -> CollectedBatch:
        """Grade a step's samples, and draw more of them where `grpo.refill` asks for it."""
        config, first = self.setup.config, position.next_batch
        books: list[Any] = [] if self._book(first) is None else [self._book(first)]
        grader = dataclasses.replace(
            self.grader, trainer_state=self._trainer_state(position), books=books
        )

        def sample_more(number: int) -> Iterable[Rollout]:
            blocks = self._sample_batch(first + number, policy, initial)
            if books:
                books.append(self._book(first + number))
            return blocks

        rollout, rewards, used, metrics = collect_rollout(
            sampled,
            sample_more,
            lambda rollout, early: self._grade(grader, rollout, early, policy, initial),
            grader.grade_early,
            refill=config.grpo.refill,
        )
        _report_failures(position.step + 1, rewards.texts.scores.failures)
        correct = name_in(config.grpo.rewards, config.eval.correct)
        metrics = metrics | reward_metrics(rewards, correct)
        count = config.log.completions if hosts.is_first() else 0  # the others write no records
        records = completion_records(rewards, count)
        if books:
            host = on_host(rollout)
            metrics |= episodes.metrics(host, books)
            episodes.report_failures(f'step {position.step + 1}', host, books)
            if records and hosts.count() > 1:  # with what the other processes were replied
                books = [self.sampler.book(self._name(first + n)) for n in range(used)]
            turns = episodes.turn_records(host, rewards.texts.turns or [], books)
            for record, of_one in zip(records, turns, strict=False):  # the first completions
                record.update(of_one)
            self._forget_books(first + used)
        rollout, trained_rewards, trained = self._select(position, rollout, rewards)
        following = position.next_step(rollout, next_batch=first + used, trained=trained)
        metrics['num_tokens'] = float(following.tokens)
        return CollectedBatch(rollout, trained_rewards, metrics, records, following)

    def _trainer_state(self, position: Position) -> TrainerState:
        c = self.setup.config.grpo
        passes = position.next_batch * c.batch_size / len(self.grader.problems.table)
        return TrainerState(position.step, c.steps, passes)

    def _sample_batch(self, number: int, policy: Params, initial: StageParams) -> Iterable[Rollout]:
        """Sample batch `number`, which seeds its random numbers; dispatch the first block."""
        c = self.setup.config.grpo
        blocks = self._draw(
            policy,
            initial,
            self.prompts(number),
            draw=sample_blocks,
            book=self._book(number),
            step=number,
            sampling=Sampling(**c.sampling),
            group_size=c.group_size,
            record=tuple(c.record),
        )
        dispatched = dispatch_first(blocks)
        self.prompts.prefetch(number + 1)
        return dispatched

    def _grade(
        self, grader: Grader, rollout: Rollout, early: Any, policy: Params, initial: StageParams
    ) -> RolloutRewards:
        """Grade a rollout, and the greedy completions of its prompts if they are the baseline."""
        graded = grader.grade(rollout, initial.reward, early)
        if self.algorithm.baseline != 'greedy':
            return graded
        greedy = self._draw(
            policy,
            initial,
            rollout.prompts._replace(routing=None),
            draw=sample,
            book=grader.books[-1] if grader.books else None,
            step=0,  # which greedy decoding does not depend on
            sampling=Sampling(temperature=0.0),
            group_size=1,
        )
        return graded.with_baseline(grader.grade(greedy, initial.reward))

    def _draw(self, policy: Params, initial: StageParams, prompts: Prompts, **options: Any) -> Any:
        """Sample from the policy that `grpo.source` names, with its weights as configured."""
        c = self.setup.config.grpo
        params = initial.policy if c.source == 'reference' else policy
        return self.sampler(params, prompts, weights=c.weights, **options)

    def _book(self, number: int) -> RecordedReplies | None:
        """Return the environment's replies to batch `number`; None without an environment."""
        if number not in self.books:
            book = self.sampler.book(self._name(number))
            if book is None:
                return None
            self.books[number] = book
        return self.books[number]

    def _name(self, number: int) -> str:
        return f'{self.stage}.{number}'

    def _forget_books(self, number: int) -> None:
        for old in [old for old in self.books if old < number]:
            del self.books[old]

    def _select(
        self, position: Position, rollout: Rollout, rewards: RolloutRewards
    ) -> tuple[Rollout, HostRewards, frozenset[str]]:
        """Return the completions to train on, with their rewards."""
        drop = self.setup.config.grpo.drop
        if self.algorithm.pairwise:
            pairs, totals = select_pairs(rollout, rewards.total)
            return pairs, totals, position.trained
        kept: Any = None
        trained = position.trained
        if drop:
            kept, trained = select_completions(
                on_host(rollout), rewards.texts.completions, rewards.total, drop, trained
            )
            rollout = rollout._replace(kept=kept)
        if rewards.skipped is not None:
            kept = ~rewards.skipped if kept is None else kept & ~rewards.skipped
            rollout = rollout._replace(kept=kept)
            log.warning(
                'step %d: %d completions have no reward%s, because all reward functions returned '
                'None or one failed; they are not trained on', position.step + 1,
                rewards.skipped.sum(), '' if rewards.baseline is None else ' or no baseline',
            )  # fmt: skip
        if self.algorithm.uses_function_rewards:
            of_functions = function_rewards(rewards, self.grader.weights, self.grader.score_weight)
            return rollout, of_functions, trained
        if rewards.steps is not None:
            return rollout, rewards.steps, trained
        # NaN: without a reward, so no part of the group that a completion is compared with.
        missing = np.zeros((), bool) if rewards.skipped is None else rewards.skipped
        values: Any = np.where(missing, np.float32(np.nan), rewards.total)
        baseline: Any = rewards.baseline
        if baseline is not None:
            return rollout, BaselinedRewards(values, baseline), trained
        return rollout, values, trained


def _report_failures(step: int, failures: Mapping[str, Failures]) -> None:
    for name, failed in failures.items():
        log.warning(
            'step %d: reward %r failed on %d completions; the first error: %s',
            step, name, failed.number, failed.first,
        )  # fmt: skip
