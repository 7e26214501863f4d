"""Grades rollouts: rewards from reward functions, from a step function and from a reward model."""

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Bool, Float, Int

from grpo_jax import data, rewards
from grpo_jax.data import char_to_token, completion_texts
from grpo_jax.run.problems import Problems
from grpo_jax.types import Params, Rollout, StepRewards


class GradedTexts(NamedTuple):
    """The texts of N = B * G completions, group by group, with their rewards by functions."""

    prompts: list[str]
    completions: list[str]
    scores: rewards.Scores

    def select(self, completions: Int[np.ndarray, ' M']) -> 'GradedTexts':
        """Return the entries of these completions, in this order."""
        parts = {name: part[completions] for name, part in self.scores.parts.items()}
        return GradedTexts(
            [self.prompts[i] for i in completions],
            [self.completions[i] for i in completions],
            self.scores._replace(total=self.scores.total[completions], parts=parts),
        )


class RolloutRewards(NamedTuple):
    """The rewards of a rollout."""

    texts: GradedTexts
    total: Float[np.ndarray, 'B G']  # with step rewards, their sum over steps
    steps: StepRewards | None
    model_scores: Float[np.ndarray, ' N'] | None  # of the reward model; with steps, their mean

    def informative(self) -> Bool[np.ndarray, ' B']:
        """Return which groups have rewards, of completions or of steps, that differ."""
        if self.steps is None:
            return self.total.max(1) > self.total.min(1)
        values, ends = self.steps
        largest = np.where(ends, values, -np.inf).max((1, 2))
        return largest > np.where(ends, values, np.inf).min((1, 2))

    def select(self, groups: Int[np.ndarray, ' M']) -> 'RolloutRewards':
        """Return the rewards of these groups, in this order."""
        completions = _completions_of(groups, self.total.shape[1])
        steps = self.steps and StepRewards(*(x[groups] for x in self.steps))
        scores = None if self.model_scores is None else self.model_scores[completions]
        return RolloutRewards(self.texts.select(completions), self.total[groups], steps, scores)


class GradedGroups(NamedTuple):
    """Rewards by functions of groups that ended while others were still being decoded."""

    groups: Int[np.ndarray, ' M']  # their indices in the batch
    texts: GradedTexts


