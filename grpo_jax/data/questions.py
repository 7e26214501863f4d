"""Compare questions: select those to hold out, and drop training rows that leak them."""

import hashlib
import re
import unicodedata
from collections.abc import Iterable

from grpo_jax.data.conversations import is_conversation, prompt_of
from grpo_jax.data.rows import Row, Rows
from grpo_jax.data.values import json_text, text_of

_PUNCTUATION = re.compile(r' ?([^\w\s]) ?')


def question_key(question: str) -> str:
    """Return a key that is equal for two spellings of one question.

    It ignores case, the kind of white space, white space next to punctuation, and compatibility
    forms of characters (NFKC).
    """
    text = unicodedata.normalize('NFKC', question).casefold()
    return _PUNCTUATION.sub(r'\1', ' '.join(text.split()))


def question_column(row: Row) -> str | None:
    """Return the column with a row's question: `question`, or else `prompt` or `messages`."""
    return next((name for name in ('question', 'prompt', 'messages') if name in row), None)


def key_of(row: Row, column: str | None = None) -> str:
    """Return the `question_key` of a row's question, all messages of a conversation included.

    Args:
      row: a row of a data set.
      column: column with the question; None: see `question_column`.
    """
    name = column or question_column(row) or 'question'
    value = row[name]
    if is_conversation(value):
        return question_key(json_text(prompt_of(row, name)))
    return question_key(text_of(value))


def without_leaks(training: Rows, heldout: Rows, *, column: str | None = None) -> tuple[Rows, int]:
    """Drop the training rows whose question is held out. Questions are equal by `question_key`.

    Args:
      training: rows to train on.
      heldout: rows to evaluate on.
      column: column with the question; None: see `question_column`.

    Returns:
      The remaining training rows, and the number of rows dropped.

    Raises:
      ValueError: rows lack the column, or no training row remains.
    """
    for rows in (training, heldout):
        if len(rows) and (column or question_column(rows[0])) not in rows[0]:
            name = column or 'question'
            raise ValueError(
                f'held-out questions are removed from the training rows by column {name!r}, but '
                f"the columns are {', '.join(rows[0])}: rename one by the data set's option "
                f"columns={{{name!r}: 'name in the file'}}"
            )
    heldout_keys = {key_of(row, column) for row in heldout}
    kept = [row for row in training if key_of(row, column) not in heldout_keys]
    if len(training) and not kept:
        raise ValueError(
            f'all {len(training)} training rows are held out as well: choose other splits, or '
            "split one in two by the data set's option heldout=0.1"
        )
    leaked = len(training) - len(kept)
    return (kept if leaked else training), leaked


def select_heldout(keys: Iterable[str], heldout: float) -> set[str]:
    """Select the questions to hold out by the hash of their keys.

    The selection does not depend on the order or repetition of questions. With a fraction, whether
    a question is held out does not depend on the other questions either.

    Args:
      keys: `question_key` of every question; equal keys count once.
      heldout: fraction (below 1) or number of the distinct questions to hold out.

    Returns:
      The keys of the held-out questions.

    Raises:
      ValueError: all questions would be held out, or none.
    """
    hashes = {key: hashlib.sha256(key.encode()).digest() for key in keys}
    if heldout < 1:
        limit = heldout * 2**64
        selected = {key for key, value in hashes.items() if int.from_bytes(value[:8]) < limit}
    else:
        selected = set(sorted(hashes, key=hashes.__getitem__)[: int(heldout)])
    if not 0 < len(selected) < len(hashes):
        raise ValueError(
            f'heldout={heldout} holds out {len(selected)} of {len(hashes)} different questions: '
            'choose a value that leaves at least one on each side'
        )
    return selected
