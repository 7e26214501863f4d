"""The turns of completions, read from their tokens.

The policy's tokens are cut where the environment's begin. They are decoded and never encoded again,
so what is trained on is what was sampled.
"""

import itertools
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Int

from grpo_jax.data import char_to_token, completion_texts
from grpo_jax.run.problems import Problems
from grpo_jax.types import Rollout


class Turn(NamedTuple):
    """A turn of the policy, and the reply to it."""

    text: str
    reply: str | None  # None: the episode ended with this turn


def spans(
    mask: Bool[np.ndarray, ' T'], trained: Bool[np.ndarray, ' T']
) -> list[tuple[int, int, int]]:
    """The turns of one completion: the first token of each, the end of its tokens, and its reply's.

    Args:
      mask: the tokens of the completion.
      trained: those of the policy.
    """
    length = int(mask.sum())
    mine = trained[:length].astype(np.int8)
    edges = np.flatnonzero(np.diff(mine, prepend=0, append=0))
    starts, ends = edges[::2].tolist(), edges[1::2].tolist()
    return list(zip(starts, ends, [*starts[1:], length], strict=True))


def turns_of(rollout: Rollout, problems: Problems) -> list[list[Turn]]:
    """The turns of all completions of a rollout [B, G, T] on the host, group by group."""
    rows, places, parts = _flat(rollout), [], []
    for i, (tokens, mask, trained) in enumerate(rows):
        for start, end, stop in spans(mask, trained):
            places.append(i)
            parts.append((tokens, (start, end), (end, stop)))
    texts = _decoded([(tokens, mine) for tokens, mine, _ in parts], problems, problems.stops)
    replies = _decoded([(tokens, theirs) for tokens, _, theirs in parts], problems, ())
    turns: list[list[Turn]] = [[] for _ in range(rollout.ended.size)]
    for i, text, reply, (_, _, (end, stop)) in zip(places, texts, replies, parts, strict=True):
        turns[i].append(Turn(text, reply if stop > end else None))
    return turns


def policy_text(turns: Sequence[Turn]) -> str:
    """What the policy wrote: its turns, each on a line of its own."""
    return '\n'.join(turn.text for turn in turns)


def columns_of(turns: Sequence[Sequence[Turn]]) -> list[list[dict[str, Any]]]:
    """The column `turns` of reward functions: of each turn its text, reply and end.

    The end is the number of characters of `policy_text` up to and including the turn.
    """
    rows = []
    for completion in turns:
        ends = itertools.accumulate(len(turn.text) + 1 for turn in completion)
        rows.append([
            {**turn._asdict(), 'end': end - 1} for turn, end in zip(completion, ends, strict=True)
        ])  # fmt: skip
    return rows


def conversations(turns: Sequence[Sequence[Turn]]) -> list[list[dict[str, Any]]]:
    """Completions as messages, in which replies are those of a tool."""
    rows = []
    for completion in turns:
        messages: list[dict[str, Any]] = []
        for turn in completion:
            messages.append({'role': 'assistant', 'content': turn.text})
            if turn.reply is not None:
                messages.append({'role': 'tool', 'content': turn.reply})
        rows.append(messages)
    return rows


def token_positions(
    rollout: Rollout,
    problems: Problems,
    turns: Sequence[Sequence[Turn]],
    ends: Sequence[Sequence[int]],
) -> list[list[int]]:
    """Find the tokens that complete the first n characters of what the policy wrote.

    Args:
      rollout: [B, G, T] arrays on the host.
      problems: the data set that the prompts are from.
      turns: of its completions.
      ends: for each completion, the numbers of characters n of its `policy_text`.

    Returns:
      For each n the index of a token of the policy.
    """
    queries: list[tuple[int, int, int]] = []  # completion, first token of the turn, characters
    rows = []
    for i, ((tokens, mask, trained), of_row) in enumerate(zip(_flat(rollout), ends, strict=True)):
        limits = [turn['end'] for turn in columns_of([turns[i]])[0]]
        cut = spans(mask, trained)
        for n in of_row:
            k = min(int(np.searchsorted(limits, n)), len(limits) - 1)
            start, end, _ = cut[k]
            before = limits[k - 1] + 1 if k else 0
            queries.append((i, start, max(n - before, 0)))
            rows.append((tokens, (start, end), turns[i][k].text))
    if not rows:
        return [[] for _ in ends]
    tokens, mask = _batch([(ids, span) for ids, span, _ in rows])
    texts = [text for *_, text in rows]
    found = iter(char_to_token(
        problems.tokenizer, tokens, mask, texts, [[n] for *_, n in queries], hidden=problems.hidden
    ))  # fmt: skip
    starts = iter(start for _, start, _ in queries)
    return [[next(starts) + next(found)[0] for _ in of_row] for of_row in ends]


def _flat(rollout: Rollout) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """The tokens, mask and policy mask of each completion."""
    length = rollout.tokens.shape[2]
    arrays: Any = rollout.tokens, rollout.mask, rollout.policy_mask
    return zip(*(np.reshape(x, (-1, length)) for x in arrays), strict=True)


def _batch(
    parts: Sequence[tuple[np.ndarray, tuple[int, int]]],
) -> tuple[Int[np.ndarray, 'N T'], Bool[np.ndarray, 'N T']]:
    """Parts of completions, each from column 0."""
    longest = max((end - start for _, (start, end) in parts), default=0)
    tokens, mask = np.zeros((len(parts), longest), np.int32), np.zeros((len(parts), longest), bool)
    for i, (ids, (start, end)) in enumerate(parts):
        tokens[i, : end - start], mask[i, : end - start] = ids[start:end], True
    return tokens, mask


def _decoded(
    parts: Sequence[tuple[np.ndarray, tuple[int, int]]], problems: Problems, stops: Sequence[str]
) -> list[str]:
    if not parts:
        return []
    return completion_texts(problems.tokenizer, *_batch(parts), stops, problems.hidden)