def grade_texts(
    rollout: Rollout,
    problems: Problems,
    functions: Mapping[str, rewards.RewardFunction],
    weights: Mapping[str, float],
) -> GradedTexts:
    """Decode the tokens of a rollout and call the reward functions on the texts.

    Args:
      rollout: [B, G, T] arrays on the host.
      problems: the data set that the prompts are from.
      functions: reward functions by name.
      weights: their weights by the same names.

    Raises:
      rewards.RewardError: see `rewards.score`.
    """
    asked, length, index = map(np.asarray, rollout.prompts)
    tokenizer, group_size = problems.tokenizer, rollout.tokens.shape[1]
    columns = data.columns(problems.rows, index, group_size)
    questions = completion_texts(tokenizer, asked, np.arange(asked.shape[1]) < length[:, None])
    questions = [text for text in questions for _ in range(group_size)]
    tokens, mask = _flat(rollout)
    completions = completion_texts(tokenizer, tokens, mask, problems.stops)
    scores = rewards.score(
        functions,
        weights,
        prompts=questions,
        completions=completions,
        columns=columns,
        completion_ids=[ids[used].tolist() for ids, used in zip(tokens, mask, strict=True)],
    )
    return GradedTexts(questions, completions, scores)


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
    """

    problems: Problems
    functions: Mapping[str, rewards.RewardFunction]
    weights: Mapping[str, float]
    step_rewards: tuple[str, rewards.RewardFunction, float] | None = None
    scorer: Callable[[Params, Rollout], Any] | None = None
    score_weight: float = 0.0

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
            ended = np.asarray(rollout.ended).all(1)
            groups = np.setdiff1d(np.flatnonzero(ended), _numbers(graded))
            if groups.size:
                absent: Any = None
                # The whole batch is copied: indexing on the devices would wait for the next block.
                host = jax.device_get(rollout._replace(logprobs=absent))
                graded.append(GradedGroups(groups, self._grade_groups(host, groups)))
        return graded

    def grade(
        self, rollout: Rollout, reward_params: Params | None, early: Sequence[GradedGroups] = ()
    ) -> RolloutRewards:
        """Compute the rewards of a whole rollout.

        Outcome and process rewards add up: with step rewards, the reward of the functions for a
        completion is added at its last token.

        Args:
          rollout: on the devices.
          reward_params: parameters of the reward model.
          early: from `grade_early`; the functions are not called on these groups again.

        Raises:
          rewards.RewardError: see `rewards.score` and `rewards.score_steps`.
        """
        # Dispatched first, so that the devices score while the host grades.
        scored = self.scorer(reward_params, rollout) if self.scorer else None
        host = jax.device_get(rollout)
        texts = self._grade_rest(host, early)
        total = texts.scores.total.reshape(host.tokens.shape[:2])
        steps = self.grade_steps(host, texts) if self.step_rewards else None
        scores = None if scored is None else np.asarray(scored)
        if steps is None:
            if scores is not None:
                total = total + np.float32(self.score_weight) * scores
            scores = None if scores is None else scores.reshape(-1)
            return RolloutRewards(texts, total, None, scores)
        values: Any = np.asarray(
            steps.values
        )  # NumPy, where StepRewards is annotated with JAX arrays
        ends: Any = np.asarray(steps.ends)
        if scores is not None:
            values = values + np.where(ends, np.float32(self.score_weight) * scores, 0)
            scores = _mean_over_steps(scores, ends)
        if any(self.weights.values()):
            last = np.arange(host.mask.shape[-1]) == host.mask.sum(-1, keepdims=True) - 1
            values, ends = values + last * total[..., None], ends | last
        values = values.astype(np.float32)
        return RolloutRewards(texts, values.sum(-1), StepRewards(values, ends), scores)

    def score(
        self, rollout: Rollout, texts: GradedTexts, reward_params: Params
    ) -> Float[np.ndarray, ' N']:
        """Return the reward model's score of each completion; with steps, the mean over them.

        Args:
          rollout: [B, G, T] arrays on the devices.
          texts: its texts, in which the step function finds the steps.
          reward_params: parameters of the reward model.

        Raises:
          ValueError: the grader has no reward model.
        """
        if self.scorer is None:
            raise ValueError('this grader has no reward model: make it with a scorer')
        scores = np.asarray(self.scorer(reward_params, rollout))
        if self.step_rewards is None:
            return scores.reshape(-1)
        ends = self.grade_steps(jax.device_get(rollout), texts).ends
        return _mean_over_steps(scores, np.asarray(ends))

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
        steps_of = rewards.score_steps(name, function, texts.prompts, texts.completions, columns)
        tokens, mask = _flat(rollout)
        ends = [[step.end for step in steps] for steps in steps_of]
        positions_of = char_to_token(self.problems.tokenizer, tokens, mask, texts.completions, ends)
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

    def _grade_rest(self, host: Rollout, early: Sequence[GradedGroups]) -> GradedTexts:
        """Grade the groups that `early` lacks, and return all groups in their order."""
        batch, group_size = host.ended.shape
        rest = np.setdiff1d(np.arange(batch), _numbers(early))
        graded = [*early, GradedGroups(rest, self._grade_groups(host, rest))]
        texts = concatenate_texts([part.texts for part in graded])
        return texts.select(_completions_of(np.argsort(_numbers(graded)), group_size))

    def _grade_groups(self, host: Rollout, groups: Int[np.ndarray, ' M']) -> GradedTexts:
        selected = jax.tree.map(lambda x: x[groups], host)
        return grade_texts(selected, self.problems, self.functions, self.weights)


def concatenate_texts(parts: Sequence[GradedTexts]) -> GradedTexts:
    """Join the texts and rewards of several batches."""
    scores = [part.scores for part in parts]
    joined = rewards.Scores(
        total=np.concatenate([s.total for s in scores]),
        parts={name: np.concatenate([s.parts[name] for s in scores]) for name in scores[0].parts},
        timeouts=sum(s.timeouts for s in scores),
    )
    prompts = [text for part in parts for text in part.prompts]
    return GradedTexts(prompts, [text for part in parts for text in part.completions], joined)


def concatenate_rewards(parts: Sequence[RolloutRewards]) -> RolloutRewards:
    """Join the rewards of several rollouts."""
    total, steps, scores = (
        concatenate([getattr(part, name) for part in parts])
        for name in ('total', 'steps', 'model_scores')
    )
    return RolloutRewards(concatenate_texts([part.texts for part in parts]), total, steps, scores)


def concatenate(trees: Sequence[Any]) -> Any:
    """Join trees of host arrays along their first axis."""
    return jax.tree.map(lambda *x: np.concatenate(x), *trees)


def _flat(rollout: Rollout) -> tuple[Int[np.ndarray, 'N T'], Bool[np.ndarray, 'N T']]:
    """Return the tokens and the mask of all completions."""
    length = rollout.tokens.shape[2]
    return np.reshape(rollout.tokens, (-1, length)), np.reshape(rollout.mask, (-1, length))


def _mean_over_steps(
    scores: Float[np.ndarray, 'B G T'], ends: Bool[np.ndarray, 'B G T']
) -> Float[np.ndarray, ' N']:
    """Average scores over the steps of each completion; 0 for one without steps."""
    return (np.where(ends, scores, 0).sum(-1) / np.maximum(ends.sum(-1), 1)).reshape(-1)


def _numbers(graded: Sequence[GradedGroups]) -> Int[np.ndarray, ' M']:
    return np.concatenate([np.zeros(0, int), *(part.groups for part in graded)])


def _completions_of(groups: Int[np.ndarray, ' M'], group_size: int) -> Int[np.ndarray, ' N']:
    """Return the indices of all completions of these groups."""
    return (groups[:, None] * group_size + np.arange(group_size)).reshape(-1)
