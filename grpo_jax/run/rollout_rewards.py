"""The rewards of a rollout, as they are graded and chosen from on the host."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Bool, Float, Int

from grpo_jax.run.graded_texts import GradedTexts, concatenate_texts
from grpo_jax.types import StepRewards


class RolloutRewards(NamedTuple):
    """The rewards of a rollout."""

    texts: GradedTexts
    total: Float[np.ndarray, 'B G']  # with step rewards, their sum over steps
    steps: StepRewards | None
    model_scores: Float[np.ndarray, ' N'] | None  # of the reward model; with steps, their mean
    # Completions without a reward, which are not trained on; None if all have one. Their `total` is
    # the mean of their group's others, so that it changes no baseline.
    skipped: Bool[np.ndarray, 'B G'] | None = None
    # Of the greedy completions, with baseline='greedy'; NaN: that of the prompt has no reward.
    baseline: Float[np.ndarray, ' B'] | None = None

    def with_baseline(self, greedy: 'RolloutRewards') -> 'RolloutRewards':
        """Return the rewards with those of greedy completions, [B, 1], as their baseline.

        Groups whose greedy completion has no reward are skipped.
        """
        if greedy.skipped is None:
            return self._replace(baseline=greedy.total[:, 0])
        baseline = np.where(greedy.skipped, np.float32(np.nan), greedy.total)[:, 0]
        own = np.zeros(self.total.shape, bool) if self.skipped is None else self.skipped
        return self._replace(skipped=own | greedy.skipped, baseline=baseline)

    def informative(self) -> Bool[np.ndarray, ' B']:
        """Return which groups have rewards, of completions or of steps, that differ.

        With a baseline: from the baseline.
        """
        if self.baseline is not None:
            differ = self.total != self.baseline[:, None]
            return (differ if self.skipped is None else differ & ~self.skipped).any(1)
        if self.steps is None:
            return self.total.max(1) > self.total.min(1)
        values, ends = self.steps
        largest = np.where(ends, values, -np.inf).max((1, 2))
        return largest > np.where(ends, values, np.inf).min((1, 2))

    def select(self, groups: Int[np.ndarray, ' M']) -> 'RolloutRewards':
        """Return the rewards of these groups, in this order."""
        completions = completions_of(groups, self.total.shape[1])
        steps = self.steps and StepRewards(*(x[groups] for x in self.steps))
        scores = None if self.model_scores is None else self.model_scores[completions]
        skipped = None if self.skipped is None else self.skipped[groups]
        baseline = None if self.baseline is None else self.baseline[groups]
        texts = self.texts.select(completions)
        return RolloutRewards(texts, self.total[groups], steps, scores, skipped, baseline)


def concatenate_rewards(parts: Sequence[RolloutRewards]) -> RolloutRewards:
    """Join the rewards of several rollouts."""
    total, steps, scores, baseline = (
        concatenate([getattr(part, name) for part in parts])
        for name in ('total', 'steps', 'model_scores', 'baseline')
    )
    skipped = None
    if any(part.skipped is not None for part in parts):
        masks = [np.zeros(p.total.shape, bool) if p.skipped is None else p.skipped for p in parts]
        skipped = np.concatenate(masks)
    texts = concatenate_texts([part.texts for part in parts])
    return RolloutRewards(texts, total, steps, scores, skipped, baseline)


def concatenate(trees: Sequence[Any]) -> Any:
    """Join trees of host arrays along their first axis."""
    return jax.tree.map(lambda *x: np.concatenate(x), *trees)


def completions_of(groups: Int[np.ndarray, ' M'], group_size: int) -> Int[np.ndarray, ' N']:
    """Return the indices of all completions of these groups."""
    return (groups[:, None] * group_size + np.arange(group_size)).reshape(-1)
