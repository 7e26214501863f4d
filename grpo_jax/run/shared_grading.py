"""Grading on several processes: each grades its share of the groups, and all get all grades.

A group is graded by one process, since reward functions may compare its completions. Every process
has the tokens of all groups; the numbers of a rollout are gathered in one collective.
"""

import json
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Float, Int

from grpo_jax import rewards
from grpo_jax.run import hosts
from grpo_jax.run.graded_texts import GradedTexts, decode_prompts, texts_when_read
from grpo_jax.run.problems import Problems
from grpo_jax.types import Rollout, StepRewards

Share = Int[np.ndarray, ' M']  # indices of groups


class _Numbers(NamedTuple):
    """The grades of M groups."""

    total: Float[np.ndarray, 'M G']
    parts: Float[np.ndarray, 'M G R']  # of each function
    steps: StepRewards | None


def grade_in_shares(
    host: Rollout,
    problems: Problems,
    grade: Callable[[Share], tuple[GradedTexts, StepRewards | None]],
    *,
    functions: Mapping[str, rewards.RewardFunction],
    has_steps: bool = False,
) -> tuple[GradedTexts, StepRewards | None]:
    """Grade the groups of a rollout, each by one process.

    Args:
      host: [B, G, T] arrays on the host.
      problems: the data set that the prompts are from.
      grade: grades groups, in their order.
      functions: reward functions by name.
      has_steps: whether `grade` returns rewards of steps.

    Returns:
      The grades of all groups, in all processes.

    Raises:
      rewards.RewardError: grading failed in one of the processes; in all of them.
    """
    batch, size, length = host.tokens.shape
    if hosts.count() == 1:
        return grade(np.arange(batch))

    def compute(share: Share) -> tuple[_Numbers, str]:
        texts, steps = grade(share)
        scores, shape = texts.scores, (len(share), size)
        parts = np.zeros((len(scores.total), 0), np.float32)
        if functions:
            parts = np.stack([scores.parts[name] for name in functions], -1)
        numbers = _Numbers(
            scores.total.reshape(shape), parts.reshape(*shape, len(functions)), steps
        )
        return numbers, _note(scores)

    of_steps: Any = None
    if has_steps:
        values: Any = np.zeros((0, size, length), np.float32)
        of_steps = StepRewards(values, values.astype(bool))
    empty = _Numbers(
        np.zeros((0, size), np.float32), np.zeros((0, size, len(functions)), np.float32), of_steps
    )
    numbers, notes = in_shares(batch, compute, empty)
    prompts = decode_prompts(host.prompts, size, problems)
    completions, turns = texts_when_read(host, problems)
    counts = [size * len(share) for share in hosts.shares(batch)]
    scores = _scores(numbers, functions, notes, counts)
    return GradedTexts(prompts, completions, scores, turns), numbers.steps


def in_shares(
    groups: int, compute: Callable[[Share], tuple[Any, str]], empty: Any
) -> tuple[Any, list[str]]:
    """Compute something of the groups of a batch, each of them in one process.

    Args:
      groups: B.
      compute: returns a tree of host arrays [M, ...] of M groups, and a short text.
      empty: the arrays of no group.

    Returns:
      The arrays [B, ...], and the text of each process, in all processes.

    Raises:
      rewards.RewardError: `compute` raised an error in one of the processes; in all of them.
    """
    if hosts.count() == 1:
        arrays, text = compute(np.arange(groups))
        return arrays, [text]
    shares = hosts.shares(groups)
    error, text, arrays = None, '', empty
    try:
        arrays, text = compute(hosts.share(groups))
    except Exception as raised:
        error, arrays = raised, empty
    most = max(map(len, shares))
    padded = jax.tree.map(lambda x, like: _padded(x, most).astype(like.dtype), arrays, empty)
    flags: Any = np.array([error is not None, bool(text)])
    gathered = hosts.gather((padded, flags), 'grading')
    failed, noted = (any(row[1][i] for row in gathered) for i in range(2))
    if failed:
        hosts.raise_in_all(error, 'grading', rewards.RewardError)
    texts = hosts.exchange(text, 'grading') if noted else [''] * len(shares)

    def joined(*parts: np.ndarray) -> np.ndarray:
        return np.concatenate([x[: len(s)] for x, s in zip(parts, shares, strict=True)])

    return jax.tree.map(joined, *(row[0] for row in gathered)), texts


def select_groups(host: Rollout, groups: Share) -> Rollout:
    """Return these groups of a rollout on the host."""
    selected: Rollout = jax.tree.map(lambda x: x[groups], host)
    return selected


def _padded(x: np.ndarray, size: int) -> np.ndarray:
    return np.concatenate([x, np.zeros((size - len(x), *x.shape[1:]), x.dtype)])


def _note(scores: rewards.Scores) -> str:
    """What the scores of a share hold beside numbers of completions; usually nothing."""
    logs = {'metrics': scores.logs.metrics, 'extra': scores.logs.extra}
    if not scores.timeouts and not any(logs.values()) and not scores.failures:
        return ''
    return json.dumps({
        'timeouts': scores.timeouts, 'logs': logs, 'failures': dict(scores.failures),
    })  # fmt: skip


def _scores(
    numbers: _Numbers,
    functions: Mapping[str, rewards.RewardFunction],
    texts: list[str],
    counts: list[int],
) -> rewards.Scores:
    empty = {'timeouts': 0, 'logs': {}, 'failures': {}}
    notes: list[Any] = [json.loads(text) if text else empty for text in texts]
    failures = [
        {name: rewards.Failures(*failed) for name, failed in note['failures'].items()}
        for note in notes
    ]
    parts = zip(notes, counts, strict=True)
    return rewards.Scores(
        total=numbers.total.reshape(-1),
        parts={name: numbers.parts[..., i].reshape(-1) for i, name in enumerate(functions)},
        timeouts=sum(note['timeouts'] for note in notes),
        logs=rewards.join_logs([(rewards.Logs(**note['logs']), count) for note, count in parts]),
        failures=rewards.join_failures(failures),
    )
