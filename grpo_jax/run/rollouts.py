"""Samples and grades the batch of a training step, with dynamic sampling."""

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Generic, NamedTuple, TypeVar

import jax
import numpy as np
from jaxtyping import Int

from grpo_jax import rewards
from grpo_jax.algorithm.entropy_control import next_entropy_bonus
from grpo_jax.run import hosts
from grpo_jax.run.early_grading import grade_while_sampling
from grpo_jax.run.rollout_rewards import RolloutRewards, concatenate_rewards
from grpo_jax.types import Array, BaselinedRewards, FunctionRewards, Rollout, StepRewards

BatchT = TypeVar('BatchT')
HostRewards = np.ndarray | StepRewards | FunctionRewards | BaselinedRewards  # see `types.Rewards`


class EntropyBonus(NamedTuple):
    """The state of `grpo.entropy_control`."""

    coefficient: float  # see `entropy_control.next_entropy_bonus`
    bonus: float  # of the next step; of the last one, if its entropy is not yet known
    known: bool = False  # whether the entropy of the last step has been followed


class Position(NamedTuple):
    """The progress of a stage: what its next step depends on, apart from the training state.

    Checkpoints hold it, so a resumed run draws the same prompts as an unbroken one.
    """

    step: int = 0  # of the stage
    next_batch: int = 0  # number of the first batch of prompts that no policy stage has sampled
    trained: frozenset[str] = frozenset()  # see `selection.select_completions`
    tokens: int = 0  # of prompts and completions in this stage, see `count_tokens`
    entropy: EntropyBonus | None = None  # None: that of the config; goes on in later iterations

    def to_json(self) -> dict[str, Any]:
        """Return the position as JSON types."""
        return self._asdict() | {'trained': sorted(self.trained)}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> 'Position':
        """Return the position that `to_json` was called on."""
        tokens, entropy = values.get('tokens', 0), values.get('entropy')  # newer than the others
        return cls(
            values['step'],
            values['next_batch'],
            frozenset(values['trained']),
            tokens,
            None if entropy is None else EntropyBonus(*entropy),
        )

    def follow(self, entropy: float, start: float, **options: float) -> 'Position':
        """Return the position with the bonus that follows from the entropy of its last step.

        It changes nothing if that entropy has been followed already.

        Args:
          entropy: the metric of the last step.
          start: the bonus of the first step.
          **options: arguments of `next_entropy_bonus`.
        """
        last = EntropyBonus(start, start) if self.entropy is None else self.entropy
        if last.known:
            return self
        following = next_entropy_bonus(last.coefficient, entropy, **options)
        return self._replace(entropy=EntropyBonus(*following, known=True))

    def next_step(self, rollout: Rollout, **changes: Any) -> 'Position':
        """Return the position after a step that trains on this rollout."""
        tokens = self.tokens + count_tokens(rollout)
        return self._replace(step=self.step + 1, tokens=tokens, **changes)


class CollectedBatch(NamedTuple):
    """The batch of one training step, and the position after that step."""

    rollout: Rollout
    rewards: HostRewards
    metrics: dict[str, float]
    completions: list[dict[str, Any]]  # for completions.jsonl
    position: Position


class PrefetchedBatches(Generic[BatchT]):
    """Batches by number, of which the next one can be put on the devices beforehand.

    Args:
      make: makes a batch from its number.
    """

    def __init__(self, make: Callable[[int], BatchT]) -> None:
        self._make = make
        self._ready: dict[int, BatchT] = {}

    def __call__(self, number: int) -> BatchT:
        """Return a batch, made now unless it was prefetched."""
        return self._ready.pop(number) if number in self._ready else self._make(number)

    def prefetch(self, number: int) -> None:
        """Make the batch that is asked for next."""
        if number not in self._ready:
            self._ready = {number: self._make(number)}


class GradedRollout(NamedTuple):
    """A rollout with its rewards."""

    rollout: Rollout
    rewards: RolloutRewards
    batches: int  # number of batches of prompts that were sampled
    metrics: dict[str, float]


