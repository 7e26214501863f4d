"""What is said of a rollout: by rules, by rewards of its steps and by a reward model."""

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from grpo_jax import data, judging, rewards
from grpo_jax.setup import Problems
from grpo_jax.tokens import tokens_at
from grpo_jax.types import Params, Rollout, StepRewards


class Verdict(NamedTuple):
    """What is said of a rollout."""

    judged: judging.Judged
    total: np.ndarray  # f32[B, G], of steps their sum
    steps: StepRewards | None
    scores: np.ndarray | None  # f32[B * G] of the reward model, of steps their mean

    def differs(self) -> np.ndarray:
        """bool[B], whether the rewards of a group tell its completions, or its steps, apart."""
        if self.steps is None:
            return self.total.max(1) > self.total.min(1)
        values, ends = self.steps
        most = np.where(ends, values, -np.inf).max((1, 2))
        return most > np.where(ends, values, np.inf).min((1, 2))

    def choose(self, groups: np.ndarray) -> 'Verdict':
        """That of some groups i64[N], in their order."""
        rows = _rows(groups, self.total.shape[1])
        steps = self.steps and StepRewards(*(x[groups] for x in self.steps))
        scored = None if self.scores is None else self.scores[rows]
        return Verdict(self.judged.choose(rows), self.total[groups], steps, scored)


class Early(NamedTuple):
    """What the rules say of groups that ended while others were still decoded."""

    groups: np.ndarray  # i64[N], their places in the batch
    judged: judging.Judged


