"""A table of a completion's tokens, for a terminal."""

import unicodedata
from collections.abc import Iterator
from typing import Any

import numpy as np

from grpo_jax.algorithm.explanation import TokenTerms
from grpo_jax.run.replay.tokens import Completion, visible

_TEXT = 16  # columns of a token's text
_COLUMNS = {
    'logprobs': 'log-prob', 'old_logprobs': 'old', 'ref_logprobs': 'reference', 'ratio': 'ratio',
    'advantages': 'advantage', 'values': 'value', 'kl': 'KL', 'entropy': 'entropy',
    'coefficients': 'coefficient',
}  # fmt: skip


def default_completion(terms: TokenTerms, group: int | None) -> tuple[int, int]:
    """The completion that the update changes most, of a prompt or of all."""
    sizes = np.abs(terms.coefficients).sum(-1)
    if group is not None:
        return group, int(sizes[group].argmax())
    best = np.unravel_index(sizes.argmax(), sizes.shape)
    return int(best[0]), int(best[1])


def table(terms: TokenTerms, completion: Completion) -> str:
    """A line for each token of a completion: its text, and the terms that the algorithm has.

    Args:
      terms: of the batch.
      completion: one of its completions.
    """
    at = completion.group, completion.number
    columns = {title: getattr(terms, name) for name, title in _COLUMNS.items()}
    shown = {title: array[at] for title, array in columns.items() if array is not None}
    rows = [['', 'token', *shown, '']]
    for i, text in enumerate(completion.tokens):
        numbers = [_number(array[i]) for array in shown.values()]
        rows.append([str(i), _shortened(visible(text)), *numbers, ' '.join(flags(terms, at, i))])
    return '\n'.join(_aligned(rows))


def heading(terms: TokenTerms | None, completion: Completion) -> str:
    """A completion's reward with its parts, its advantage, and how it ended, in words."""
    rewarded = 'no reward' if completion.reward is None else f'reward {completion.reward:.6g}'
    parts = ', '.join(
        f'{name} {"none" if value is None else format(value, ".6g")}'
        for name, value in completion.parts.items()
    )
    found = [rewarded + (f' ({parts})' if parts else '')]
    if terms is not None and completion.tokens:
        values = terms.advantages[completion.group, completion.number][: len(completion.tokens)]
        low, high = float(values.min()), float(values.max())
        same = f'advantage {low:.6g}'
        found.append(same if low == high else f'advantages from {low:.6g} to {high:.6g}')
    found.append(f'{len(completion.tokens)} tokens{"" if completion.ended else ", cut off"}')
    return ', '.join(found)


def flags(terms: TokenTerms, at: tuple[int, int], token: int) -> Iterator[str]:
    """Yields what is special about a token: it is not trained, or clipped."""
    if not terms.trained[at][token]:
        yield 'not trained'
    if terms.clipped is not None and terms.clipped[at][token]:
        yield 'clipped'


def _number(value: Any) -> str:
    return f'{float(value):.4g}'


def _shortened(text: str) -> str:
    return text if _width(text) <= _TEXT else text[: _TEXT - 1] + '…'


def _width(text: str) -> int:
    """Columns in a terminal."""
    return sum(
        0 if unicodedata.combining(c) else 2 if unicodedata.east_asian_width(c) in 'WF' else 1
        for c in text
    )


def _aligned(rows: list[list[str]]) -> Iterator[str]:
    widths = [max(map(_width, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        cells = [
            text + ' ' * (width - _width(text)) if i in (1, len(row) - 1)
            else ' ' * (width - _width(text)) + text
            for i, (text, width) in enumerate(zip(row, widths, strict=True))
        ]  # fmt: skip
        yield '  '.join(cells).rstrip()
