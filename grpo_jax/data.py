"""From rows of text to batches of tokens.

Rows come from a TFDS builder (`load`), are tokenised once into a table in memory
(`tokenize_prompts`, `tokenize_demonstrations`) and served by `batches`, where batch k is a pure
function of the seed and k: there is no iterator whose state could be lost.
"""

import os
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import grain
import numpy as np

from grpo_jax.prompts import fill, question_key, render, turn_end
from grpo_jax.types import Prompts, Rollout

if TYPE_CHECKING:  # importing transformers takes a second or two, so it waits until it is needed
    from transformers import PreTrainedTokenizerBase

Rows = Sequence[Mapping[str, str]]

_AT_ONCE = 512  # texts that are tokenised together: tokenizers keep far more than ids of each


class PromptTable(NamedTuple):
    """The N tokenised prompts of a data set that fit in P tokens, padded on the right."""

    tokens: np.ndarray  # i32[N, P]
    length: np.ndarray  # i32[N], at least 1
    index: np.ndarray  # type: ignore[assignment]  # i32[N], row in the data set
    dropped: int  # rows left out because they are too long

    def summary(self, leaked: int = 0) -> str:
        """How many rows there were and why some are not used, `leaked` by `without_leaks`."""
        used = len(self.index)
        reasons = ((self.dropped, 'that are too long'), (leaked, 'whose question is held out'))
        dropped = ' and '.join(f'{count} {reason}' for count, reason in reasons if count)
        total = f'{used} of {used + self.dropped + leaked} rows used'
        return f'{total}; dropped {dropped}' if dropped else total


class DemonstrationTable(NamedTuple):
    """Prompts with one completion each, padded on the right to T tokens."""

    prompts: PromptTable  # `dropped` counts the rows whose prompt or completion is too long
    tokens: np.ndarray  # i32[N, T]
    mask: np.ndarray  # bool[N, T], true up to and including the end-of-sequence token


# Rows of text


def load(name: str, split: str, *, cache_dir: str | os.PathLike[str], **options: Any) -> Rows:
    """Opens a data set as a random-access sequence of rows, each a dict of text columns.

    Generated data sets are 'arithmetic' and 'countdown', with splits train and test. All others lie
    in files, whose names hold the split, below $GRPO_JAX_DATA_DIR: 'gsm8k', 'math', 'cmath',
    'svamp', 'mawps' and 'humaneval' as they are published (see `datasets.sources`), and your own as
    'jsonl' (`<split>.jsonl`, also `.gz` or `.json`), 'parquet' (`<split>.parquet`, or in parts) and
    'hf' (a folder that `datasets` has saved, or Parquet files).

    Args:
        name: of the data set.
        split: such as train or test. A TFDS slice may follow, as in 'test[:100]'.
        cache_dir: where data sets are prepared, and used again if options and files are the same.
        **options: of a generated data set, those of `datasets.ArithmeticConfig` and
            `CountdownConfig`. Of one in files: `folder`, relative to $GRPO_JAX_DATA_DIR unless it
            is absolute; `file`, a pattern such as '{split}_v2.jsonl' or the name of a file that
            holds all rows; `columns`, a mapping of new names to those in the file; `required`, the
            columns that must exist; and `heldout`, a share (0.1) or number (500) of the questions
            of train, which are then taken out of it and make the split heldout.

    Raises:
        ValueError: the name or split is unknown, an option is out of range, a file is absent,
            malformed or lacks a column, or `cache_dir` cannot be written to.
    """
    from grpo_jax import datasets

    stem, bracket, part = split.partition('[')
    builder_class, config, stem = datasets.choose(name, stem, options)
    builder = datasets.prepare(builder_class, config, cache_dir)
    if stem not in builder.info.splits:
        raise ValueError(f'{name} has no split {stem!r}: choose {" or ".join(builder.info.splits)}')
    return datasets.TextRows(builder.as_data_source(f'{stem}{bracket}{part}'))


class Selection(Sequence[Mapping[str, str]]):
    """Some rows of a data set, in an order of their own."""

    def __init__(self, rows: Rows, chosen: Sequence[int]) -> None:
        self._rows, self._chosen = rows, chosen

    def __len__(self) -> int:
        return len(self._chosen)

    def __getitem__(self, row: Any) -> Any:
        return self._rows[self._chosen[row]]