@dataclasses.dataclass(frozen=True)
class Judge:
    """All that says how good completions are: rules, rewards of steps and a reward model."""

    problems: Problems
    functions: Mapping[str, Callable[..., Any]]
    weights: Mapping[str, float]
    step_rewards: tuple[str, Callable[..., Any], float] | None = None  # from rewards.build_steps
    scorer: Callable[[Params, Rollout], jax.Array] | None = None  # from reward_model.make_scorer
    score_weight: float = 0.0

    def early(self, growing: Iterable[Rollout]) -> list[Early]:
        """What the rules say of the groups that end early, each as soon as all of it has ended.

        Steps and the reward model wait for the whole rollout: it is one program that scores it, on
        devices that are busy until then.

        Args:
          growing: the rollout at times, on the devices, as long as a row goes on.

        Raises:
          rewards.RewardError: see `rewards.score`.
        """
        found: list[Early] = []
        for rollout in growing:
            if not getattr(rollout.ended, 'is_fully_addressable', True):
                continue  # other hosts hold some of it
            ended = np.asarray(rollout.ended).all(1)
            groups = np.setdiff1d(np.flatnonzero(ended), _groups(found))
            if groups.size:
                nothing: Any = None  # all rows are copied, as taking some would wait for the block
                host = jax.device_get(rollout._replace(logprobs=nothing))
                found.append(Early(groups, self._rules(host, groups)))
        return found

    def __call__(
        self, rollout: Rollout, reward_params: Params | None, early: Sequence[Early] = ()
    ) -> Verdict:
        """The rewards of a rollout on the devices.

        Outcome and process add up: with step rewards, what the rules give for a whole completion
        comes with its last step.

        Args:
          rollout: the whole.
          reward_params: of the reward model.
          early: groups that the rules have judged; they are not asked again.

        Raises:
          rewards.RewardError: see `rewards.score` and `rewards.score_steps`.
        """
        # Dispatched first, so that the device scores while the host judges.
        scored = self.scorer(reward_params, rollout) if self.scorer else None
        host = jax.device_get(rollout)
        judged = self._judged(host, early)
        total = judged.scores.total.reshape(host.tokens.shape[:2])
        steps = self.steps(host, judged) if self.step_rewards else None
        scores = None if scored is None else np.asarray(scored)
        if steps is None:
            if scores is not None:
                total = total + np.float32(self.score_weight) * scores
            return Verdict(judged, total, None, None if scores is None else scores.reshape(-1))
        values, ends = steps
        if scores is not None:
            values = values + np.where(ends, np.float32(self.score_weight) * scores, 0)
            scores = _mean_of_steps(scores, ends)
        if any(self.weights.values()):
            last = np.arange(host.mask.shape[-1]) == host.mask.sum(-1, keepdims=True) - 1
            values, ends = values + last * total[..., None], ends | last
        steps = StepRewards(values.astype(np.float32), ends)
        return Verdict(judged, steps.values.sum(-1), steps, scores)

    def rank(self, rollout: Rollout, judged: judging.Judged, reward_params: Params) -> np.ndarray:
        """The reward model's scores f32[B * G], for best of k; of steps their mean."""
        assert self.scorer is not None
        scores = np.asarray(self.scorer(reward_params, rollout))
        if self.step_rewards is None:
            return scores.reshape(-1)
        return _mean_of_steps(scores, self.steps(jax.device_get(rollout), judged).ends)

    def steps(self, rollout: Rollout, judged: judging.Judged) -> StepRewards:
        """What the step function gives, [B, G, T] at the tokens where steps end."""
        assert self.step_rewards is not None
        name, function, weight = self.step_rewards
        batch, group_size, length = rollout.tokens.shape
        columns = data.columns(self.problems.rows, rollout.prompts.index, group_size)
        found = rewards.score_steps(name, function, judged.prompts, judged.completions, columns)
        tokens, mask = (
            np.reshape(x, (batch * group_size, length)) for x in (rollout.tokens, rollout.mask)
        )
        ends = [[step.end for step in row] for row in found]
        places = tokens_at(self.problems.tokenizer, tokens, mask, judged.completions, ends)
        values, where = np.zeros(tokens.shape, np.float32), np.zeros(tokens.shape, bool)
        for row, (steps, at) in enumerate(zip(found, places, strict=True)):
            for step, place in zip(steps, at, strict=True):
                value = weight * step.value
                # Steps that end inside one token count as one, as good as the worst of them.
                values[row, place] = min(values[row, place], value) if where[row, place] else value
                where[row, place] = True
        return StepRewards(values.reshape(rollout.mask.shape), where.reshape(rollout.mask.shape))

    def _judged(self, host: Rollout, early: Sequence[Early]) -> judging.Judged:
        """What the rules say of all groups, in their order."""
        batch, size = host.ended.shape
        rest = np.setdiff1d(np.arange(batch), _groups(early))
        parts = [*early, Early(rest, self._rules(host, rest))]
        order = np.argsort(_groups(parts))
        return judging.together([part.judged for part in parts]).choose(_rows(order, size))

    def _rules(self, host: Rollout, groups: np.ndarray) -> judging.Judged:
        some = jax.tree.map(lambda x: x[groups], host)
        return judging.judge(some, self.problems, self.functions, self.weights)


def _mean_of_steps(scores: np.ndarray, ends: np.ndarray) -> np.ndarray:
    """f32[B * G] from [B, G, T]; 0 for a completion without steps."""
    return (np.where(ends, scores, 0).sum(-1) / np.maximum(ends.sum(-1), 1)).reshape(-1)


def _groups(parts: Sequence[Early]) -> np.ndarray:
    return np.concatenate([np.zeros(0, int), *(part.groups for part in parts)])


def _rows(groups: np.ndarray, size: int) -> np.ndarray:
    """The completions of groups i64[N], `size` of each."""
    return (groups[:, None] * size + np.arange(size)).reshape(-1)


def together(verdicts: Sequence[Verdict]) -> Verdict:
    """Those of parts of a batch as one."""
    judged = judging.together([v.judged for v in verdicts])
    total, steps, scores = (
        stack([getattr(v, name) for v in verdicts]) for name in ('total', 'steps', 'scores')
    )
    return Verdict(judged, total, steps, scores)


def stack(trees: Sequence[Any]) -> Any:
    """Trees of host arrays as one, along their first axis."""
    return jax.tree.map(lambda *x: np.concatenate(x), *trees)
