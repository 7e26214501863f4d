"""The texts of tokens, and the rewards of completions, as tables and pages show them."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from grpo_jax.algorithm.estimators import total_rewards
from grpo_jax.run.replay.rerun import Replayed

_CONTEXT = 8  # tokens before a token, on which its text may depend
_INCOMPLETE = '\ufffd'  # what a decoder writes for a part of a character


class Completion(NamedTuple):
    """A completion of a replayed step."""

    group: int  # the number of its prompt in the batch
    number: int  # in the group
    tokens: tuple[str, ...]  # their texts; joined they are the completion
    ended: bool  # by itself; false: it was cut off
    reward: float | None  # None: it has none
    parts: dict[str, float | None]  # of the reward, where they are recorded


def prompt_text(replayed: Replayed, group: int) -> str:
    """The text of a prompt of the batch, special tokens included."""
    prompts = replayed.rollout.prompts
    ids = np.asarray(prompts.tokens[group])[: int(prompts.length[group])].tolist()
    return ''.join(token_texts(replayed.setup.tokenizer, ids))


def completions_of(replayed: Replayed, group: int) -> list[Completion]:
    """The completions of a prompt, in the order of the batch."""
    rollout, tokenizer = replayed.rollout, replayed.setup.tokenizer
    totals = np.asarray(total_rewards(replayed.rewards))[group]
    size, rows = rollout.tokens.shape[1], replayed.completions
    sampled = len(rows) == rollout.tokens.shape[0] * size  # not the pairs that were chosen of more
    found = []
    for number in range(size):
        ids = np.asarray(rollout.tokens[group, number])[rollout.mask[group, number]].tolist()
        reward = float(totals[number])
        found.append(
            Completion(
                group,
                number,
                tuple(token_texts(tokenizer, ids)),
                bool(rollout.ended[group, number]),
                None if np.isnan(reward) else reward,
                dict(rows[group * size + number]['rewards']) if sampled else {},
            )
        )
    return found


def token_texts(tokenizer: Any, ids: Sequence[int]) -> list[str]:
    """The text that each token adds to those before it.

    A token that ends inside of a character is shown as the tokenizer spells it.
    """
    windows = [list(ids[max(i - _CONTEXT, 0) : i + 1]) for i in range(len(ids))]
    # Some tokenizers cannot decode an empty list in a batch of others.
    before = tokenizer.batch_decode([window[:-1] for window in windows], skip_special_tokens=False)
    after = tokenizer.batch_decode(windows, skip_special_tokens=False)
    spelled = tokenizer.convert_ids_to_tokens(list(ids))
    return [
        longer[len(shorter) :]
        if longer.startswith(shorter) and _INCOMPLETE not in longer[len(shorter) :]
        else str(piece if piece is not None else f'<{number}>')
        for shorter, longer, piece, number in zip(before, after, spelled, ids, strict=True)
    ]


def visible(text: str) -> str:
    """The text on one line: spaces as dots, and characters that a terminal obeys as escapes."""
    return ''.join('·' if c == ' ' else c if c.isprintable() else repr(c)[1:-1] for c in text)