def without_leaks(training: Rows, heldout: Rows, *, column: str = 'question') -> tuple[Rows, int]:
    """The training rows whose question is none of the held-out ones, and how many that leaves out.

    Questions are compared by `prompts.question_key`. Where none leaks, the rows are `training`.

    Raises:
        ValueError: rows have no such column, or no training row is left.
    """
    for rows in (training, heldout):
        if len(rows) and column not in rows[0]:
            raise ValueError(
                f'whether held-out questions are among the training rows shows in column '
                f"{column!r}, but there are {', '.join(rows[0])}: rename one by the data set's "
                f"option columns={{{column!r}: 'name in the file'}}"
            )
    held = {question_key(row[column]) for row in heldout}
    kept = [place for place, row in enumerate(training) if question_key(row[column]) not in held]
    if len(training) and not kept:
        raise ValueError(
            f'all {len(training)} training rows are held out as well: choose other splits, or cut '
            "one in two by the data set's option heldout=0.1"
        )
    leaked = len(training) - len(kept)
    return (Selection(training, kept) if leaked else training), leaked


def columns(rows: Rows, index: Sequence[int] | np.ndarray, repeats: int) -> dict[str, list[str]]:
    """The columns of the rows `index` i32[B], each value `repeats` times: lists of B * repeats.

    With `repeats` = G this is the order of a rollout's completions, as reward functions take them.
    """
    chosen = [rows[int(row)] for row in index]
    return {name: [row[name] for row in chosen for _ in range(repeats)] for name in chosen[0]}


# Tables of tokens


def tokenize_prompts(
    rows: Rows,
    tokenizer: 'PreTrainedTokenizerBase',
    *,
    template: str,
    prompt_length: int,
    chat: bool = False,
    system: str = '',
    examples: Rows = (),
) -> PromptTable:
    """Tokenises the prompt of every row.

    A prompt of more than `prompt_length` tokens is dropped and counted, never cut. The tokenizer
    adds to a prompt what it does by default: a beginning-of-sequence token, or nothing; with `chat`
    it adds nothing, since the chat template writes all there is.

    Args:
        rows: of a data set.
        tokenizer: of the model.
        template: a format of `prompts.FORMATS` or a template over the columns.
        prompt_length: P.
        chat: put the prompt through the tokenizer's chat template.
        system: a system message, see `prompts.render`.
        examples: rows for the worked examples that a format shows, see `prompts.render`.

    Raises:
        ValueError: as `prompts.render`; a prompt has no tokens, or none fits.
    """
    prompts = _prompt_tokens(rows, tokenizer, template, chat, system, examples)
    return _prompt_table(prompts, _fits(prompts, 'prompt', prompt_length), prompt_length, tokenizer)


def tokenize_demonstrations(
    rows: Rows,
    tokenizer: 'PreTrainedTokenizerBase',
    *,
    template: str,
    completion_template: str,
    prompt_length: int,
    completion_length: int,
    chat: bool = False,
    system: str = '',
    examples: Rows = (),
) -> DemonstrationTable:
    """Like `tokenize_prompts`, with a completion that ends as a sampled one does.

    That is with the end-of-sequence token or, with `chat`, as the chat template ends what the
    assistant says (`prompts.turn_end`). Prompt and completion are tokenised apart, as they are in
    sampling. A row is dropped and counted where either is too long; the last token counts.

    Raises:
        ValueError: as `tokenize_prompts`, for either template, or no row fits both lengths.
    """
    rows = list(rows)  # read from disk once
    prompts = _prompt_tokens(rows, tokenizer, template, chat, system, examples)
    ending, end = turn_end(tokenizer) if chat else ('', tokenizer.eos_token_id)
    texts = [fill(completion_template, row) + ending for row in rows]
    completions = [[*tokens, end] for tokens in _encode(texts, tokenizer, special=False)]
    fits = _fits(prompts, 'prompt', prompt_length)
    fits &= _fits(completions, 'completion', completion_length)
    if not fits.any():
        raise ValueError(
            f'no row has both a prompt within prompt_length={prompt_length} tokens and a '
            f'completion within completion_length={completion_length}: raise one of them'
        )
    table = _prompt_table(prompts, fits, prompt_length, tokenizer)
    kept = [completions[row] for row in table.index]
    ends = np.array([len(tokens) for tokens in kept])
    mask = np.arange(completion_length) < ends[:, None]
    return DemonstrationTable(table, _pad(kept, completion_length, tokenizer), mask)


def _prompt_tokens(
    rows: Rows,
    tokenizer: 'PreTrainedTokenizerBase',
    template: str,
    chat: bool,
    system: str,
    examples: Rows,
) -> list[list[int]]:
    texts = render(
        template, list(rows), examples=examples, system=system, chat=tokenizer if chat else None
    )
    return _encode(texts, tokenizer, special=not chat)


