"""Selects the completions to train on: rejection sampling, and preference pairs."""

import hashlib
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jaxtyping import Bool, Float, Int

from grpo_jax.run import hosts
from grpo_jax.types import Array, Rollout

DROPS = ('wrong', 'duplicates', 'truncated')


def select_completions(
    rollout: Rollout,
    completions: Sequence[str],
    rewards: Float[np.ndarray, 'B G'],
    drop: Sequence[str],
    trained: frozenset[str] = frozenset(),
) -> tuple[Bool[np.ndarray, 'B G'], frozenset[str]]:
    """Decide which completions are trained on.

    Args:
      rollout: on the host.
      completions: B * G texts.
      rewards: of the completions.
      drop: any of 'wrong', which drops completions whose reward is not above 0; 'truncated',
        which drops those without an end token (overlong filtering of DAPO, arXiv 2503.14476); and
        'duplicates', which drops those that equal an earlier completion of the same prompt that
        was trained on, in this batch or another (RFT, arXiv 2308.01825, keeps distinct ones only).
      trained: digests of the completions that earlier batches trained on.

    Returns:
      Which completions are kept, and `trained`, with their digests added for 'duplicates'.
    """
    kept = np.ones(rewards.shape, bool)
    if 'wrong' in drop:
        kept &= rewards > 0
    if 'truncated' in drop:
        kept &= np.asarray(rollout.ended)
    if 'duplicates' not in drop:
        return kept, trained
    added: set[str] = set()
    texts = iter(completions)
    for group, prompt in enumerate(rollout.prompts.index):
        for row in range(rewards.shape[1]):
            digest = _digest(int(prompt), next(texts))
            if kept[group, row]:
                kept[group, row] = digest not in trained and digest not in added
                added.add(digest)
    return kept, trained | added


def _digest(prompt: int, completion: str) -> str:
    text = f'{prompt}:{completion}'.encode('utf-8', 'surrogatepass')
    return hashlib.blake2b(text, digest_size=10).hexdigest()


def select_pairs(
    rollout: Rollout, rewards: Float[np.ndarray, 'B G']
) -> tuple[Rollout, Float[np.ndarray, 'B 2']]:
    """Select the best and the worst completion of each group.

    Of several with the largest reward the first is the best; of several with the smallest reward
    the last is the worst.

    Args:
      rollout: [B, G, ...].
      rewards: of the completions.

    Returns:
      The rollout with G = 2, best first, and its rewards. If all rewards of a group are equal, the
      pair has no preference, and a preference loss has no gradient for it.
    """
    size = rewards.shape[1]
    best, worst = rewards.argmax(1), size - 1 - rewards[:, ::-1].argmin(1)
    rows: Any = np.stack([best, worst], 1)
    completions = rollout._replace(prompts=None)  # type: ignore[arg-type]
    pairs = hosts.select(_completions_of, completions, rows)
    return pairs._replace(prompts=rollout.prompts), np.take_along_axis(rewards, rows, 1)


def _completions_of(numpy: Any, rollout: Rollout, rows: Int[Array, 'B n']) -> Rollout:
    """Return n completions of each group."""
    groups = numpy.arange(len(rows))[:, None]
    selected: Rollout = jax.tree.map(lambda x: x[groups, rows], rollout)
    return selected
