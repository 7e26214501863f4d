"""What one training step learns from: prompts are sampled, judged, refilled and chosen from."""

import dataclasses
import functools
import operator
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from grpo_jax import data, judging, rewards
from grpo_jax.rewards import pool
from grpo_jax.setup import Problems
from grpo_jax.tokens import tokens_at
from grpo_jax.types import Params, Prompts, Rollout, StepRewards

DROPS = ('wrong', 'duplicates', 'truncated')


class Collected(NamedTuple):
    """What one step learns from."""

    rollout: Rollout
    rewards: np.ndarray | StepRewards  # f32[B, G], or one for each step
    metrics: dict[str, float]
    completions: list[dict[str, Any]]  # for completions.jsonl


class Verdict(NamedTuple):
    """What is said of a rollout."""

    judged: judging.Judged
    total: np.ndarray  # f32[B, G], of steps their sum
    steps: StepRewards | None
    scores: np.ndarray | None  # f32[B * G] of the reward model, of steps their mean


@dataclasses.dataclass(frozen=True)
class Judge:
    """All that says how good completions are: rules, rewards of steps and a reward model."""

    problems: Problems
    functions: Mapping[str, Callable[..., Any]]
    weights: Mapping[str, float]
    step_rewards: tuple[str, Callable[..., Any], float] | None = None  # from rewards.build_steps
    scorer: Callable[[Params, Rollout], jax.Array] | None = None  # from reward_model.make_scorer
    score_weight: float = 0.0

    def __call__(self, rollout: Rollout, reward_params: Params | None) -> Verdict:
        """The rewards of a rollout on the devices.

        Outcome and process add up: with step rewards, what the rules give for a whole completion
        comes with its last step.

        Raises:
          rewards.RewardError: see `rewards.score` and `rewards.score_steps`.
        """
        # Dispatched first, so that the device scores while the host judges.
        scored = self.scorer(reward_params, rollout) if self.scorer else None
        host = jax.device_get(rollout)
        judged = judging.judge(host, self.problems, self.functions, self.weights)
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
        lengths = [len(text) for text in judged.completions]
        ends = [[step.end for step in row] for row in found]
        places = tokens_at(self.problems.tokenizer, tokens, mask, lengths, ends)
        values, where = np.zeros(tokens.shape, np.float32), np.zeros(tokens.shape, bool)
        for row, (steps, at) in enumerate(zip(found, places, strict=True)):
            for step, place in zip(steps, at, strict=True):
                values[row, place] += weight * step.value  # steps inside one token share it
                where[row, place] = True
        return StepRewards(values.reshape(rollout.mask.shape), where.reshape(rollout.mask.shape))


def _mean_of_steps(scores: np.ndarray, ends: np.ndarray) -> np.ndarray:
    """f32[B * G] from [B, G, T]; 0 for a completion without steps."""
    return (np.where(ends, scores, 0).sum(-1) / np.maximum(ends.sum(-1), 1)).reshape(-1)


def gather(
    sample: Callable[[int, Prompts], Rollout],
    judge: Callable[[Rollout], Verdict],
    batches: Sequence[Prompts],
    *,
    part: int = 0,
) -> tuple[Rollout, Verdict, dict[str, float]]:
    """Samples and judges a batch; groups that teach nothing are replaced from further batches.

    Dynamic sampling (DAPO, arXiv 2503.14476, section 3.2), bounded: batches are used until there
    are B groups whose rewards differ, or none is left. Those in the first batches come first, and
    where there are too few, groups without differences fill the rest.

    Args:
      sample: the number of a batch, from 0, and its prompts to a rollout.
      judge: what is said of it.
      batches: the batch of B prompts, and those that may replace some of its groups.
      part: prompts sampled, and judged, at a time; 0: all at once.

    Returns:
      the rollout, what is said of it, and metrics: seconds of sampling and rewards, and with
      several batches how many were sampled and which share of the chosen groups differ inside.
    """
    began, sampling = time.perf_counter(), 0.0
    rollouts, verdicts, wanted = [], [], len(batches[0].index)
    for number, prompts in enumerate(batches):
        draw = functools.partial(sample, number)
        rollout, verdict, seconds = sample_and_judge(draw, judge, prompts, part)
        rollouts.append(rollout)
        verdicts.append(verdict)
        sampling += seconds
        differs = np.concatenate([_differs(v) for v in verdicts])
        if differs.sum() >= wanted:
            break
    metrics = {'timing/sample': sampling}
    if len(batches) > 1:
        chosen = np.argsort(~differs, kind='stable')[:wanted]
        metrics['refill/batches'] = float(len(rollouts))
        metrics['refill/informative_ratio'] = float(differs[chosen].mean())
        rollout = _choose(_stack(jax.device_get(rollouts)), chosen)
        verdict = _choose_verdict(_join_verdicts(verdicts), chosen)
    metrics['timing/reward'] = time.perf_counter() - began - sampling
    return rollout, verdict, metrics


def _differs(verdict: Verdict) -> np.ndarray:
    """bool[B], whether the rewards of a group tell its completions, or its steps, apart."""
    if verdict.steps is None:
        return verdict.total.max(1) > verdict.total.min(1)
    values, ends = verdict.steps
    most = np.where(ends, values, -np.inf).max((1, 2))
    return most > np.where(ends, values, np.inf).min((1, 2))


