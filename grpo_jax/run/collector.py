"""Samples and grades the completions that each step of a policy's stage is trained on."""

import dataclasses
from collections.abc import Iterable
from typing import Any

import jax
import numpy as np

from grpo_jax.algorithm.config import Algorithm
from grpo_jax.algorithm.sample import last_block, sample_blocks
from grpo_jax.run.early_grading import dispatch_first
from grpo_jax.run.grading import Grader, RolloutRewards
from grpo_jax.run.rollouts import (
    CollectedBatch,
    Position,
    PrefetchedBatches,
    collect_rollout,
    completion_records,
    reward_metrics,
)
from grpo_jax.run.selection import select_completions, select_pairs
from grpo_jax.run.setup import Setup
from grpo_jax.run.stages import StageParams
from grpo_jax.types import Params, Prompts, Rollout, Sampling, StepRewards


@dataclasses.dataclass(frozen=True)
class RolloutCollector:
    """Samples and grades the completions of each step; has `sample` and `collect` of a `Stage`.

    Attributes:
      setup: the run.
      algorithm: the algorithm of the `grpo` section.
      grader: computes the rewards of the completions.
      prompts: returns the batch of prompts with a given number, on the devices.
    """

    setup: Setup
    algorithm: Algorithm
    grader: Grader
    prompts: PrefetchedBatches[Prompts]

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
        rollout, rewards, used, metrics = collect_rollout(
            sampled,
            lambda number: self._sample_batch(first + number, policy, initial),
            lambda rollout, early: self.grader.grade(rollout, initial.reward, early),
            self.grader.grade_early,
            refill=config.grpo.refill,
        )
        metrics = metrics | reward_metrics(rewards, config.eval.correct)
        records = completion_records(rewards, config.log.completions)
        rollout, trained_rewards, trained = self._select(position, rollout, rewards)
        following = Position(position.step + 1, first + used, trained)
        return CollectedBatch(rollout, trained_rewards, metrics, records, following)

    def _sample_batch(self, number: int, policy: Params, initial: StageParams) -> Iterable[Rollout]:
        """Sample batch `number`, which seeds its random numbers; dispatch the first block."""
        c = self.setup.config.grpo
        blocks = self.setup.sampler(
            initial.policy if c.source == 'reference' else policy,
            self.prompts(number),
            draw=sample_blocks,
            step=number,
            sampling=Sampling(**c.sampling),
            group_size=c.group_size,
            weights=c.weights,
        )
        dispatched = dispatch_first(blocks)
        self.prompts.prefetch(number + 1)
        return dispatched

    def _select(
        self, position: Position, rollout: Rollout, rewards: RolloutRewards
    ) -> tuple[Rollout, np.ndarray | StepRewards, frozenset[str]]:
        """Return the completions to train on, with their rewards."""
        drop = self.setup.config.grpo.drop
        if self.algorithm.pairwise:
            pairs, totals = select_pairs(jax.device_get(rollout), rewards.total)
            return pairs, totals, position.trained
        trained = position.trained
        if drop:
            kept: Any
            kept, trained = select_completions(
                jax.device_get(rollout), rewards.texts.completions, rewards.total, drop, trained
            )
            rollout = rollout._replace(kept=kept)
        return rollout, rewards.total if rewards.steps is None else rewards.steps, trained
