"""Tokenize rows once, into tables of prompts and demonstrations that are held in memory."""

import dataclasses
import logging
from collections.abc import Collection
from typing import Any

import numpy as np
from jaxtyping import Bool, Int

from grpo_jax.data.chat import turn_end
from grpo_jax.data.conversations import demonstration_of
from grpo_jax.data.formats import fill
from grpo_jax.data.literal_text import LiteralText
from grpo_jax.data.prompts import render_prompts
from grpo_jax.data.rows import Row, Rows
from grpo_jax.data.tokenizers import Tokenizer
from grpo_jax.types import Prompts, Rollout

log = logging.getLogger('grpo_jax')

_CHUNK = 512  # texts per call of a tokenizer, which keeps much more in memory than their ids


@dataclasses.dataclass(frozen=True)
class PromptTable:
    """The N tokenized prompts of a data set that fit in P tokens, padded on the right.

    Attributes:
      tokens: i32[N, P].
      length: i32[N], tokens of each prompt, at least 1.
      index: i32[N], position of the row in the data set.
      dropped: number of rows that were left out because they are too long.
    """

    tokens: Int[np.ndarray, 'N P']
    length: Int[np.ndarray, ' N']
    index: Int[np.ndarray, ' N']
    dropped: int

    def __len__(self) -> int:
        return len(self.index)

    def select(self, positions: Int[np.ndarray, ' B']) -> Prompts:
        """Return the batch of the prompts at B positions of the table."""
        return Prompts(self.tokens[positions], self.length[positions], self.index[positions])

    def used_ids(self) -> Int[np.ndarray, ' tokens']:
        """Return the ids of all prompts' tokens, without the padding."""
        return self.tokens[np.arange(self.tokens.shape[1]) < self.length[:, None]]

    def summary(self, leaked: int = 0) -> str:
        """Describe how many rows are used, and why the others are not.

        Args:
          leaked: number of rows that `without_leaks` dropped.
        """
        reasons = ((self.dropped, 'that are too long'), (leaked, 'whose question is held out'))
        dropped = ' and '.join(f'{count} {reason}' for count, reason in reasons if count)
        total = f'{len(self)} of {len(self) + self.dropped + leaked} rows used'
        return f'{total}; dropped {dropped}' if dropped else total


@dataclasses.dataclass(frozen=True)
class DemonstrationTable:
    """N prompts with one completion each, padded on the right to T tokens.

    Attributes:
      prompts: its `dropped` counts the rows whose prompt or completion is too long.
      tokens: i32[N, T], completions.
      mask: bool[N, T], true up to and including the end-of-sequence token.
    """

    prompts: PromptTable
    tokens: Int[np.ndarray, 'N T']
    mask: Bool[np.ndarray, 'N T']

    def __len__(self) -> int:
        return len(self.prompts)

    def select(self, positions: Int[np.ndarray, ' B']) -> Rollout:
        """Return the demonstrations at B positions, with G = 1 and zeros as log-probs."""
        # Any: a rollout on the host; for the type checker it is one on a device.
        tokens: Any = self.tokens[positions, None]
        mask: Any = self.mask[positions, None]
        logprobs: Any = np.zeros(tokens.shape, np.float32)
        ended: Any = np.ones(tokens.shape[:2], bool)
        return Rollout(self.prompts.select(positions), tokens, mask, logprobs, ended=ended)


def tokenize_prompts(
    rows: Rows,
    tokenizer: Tokenizer,
    *,
    template: str,
    prompt_length: int,
    chat: bool = False,
    system: str = '',
    assistant_prefix: str = '',
    examples: Rows = (),
    hidden: Collection[int] = (),
) -> PromptTable:
    """Tokenize the prompt of every row.

    A prompt of more than `prompt_length` tokens is dropped and counted, never truncated. The
    special tokens of a prompt are those that the tokenizer adds by default (a beginning-of-sequence
    token, or none) and those that it spells; with `chat` they are those of the chat template alone.

    Args:
      rows: rows of a data set.
      tokenizer: tokenizer of the model.
      template: name in `formats.FORMATS`, or a template over the columns.
      prompt_length: P, the largest number of tokens.
      chat: render the prompts by the tokenizer's chat template.
      system: system message, see `prompts.render_prompts`.
      assistant_prefix: appended to every prompt, so completions continue it.
      examples: rows for the worked examples of a format, see `prompts.render_prompts`.
      hidden: special tokens that are text where a row spells them, with `chat`.

    Raises:
      ValueError: a prompt has no tokens, or none fits; also as `prompts.render_prompts`.
    """
    literal = LiteralText(tokenizer, hidden)
    prompts = _prompt_ids(
        list(rows), tokenizer, literal, template=template, chat=chat, system=system,
        examples=examples, prefix=assistant_prefix,
    )  # fmt: skip
    return _prompt_table(prompts, _fits(prompts, 'prompt', prompt_length), prompt_length, tokenizer)