def collect_rollout(
    sampled: Iterable[Rollout],
    sample_more: Callable[[int], Iterable[Rollout]],
    grade: Callable[[Rollout, Any], RolloutRewards],
    grade_early: Callable[[Iterable[Rollout]], Any],
    *,
    refill: int = 0,
) -> GradedRollout:
    """Grade a batch while it is sampled, and replace groups whose rewards are all equal.

    Dynamic sampling (DAPO, arXiv 2503.14476, section 3.2) with a bound: further batches are sampled
    until B groups are informative or `refill` batches are used. Informative groups come first, in
    the order of sampling; if there are fewer than B, the first of the other groups follow.

    Args:
      sampled: the partial rollouts of the first batch of B prompts, see `sample.sample_blocks`.
      sample_more: samples further batches, numbered from 1.
      grade: see `early_grading.grade_while_sampling`.
      grade_early: see there.
      refill: largest number of further batches.

    Returns:
      The rollout with its rewards. Its metrics are the seconds of sampling and of the remaining
      grading and, with `refill`, the number of batches and the share of informative groups.
    """
    started, sampling = time.perf_counter(), 0.0
    rollouts: list[Rollout] = []
    graded: list[RolloutRewards] = []
    for number in range(1 + refill):
        blocks = sample_more(number) if number else sampled
        rollout, rollout_rewards, seconds = grade_while_sampling(blocks, grade, grade_early)
        size = len(rollout.ended)
        rollouts.append(rollout)
        graded.append(rollout_rewards)
        sampling += seconds
        informative = np.concatenate([part.informative() for part in graded])
        if informative.sum() >= size:
            break
    metrics = {'timing/sample': sampling}
    if refill:
        groups = np.argsort(~informative, kind='stable')[:size]
        metrics['refill/batches'] = float(len(rollouts))
        metrics['refill/informative_ratio'] = float(informative[groups].mean())
        rollout = hosts.select(_groups_of, rollouts, groups)
        rollout_rewards = concatenate_rewards(graded).select(groups)
    metrics['timing/reward'] = time.perf_counter() - started - sampling
    return GradedRollout(rollout, rollout_rewards, len(rollouts), metrics)


def _groups_of(numpy: Any, rollouts: Sequence[Rollout], groups: Int[Array, ' B']) -> Rollout:
    """Return these groups of several rollouts, counted over all of them."""
    selected: Rollout = jax.tree.map(lambda *x: numpy.concatenate(x)[groups], *rollouts)
    return selected


def count_tokens(rollout: Rollout) -> int:
    """Count the tokens of all prompts and completions; a prompt counts for each completion."""
    length, mask = hosts.fetch((rollout.prompts.length, rollout.mask))
    return int(np.asarray(length, np.int64).sum()) * mask.shape[1] + int(np.asarray(mask).sum())


def function_rewards(
    rollout_rewards: RolloutRewards, weights: Mapping[str, float], score_weight: float
) -> FunctionRewards:
    """Return the rewards of each function, and of the reward model if there is one.

    Args:
      rollout_rewards: the rewards of a step's rollout.
      weights: of the functions by name.
      score_weight: of the reward model's scores.
    """
    parts = dict(rollout_rewards.texts.scores.parts)
    numbers = [weights[name] for name in parts]
    if rollout_rewards.model_scores is not None:
        parts['reward_model'] = rollout_rewards.model_scores
        numbers.append(score_weight)
    values: Any = np.stack([*parts.values()], -1).reshape(*rollout_rewards.total.shape, -1)
    tiled: Any = np.tile(np.asarray(numbers, np.float32), (len(values), 1))
    return FunctionRewards(values.astype(np.float32), tiled)


def reward_metrics(rollout_rewards: RolloutRewards, correct: str) -> dict[str, float]:
    """Return statistics of the rewards, and the accuracy if `correct` is one of them.

    Args:
      rollout_rewards: the rewards of a step's rollout.
      correct: name of the reward that is at least 1 for a right answer.
    """
    scores = rollout_rewards.texts.scores
    model_scores = rollout_rewards.model_scores
    if model_scores is not None:
        scores = scores._replace(parts=scores.parts | {'reward_model': model_scores})
    metrics = rewards.statistics(scores)
    if rollout_rewards.baseline is not None:
        usable = rollout_rewards.baseline[~np.isnan(rollout_rewards.baseline)]
        metrics['reward_greedy'] = float(usable.mean()) if usable.size else 0.0
    if correct in scores.parts:
        metrics['accuracy'] = float(np.mean(scores.parts[correct] >= 1))
    return metrics


def completion_records(rollout_rewards: RolloutRewards, count: int) -> list[dict[str, Any]]:
    """Return the first `count` completions with their rewards, for `completions.jsonl`.

    A record has what reward functions logged by `log_extra` as well. Its reward is None if the
    completion was skipped.
    """
    texts, total = rollout_rewards.texts, rollout_rewards.total.reshape(-1)
    records = []
    for i in range(min(count, len(texts.prompts))):
        parts = {name: _none_for_nan(values[i]) for name, values in texts.scores.parts.items()}
        if rollout_rewards.model_scores is not None:
            parts['reward_model'] = float(rollout_rewards.model_scores[i])
        skipped = rollout_rewards.skipped
        logged = texts.scores.logs.extra.items()
        records.append({
            'prompt': texts.prompts[i],
            'completion': texts.completions[i],
            'reward': float(total[i]) if skipped is None or not skipped.flat[i] else None,
            'rewards': parts,
            **{column: values[i] for column, values in logged},
        })  # fmt: skip
    return records


def _none_for_nan(value: np.floating[Any]) -> float | None:
    return None if np.isnan(value) else float(value)
