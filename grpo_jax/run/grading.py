"""Grades rollouts: rewards from reward functions, from a step function and from a reward model."""

import dataclasses
import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple, cast

import numpy as np
from jaxtyping import Bool, Float, Int

from grpo_jax import data, rewards
from grpo_jax.data import char_to_token
from grpo_jax.run import hosts
from grpo_jax.run.episodes.recorded import RecordedReplies
from grpo_jax.run.episodes.turns import columns_of, token_positions
from grpo_jax.run.graded_texts import (
    START,
    GradedTexts,
    concatenate_texts,
    flat_tokens,
    grade_texts,
    on_host,
)
from grpo_jax.run.problems import Problems
from grpo_jax.run.rollout_rewards import RolloutRewards, completions_of
from grpo_jax.run.shared_grading import grade_in_shares, in_shares, select_groups
from grpo_jax.types import Params, Rollout, StepRewards


class GradedGroups(NamedTuple):
    """Rewards by functions of groups that ended while others were still being decoded."""

    groups: Int[np.ndarray, ' M']  # their indices in the batch
    texts: GradedTexts


@dataclasses.dataclass(frozen=True)
class Grader:
    """Everything that rewards completions: functions, a step function and a reward model.

    Attributes:
      problems: the data set that prompts are from.
      functions: reward functions by name.
      weights: their weights by the same names.
      step_rewards: name, function and weight from `rewards.build_steps`.
      scorer: the reward model, from `reward_model.make_scorer`.
      score_weight: weight of its scores.
      trainer_state: for functions that name it.
      calls: how functions and the step function are called, by name.
      books: with an environment, the replies of the batches that rollouts are from.
      max_failed: the largest share of a batch's completions on which a function may fail.
    """

    problems: Problems
    functions: Mapping[str, rewards.RewardFunction]
    weights: Mapping[str, float]
    step_rewards: tuple[str, rewards.RewardFunction, float] | None = None
    scorer: Callable[[Params, Rollout], Any] | None = None
    score_weight: float = 0.0
    trainer_state: rewards.TrainerState = START
    calls: Mapping[str, rewards.CallOptions] = dataclasses.field(default_factory=dict)
    max_failed: float = 1.0
    books: Sequence[RecordedReplies] = ()

    def grade_early(self, partial_rollouts: Iterable[Rollout]) -> list[GradedGroups]:
        """Call the reward functions on each group as soon as all its completions have ended.

        The step function and the reward model wait for the whole rollout: the reward model is one
        program for the whole batch, on devices that are busy until then.

        Args:
          partial_rollouts: the growing rollout after blocks that have been decoded.

        Raises:
          rewards.RewardError: see `rewards.score`.
        """
        graded: list[GradedGroups] = []
        for rollout in partial_rollouts:
            own = hosts.share(len(rollout.tokens))
            ended = own[np.asarray(rollout.ended)[own].all(1)]
            groups = np.setdiff1d(ended, _numbers(graded))
            if groups.size:
                absent: Any = None
                # The whole batch is copied: indexing on the devices would wait for the next block.
                host = on_host(rollout._replace(logprobs=absent))
                graded.append(GradedGroups(groups, self._grade_groups(host, groups)))
        return graded

    def grade(
        self,
        rollout: Rollout,
        reward_params: Params | None,
        early: Sequence[GradedGroups] | Exception = (),
        *,
        groups: int | None = None,
    ) -> RolloutRewards:
        """Compute the rewards of a whole rollout.

        Outcome and process rewards add up: with step rewards, the reward of the functions for a
        completion is added at its last token.

        Args:
          rollout: on the devices.
          reward_params: parameters of the reward model.
          early: from `grade_early`; the functions are not called on these groups again. An error is
            raised.
          groups: grade only the first ones, where the batch is filled up with copies; None: all.

        Raises:
          rewards.RewardError: see `rewards.score` and `rewards.score_steps`.
        """
        # Dispatched first, so that the devices score while the host grades.
        scored = self.scorer(reward_params, rollout) if self.scorer else None
        host = on_host(rollout, groups)
        texts, steps = grade_in_shares(
            host,
            self.problems,
            functools.partial(self._grade_share, host, early),
            functions=self.functions,
            has_steps=self.step_rewards is not None,
        )
        rewards.check_failures(texts.scores.failures, self._most_failed(host))
        total = texts.scores.total.reshape(host.tokens.shape[:2])
        scores = None if scored is None else hosts.fetch(scored)[:groups]
        if steps is None and scores is None:
            return RolloutRewards(texts, *_without_missing(total))
        total = np.nan_to_num(total)
        if steps is None and scores is not None:
            total = _float32(total + self.score_weight * scores.astype(np.float64))
            return RolloutRewards(texts, total, None, np.reshape(scores, -1))
        steps = cast(StepRewards, steps)
        values: Any = np.asarray(steps.values)  # NumPy, where annotations say JAX arrays
        ends: Any = np.asarray(steps.ends)
        if scores is not None:
            weighted = self.score_weight * scores.astype(np.float64)
            values = values + np.where(ends, weighted, 0)
            scores = _mean_over_steps(scores, ends)
        if any(self.weights.values()):
            last = np.arange(host.mask.shape[-1]) == host.mask.sum(-1, keepdims=True) - 1
            values, ends = values + last * total[..., None], ends | last
        values, total = _float32(values), _float32(values.sum(-1, dtype=np.float64))
        return RolloutRewards(texts, total, StepRewards(values, ends), scores)

    def score(
        self, rollout: Rollout, texts: GradedTexts, reward_params: Params
    ) -> Float[np.ndarray, ' N']:
        """Return the reward model's score of each completion; with steps, the mean over them.

        Args:
          rollout: [B, G, T] arrays on the devices.
          texts: of its first groups, or all; the step function finds the steps in them.
          reward_params: parameters of the reward model.

        Raises:
          ValueError: the grader has no reward model.
        """
        if self.scorer is None:
            raise ValueError('this grader has no reward model: make it with a scorer')
        group_size = rollout.ended.shape[1]
        groups = len(texts.completions) // group_size
        scores = hosts.fetch(self.scorer(reward_params, rollout))[:groups]
        if self.step_rewards is None:
            return scores.reshape(-1)
        host = on_host(rollout, groups)

        def find_ends(share: Int[np.ndarray, ' M']) -> tuple[Any, str]:
            selected = texts.select(completions_of(share, group_size))
            return self.grade_steps(select_groups(host, share), selected).ends, ''

        ends, _ = in_shares(groups, find_ends, np.zeros((0, *host.mask.shape[1:]), bool))
        return _mean_over_steps(scores, ends)

    def grade_steps(self, rollout: Rollout, texts: GradedTexts) -> StepRewards:
        """Call the step function, and return rewards at the tokens where steps end.

        Args:
          rollout: on the host.
          texts: its texts.

        Raises:
          ValueError: the grader has no step function.
          rewards.RewardError: see `rewards.score_steps`.
        """
        if self.step_rewards is None:
            raise ValueError('this grader has no step function: make it with step_rewards')
        name, function, weight = self.step_rewards
        index, group_size = np.asarray(rollout.prompts.index), rollout.tokens.shape[1]
        columns = data.columns(self.problems.rows, index, group_size)
        if texts.turns is not None:
            columns['turns'] = columns_of(texts.turns)
        steps_of = rewards.score_steps(
            name, function, texts.prompts, texts.completions, columns,
            call=self.calls.get(name), group_size=group_size,
        )  # fmt: skip
        tokens, mask = flat_tokens(rollout)
        ends = [[step.end for step in steps] for steps in steps_of]
        if texts.turns is not None:
            positions_of = token_positions(rollout, self.problems, texts.turns, ends)
        else:
            positions_of = char_to_token(
                self.problems.tokenizer, tokens, mask, texts.completions, ends,
                hidden=self.problems.hidden,
            )  # fmt: skip
        values: Any = np.zeros(tokens.shape, np.float32)
        is_end: Any = np.zeros(tokens.shape, bool)
        for i, (steps, positions) in enumerate(zip(steps_of, positions_of, strict=True)):
            for step, t in zip(steps, positions, strict=True):
                value = weight * step.value
                # Steps that end inside one token count as one, with the lowest of their rewards.
                values[i, t] = min(values[i, t], value) if is_end[i, t] else value
                is_end[i, t] = True
        shape = rollout.mask.shape
        return StepRewards(values.reshape(shape), is_end.reshape(shape))

    def _grade_share(
        self,
        host: Rollout,
        early: Sequence[GradedGroups] | Exception,
        share: Int[np.ndarray, ' M'],
    ) -> tuple[GradedTexts, StepRewards | None]:
        """Grade the groups of a share that `early` lacks; return all of the share in its order."""
        if isinstance(early, Exception):
            raise early
        rest = np.setdiff1d(share, _numbers(early))
        graded = [*early, GradedGroups(rest, self._grade_groups(host, rest))]
        texts = concatenate_texts([part.texts for part in graded])
        order = np.argsort(_numbers(graded))
        texts = texts.select(completions_of(order, host.ended.shape[1]))
        if self.step_rewards is None:
            return texts, None
        return texts, self.grade_steps(select_groups(host, share), texts)

    def _grade_groups(self, host: Rollout, groups: Int[np.ndarray, ' M']) -> GradedTexts:
        selected = select_groups(host, groups)
        return grade_texts(
            selected,
            self.problems,
            self.functions,
            self.weights,
            self.trainer_state,
            calls=self.calls,
            most_failed=self._most_failed(host),
            books=self.books,
        )

    def _most_failed(self, host: Rollout) -> int:
        """Return the number of completions of a rollout on which a function may fail."""
        return int(self.max_failed * host.ended.size)