def _encode(
    texts: list[str], tokenizer: 'PreTrainedTokenizerBase', *, special: bool
) -> list[list[int]]:
    if not texts:
        raise ValueError('the data set has no rows: choose another split or slice')
    encoded: list[list[int]] = []
    for start in range(0, len(texts), _AT_ONCE):
        part = texts[start : start + _AT_ONCE]
        encoded += tokenizer(part, add_special_tokens=special).input_ids
    return encoded


def _fits(sequences: list[list[int]], name: str, limit: int) -> np.ndarray:
    """bool[N], which sequences have at most `limit` tokens."""
    lengths = np.array([len(tokens) for tokens in sequences])
    if lengths.min() > limit:
        raise ValueError(
            f'all {len(lengths)} {name}s are longer than {name}_length={limit} tokens: raise it '
            f'(the shortest has {lengths.min()}, the longest {lengths.max()})'
        )
    return lengths <= limit


def _prompt_table(
    prompts: list[list[int]],
    fits: np.ndarray,
    prompt_length: int,
    tokenizer: 'PreTrainedTokenizerBase',
) -> PromptTable:
    length = np.array([len(tokens) for tokens in prompts], np.int32)
    if not length.all():
        raise ValueError(
            f'the prompt of row {length.argmin()} has no tokens: fill the row or the template'
        )
    index = np.flatnonzero(fits).astype(np.int32)
    tokens = _pad([prompts[row] for row in index], prompt_length, tokenizer)
    return PromptTable(tokens, length[index], index, dropped=len(prompts) - len(index))


def _pad(
    sequences: list[list[int]], length: int, tokenizer: 'PreTrainedTokenizerBase'
) -> np.ndarray:
    """i32[N, length], padded on the right."""
    pad = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    padded = np.full((len(sequences), length), pad, np.int32)
    for row, tokens in zip(padded, sequences, strict=True):
        row[: len(tokens)] = tokens
    return padded


# Batches


def batches(
    table: PromptTable | DemonstrationTable,
    batch_size: int,
    *,
    seed: int,
    name: str = 'batch_size',
) -> grain.MapDataset:
    """An endless random-access sequence whose element k is the batch of step k, in numpy.

    Batch k depends on the table, the seed and k alone. Each epoch holds every row once, in an order
    of its own. Batches run on across the end of an epoch: every batch is full and no remainder is
    dropped, but a batch across that end can hold a row twice. An error calls the batch `name`.

    Returns:
        Prompts for a table of prompts, Rollout with G = 1 and zero log-probs for demonstrations.

    Raises:
        ValueError: the batch is larger than the table, or the seed is negative.
    """
    size = len(_prompts(table).index)
    if not 1 <= batch_size <= size:
        raise ValueError(f'{name} is {batch_size}: make it 1 to {size}, the rows of the table')
    if seed < 0:
        raise ValueError(f'seed is {seed}: make it at least 0')
    # Grain shuffles epoch e by seed + e: the epochs of seed 1 would be those of seed 0, one later.
    spread = int(np.random.SeedSequence(seed).generate_state(1)[0])
    order = grain.MapDataset.range(size).shuffle(seed=spread).repeat().batch(batch_size)
    return order.map(lambda rows: _take(table, rows))


def in_order(table: PromptTable | DemonstrationTable, batch_size: int) -> Iterator[tuple[Any, int]]:
    """Yields (batch, its number of real rows), every row once and in order, as `batches` types it.

    The last batch is filled up to `batch_size` with copies of the last row, so that what consumes
    the batches compiles once.
    """
    size = len(_prompts(table).index)
    for start in range(0, size, batch_size):
        rows = np.arange(start, start + batch_size)
        yield _take(table, np.minimum(rows, size - 1)), min(batch_size, size - start)


def _prompts(table: PromptTable | DemonstrationTable) -> PromptTable:
    return table.prompts if isinstance(table, DemonstrationTable) else table


def _take(table: PromptTable | DemonstrationTable, rows: np.ndarray) -> Prompts | Rollout:
    source = _prompts(table)
    prompts = Prompts(source.tokens[rows], source.length[rows], source.index[rows])
    if isinstance(table, PromptTable):
        return prompts
    tokens, mask = table.tokens[rows, None], table.mask[rows, None]
    logprobs = np.zeros(tokens.shape, np.float32)
    return Rollout(prompts, tokens, mask, logprobs, ended=np.ones(tokens.shape[:2], bool))
