"""What one training step learns from: prompts are sampled, judged, refilled and chosen from."""

import operator
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from grpo_jax import rewards, sharding
from grpo_jax.overlap import Blocks, wait_and_judge
from grpo_jax.types import Prompts, Rollout, StepRewards
from grpo_jax.verdicts import Verdict, stack, together

DROPS = ('wrong', 'duplicates', 'truncated')


class Collected(NamedTuple):
    """What one step learns from."""

    rollout: Rollout
    rewards: np.ndarray | StepRewards  # f32[B, G], or one for each step
    metrics: dict[str, float]
    completions: list[dict[str, Any]]  # for completions.jsonl


class Prefetched:
    """Batches by their number, the next of them cut and put on the devices before it is asked for.

    Args:
      make: from the number of a batch.
    """

    def __init__(self, make: Callable[[int], Any]) -> None:
        self.make = make
        self.ready: dict[int, Any] = {}

    def __call__(self, number: int) -> Any:
        return self.ready.pop(number) if number in self.ready else self.make(number)

    def prepare(self, number: int) -> None:
        """Makes the batch that is asked for next."""
        self.ready = {number: self.make(number)}


def cut(prompts: Prompts, size: int, mesh: Mesh) -> list[Prompts]:
    """Parts of `size` prompts (0: all in one) on the devices.

    Completions do not depend on how they are cut, see `sample.row_keys`.
    """
    count = len(prompts.index)
    size = size or count
    cuts = [slice(start, start + size) for start in range(0, count, size)]
    return [sharding.put_groups(jax.tree.map(operator.itemgetter(c), prompts), mesh) for c in cuts]


Draw = Callable[[int], Iterable[Blocks]]  # the number of a batch, from 0, to its parts


def gather(
    sampled: Iterable[Blocks],
    draw: Draw,
    judge: Callable[[Rollout, Any], Verdict],
    early: Callable[[Iterable[Rollout]], Any],
    *,
    parts: int = 1,
    refill: int = 0,
) -> tuple[Rollout, Verdict, dict[str, float]]:
    """Judges a batch; groups that teach nothing are replaced from further batches.

    Dynamic sampling (DAPO, arXiv 2503.14476, section 3.2), bounded: batches are used until there
    are B groups whose rewards differ, or none is left. Those in the first batches come first, and
    where there are too few, groups without differences fill the rest.

    Args:
      sampled: the batch of B prompts in parts, each judged while it and the next are sampled.
      draw: samples the others, numbered from 1.
      judge: what is said of a part, see `overlap.wait_and_judge`.
      early: what is said of groups before the part is whole.
      parts: how many.
      refill: most further batches.

    Returns:
      the rollout, what is said of it, and metrics: seconds of sampling and of rewards behind it,
      and with `refill` how many batches were sampled and which share of the chosen groups differ
      inside.
    """
    began, sampling = time.perf_counter(), 0.0
    rollouts, verdicts = [], []
    for number in range(1 + refill):
        some = draw(number) if number else sampled
        rollout, verdict, seconds = wait_and_judge(some, judge, early, parts)
        wanted = len(rollout.ended)
        rollouts.append(rollout)
        verdicts.append(verdict)
        sampling += seconds
        differs = np.concatenate([v.differs() for v in verdicts])
        if differs.sum() >= wanted:
            break
    metrics = {'timing/sample': sampling}
    if refill:
        chosen = np.argsort(~differs, kind='stable')[:wanted]
        metrics['refill/batches'] = float(len(rollouts))
        metrics['refill/informative_ratio'] = float(differs[chosen].mean())
        rollout = jax.tree.map(lambda x: x[chosen], stack(jax.device_get(rollouts)))
        verdict = together(verdicts).choose(chosen)
    metrics['timing/reward'] = time.perf_counter() - began - sampling
    return rollout, verdict, metrics


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


def statistics(verdict: Verdict, correct: str) -> dict[str, float]:
    """What the rewards were like; the accuracy, where the reward `correct` is one of them."""
    parts = verdict.judged.scores.parts
    metrics = rewards.statistics(verdict.judged.scores)
    if correct in parts:
        metrics['accuracy'] = float(np.mean(parts[correct] >= 1))
    return metrics


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