def _float32(values: Float[np.ndarray, '*S']) -> Float[np.ndarray, '*S']:
    """Convert sums of rewards.

    Raises:
      rewards.RewardError: float32 cannot hold one of them.
    """
    largest = np.abs(values).max(initial=0)
    if not largest <= np.finfo(np.float32).max:
        raise rewards.RewardError(
            f'a sum of rewards, steps and scores of the reward model is {largest:.3g}, which does '
            'not fit float32: lower their weights'
        )
    return values.astype(np.float32)


def _without_missing(
    total: Float[np.ndarray, 'B G'],
) -> tuple[Float[np.ndarray, 'B G'], None, None, Bool[np.ndarray, 'B G'] | None]:
    """Replace missing rewards, NaN, by the mean of the group's others.

    Returns:
      The fields of `RolloutRewards` after the texts.

    Raises:
      rewards.RewardError: no completion of the batch has a reward.
    """
    missing = np.isnan(total)
    if not missing.any():
        return total, None, None, None
    if missing.all():
        raise rewards.RewardError(
            f'none of the {total.size} completions of a batch has a reward, because a reward '
            'function failed on each, or all returned None: mend it, or add one that applies to '
            'these rows'
        )
    sums, counts = np.nansum(total, 1, np.float64), (~missing).sum(1)
    means = (sums / np.maximum(counts, 1)).astype(np.float32)
    return np.where(missing, means[:, None], total), None, None, missing


def _mean_over_steps(
    scores: Float[np.ndarray, 'B G T'], ends: Bool[np.ndarray, 'B G T']
) -> Float[np.ndarray, ' N']:
    """Average scores over the steps of each completion; 0 for one without steps."""
    return (np.where(ends, scores, 0).sum(-1) / np.maximum(ends.sum(-1), 1)).reshape(-1)


def _numbers(graded: Sequence[GradedGroups]) -> Int[np.ndarray, ' M']:
    return np.concatenate([np.zeros(0, int), *(part.groups for part in graded)])