def tokenize_demonstrations(
    rows: Rows,
    tokenizer: Tokenizer,
    *,
    template: str,
    completion_template: str,
    prompt_length: int,
    completion_length: int,
    chat: bool = False,
    system: str = '',
    assistant_prefix: str = '',
    examples: Rows = (),
    hidden: Collection[int] = (),
) -> DemonstrationTable:
    """Tokenize the prompt and the completion of every row.

    A completion ends as a sampled one does: with the end-of-sequence token or, with `chat`, as the
    chat template ends the assistant's message (`chat.turn_end`). Prompt and completion are
    tokenized separately, as in sampling. A row is dropped and counted if either is too long,
    including the token that ends the completion.

    Args:
      rows: rows of a data set.
      tokenizer: tokenizer of the model.
      template: see `tokenize_prompts`.
      completion_template: template of a completion over the columns; for one column of
        conversations the last message of the assistant.
      prompt_length: P, the largest number of tokens of a prompt.
      completion_length: T, the largest number of tokens of a completion.
      chat: see `tokenize_prompts`.
      system: see `tokenize_prompts`.
      assistant_prefix: see `tokenize_prompts`.
      examples: see `tokenize_prompts`.
      hidden: see `tokenize_prompts`.

    Raises:
      ValueError: no row fits both lengths, or a template does not fit the columns; also as
        `tokenize_prompts`.
    """
    rows = list(rows)  # reads rows on disk once
    literal = LiteralText(tokenizer, hidden)
    prompts = _prompt_ids(
        rows, tokenizer, literal, template=template, chat=chat, system=system,
        examples=examples, prefix=assistant_prefix,
    )  # fmt: skip
    ending, end_id = turn_end(tokenizer) if chat else ('', tokenizer.eos_token_id)
    texts = [
        render_demonstration(completion_template, literal.mark(row) if chat else row, number)
        + ending
        for number, row in enumerate(rows)
    ]
    completions = [[*ids, end_id] for ids in _encode(texts, literal, add_special_tokens=False)]
    fits = _fits(prompts, 'prompt', prompt_length)
    fits &= _fits(completions, 'completion', completion_length)
    if not fits.any():
        raise ValueError(
            f'no row has both a prompt within prompt_length={prompt_length} tokens and a '
            f'completion within completion_length={completion_length}: raise one of them'
        )
    table = _prompt_table(prompts, fits, prompt_length, tokenizer)
    kept = [completions[row] for row in table.index]
    lengths = np.array([len(ids) for ids in kept])
    mask = np.arange(completion_length) < lengths[:, None]
    return DemonstrationTable(table, _pad(kept, completion_length, tokenizer), mask)


def render_demonstration(template: str, row: Row, number: int = 0) -> str:
    """Render the completion that a row demonstrates.

    Args:
      template: see `tokenize_demonstrations`.
      row: a row of the data set.
      number: of the row, for error messages.

    Raises:
      ValueError: the template does not fit the columns, or the messages are malformed.
    """
    message = demonstration_of(template, row, number)
    return fill(template, row) if message is None else message


def _prompt_ids(
    rows: list[Row], tokenizer: Tokenizer, literal: LiteralText,
    *, template: str, chat: bool, system: str, examples: Rows, prefix: str,
) -> list[list[int]]:  # fmt: skip
    marked = [literal.mark(row) for row in rows]
    spelling = [row for row, (a, b) in enumerate(zip(rows, marked, strict=True)) if a != b]
    if chat:
        rows, examples = marked, [literal.mark(row) for row in examples]
    texts = render_prompts(
        template, rows, examples=examples, system=system, chat=tokenizer if chat else None
    )
    found = [] if chat else literal.find([texts[row] for row in spelling])
    if found and not tokenizer.split_special_tokens:
        log.warning(
            'the text of %d rows contains special tokens such as %r, which are tokens of the '
            'prompt with data.chat=False', len(found), found[0],
        )  # fmt: skip
    return _encode([text + prefix for text in texts], literal, add_special_tokens=not chat)


def _encode(texts: list[str], literal: LiteralText, *, add_special_tokens: bool) -> list[list[int]]:
    if not texts:
        raise ValueError('the data set has no rows: choose another split or slice')
    sequences: list[list[int]] = []
    for start in range(0, len(texts), _CHUNK):
        chunk = texts[start : start + _CHUNK]
        sequences += literal.encode(chunk, add_special_tokens=add_special_tokens)
    return sequences


def _fits(sequences: list[list[int]], kind: str, limit: int) -> Bool[np.ndarray, ' N']:
    """Return which sequences have at most `limit` tokens."""
    lengths = np.array([len(ids) for ids in sequences])
    if lengths.min() > limit:
        raise ValueError(
            f'all {len(lengths)} {kind}s are longer than {kind}_length={limit} tokens: raise it '
            f'(the shortest has {lengths.min()}, the longest {lengths.max()})'
        )
    return lengths <= limit


def _prompt_table(
    prompts: list[list[int]], fits: Bool[np.ndarray, ' N'], length: int, tokenizer: Tokenizer
) -> PromptTable:
    lengths = np.array([len(ids) for ids in prompts], np.int32)
    if not lengths.all():
        raise ValueError(
            f'the prompt of row {lengths.argmin()} has no tokens: fill the row or the template'
        )
    index = np.flatnonzero(fits).astype(np.int32)
    tokens = _pad([prompts[row] for row in index], length, tokenizer)
    return PromptTable(tokens, lengths[index], index, dropped=len(prompts) - len(index))


def _pad(
    sequences: list[list[int]], length: int, tokenizer: Tokenizer
) -> Int[np.ndarray, 'N length']:
    pad_id = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    padded = np.full((len(sequences), length), pad_id, np.int32)
    for row, ids in zip(padded, sequences, strict=True):
        row[: len(ids)] = ids
    return padded