def _stack(trees: Sequence[Any]) -> Any:
    return jax.tree.map(lambda *x: np.concatenate(x), *trees)


def _choose(tree: Any, rows: np.ndarray) -> Any:
    return jax.tree.map(lambda x: x[rows], tree)


def _join_verdicts(verdicts: Sequence[Verdict]) -> Verdict:
    judged = judging.together([v.judged for v in verdicts])
    return Verdict(
        judged,
        np.concatenate([v.total for v in verdicts]),
        _stack([v.steps for v in verdicts]),
        _stack([v.scores for v in verdicts]),
    )


def _choose_verdict(verdict: Verdict, groups: np.ndarray) -> Verdict:
    size = verdict.total.shape[1]
    rows = (groups[:, None] * size + np.arange(size)).reshape(-1)
    judged, scores = verdict.judged, verdict.judged.scores
    chosen = judging.Judged(
        [judged.prompts[row] for row in rows],
        [judged.completions[row] for row in rows],
        scores._replace(total=scores.total[rows], parts=_choose(scores.parts, rows)),
    )
    return Verdict(
        chosen,
        verdict.total[groups],
        _choose(verdict.steps, groups),
        _choose(verdict.scores, rows),
    )


def sample_and_judge(
    sample: Callable[[Prompts], Rollout],
    judge: Callable[[Rollout], Verdict],
    prompts: Prompts,
    size: int,
) -> tuple[Rollout, Verdict, float]:
    """Samples `size` prompts at a time (0: all) and rewards each part while the next is sampled.

    Completions do not depend on how they are cut, see `sample.row_keys`.

    Returns:
      the whole rollout on the devices, what the rewards say of it, and the seconds that sampling
      took.
    """
    began, before, count = time.perf_counter(), pool.timeouts(), len(prompts.index)
    size = size or count
    cuts = [slice(start, start + size) for start in range(0, count, size)]
    parts = [sample(jax.tree.map(operator.itemgetter(cut), prompts)) for cut in cuts]
    finished = []

    def wait_and_judge(part: Rollout) -> Verdict:
        jax.block_until_ready(part)
        finished.append(time.perf_counter())
        return judge(part)

    if len(parts) == 1:  # in the main thread, where an interrupt or a signal can end a reward
        return parts[0], wait_and_judge(parts[0]), finished[0] - began
    with ThreadPoolExecutor(max_workers=len(parts)) as threads:
        verdict = _join_verdicts(list(threads.map(wait_and_judge, parts)))
    # The parts were judged at once, so each has counted the others' timeouts too.
    scores = verdict.judged.scores._replace(timeouts=pool.timeouts() - before)
    verdict = verdict._replace(judged=verdict.judged._replace(scores=scores))
    rollout = jax.tree.map(lambda *x: jnp.concatenate(x), *parts)
    return rollout, verdict, max(finished) - began


def kept_rows(
    rollout: Rollout, completions: Sequence[str], total: np.ndarray, drop: Sequence[str]
) -> np.ndarray:
    """Which completions are learnt from, bool[B, G].

    Args:
      rollout: on the host.
      completions: B * G texts.
      total: f32[B, G], their rewards.
      drop: 'wrong', those whose reward is not above 0; 'duplicates', those that an earlier
        completion of their prompt equals (RFT, arXiv 2308.01825, keeps different ones alone);
        'truncated', those without an end (DAPO's overlong filtering).
    """
    kept = np.ones(total.shape, bool)
    if 'wrong' in drop:
        kept &= total > 0
    if 'truncated' in drop:
        kept &= np.asarray(rollout.ended)
    if 'duplicates' in drop:
        size = total.shape[1]
        for group in range(len(total)):
            seen = set()
            for row, text in enumerate(completions[group * size : (group + 1) * size]):
                kept[group, row] &= text not in seen
                seen.add(text)
    return kept


def pick_pairs(rollout: Rollout, total: np.ndarray) -> tuple[Rollout, np.ndarray]:
    """The first completion of the largest and the last of the smallest reward of each group.

    Args:
      rollout: [B, G, ...] on the host.
      total: f32[B, G].

    Returns:
      The rollout and the rewards of these G = 2. Where all rewards of a group are equal the pair
      has no preference, and a preference loss no gradient.
    """
    size = total.shape[1]
    best, worst = total.argmax(1), size - 1 - total[:, ::-1].argmin(1)
    rows, groups = np.stack([best, worst], 1), np.arange(len(total))[:, None]
    chosen = {
        name: getattr(rollout, name)[groups, rows]
        for name in ('tokens', 'mask', 'logprobs', 'ended')
    }
    return Rollout(rollout.prompts, **chosen), total[groups, rows]


def completion_rows(verdict: Verdict, count: int) -> list[dict[str, Any]]:
    """The first completions with their rewards, for `completions.jsonl`."""
    judged, total = verdict.judged, verdict.total.reshape(-1)
    rows = []
    for i in range(min(count, len(judged.prompts))):
        parts = {k: _number(v[i]) for k, v in judged.scores.parts.items()}
        if verdict.scores is not None:
            parts['reward_model'] = float(verdict.scores[i])
        rows.append({
            'prompt': judged.prompts[i],
            'completion': judged.completions[i],
            'reward': float(total[i]),
            'rewards': parts,
        })  # fmt: skip
    return rows


def _number(value: float) -> float | None:
    return None if np.isnan(value) else float(value)
