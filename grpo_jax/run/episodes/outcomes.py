"""What the environment made of the turns of a rollout's completions."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Float

from grpo_jax.run.episodes.recorded import RecordedReplies, Reply
from grpo_jax.run.episodes.turns import spans
from grpo_jax.types import Rollout


def replies_of(
    rollout: Rollout, group: int, completion: int, books: Sequence[RecordedReplies]
) -> list[Reply | None]:
    """Returns what the environment made of each turn of a completion.

    Args:
      rollout: [B, G, T] arrays on the host.
      group: its number.
      completion: its number in the group.
      books: the replies of the batches that the rollout is from.

    Returns:
      For each turn the reply; None: it was not asked, or by another process.
    """
    tokens, mask, trained = (
        np.asarray(x[group, completion])
        for x in (rollout.tokens, rollout.mask, rollout.policy_mask)
    )
    row = int(rollout.prompts.index[group])
    found = []
    for _, end, _ in spans(mask, trained):
        known = (book.find(row, completion, tokens[:end]) for book in books)
        found.append(next((reply for reply in known if reply is not None), None))
    return found


def environment_rewards(
    rollout: Rollout, books: Sequence[RecordedReplies]
) -> Float[np.ndarray, ' N']:
    """Returns the last reward that the environment gave each completion; NaN: none."""
    rewards: Any = np.full(rollout.ended.shape, np.nan)
    for group, completion in np.ndindex(*rollout.ended.shape):
        for reply in replies_of(rollout, group, completion, books):
            if reply is not None and reply.reward is not None:
                rewards[group, completion] = reply.reward
    return rewards.reshape(-1)
