"""From rows of text to batches of tokens.

Rows come from a TFDS builder (`load`), are tokenised once into a table in memory
(`tokenize_prompts`, `tokenize_demonstrations`) and served by `batches`, where batch k is a pure
function of the seed and k: there is no iterator whose state could be lost.
"""

import dataclasses
import os
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import grain
import numpy as np

from grpo_jax.types import Prompts, Rollout

if TYPE_CHECKING:  # importing transformers takes a second or two, so it waits until it is needed
    from transformers import PreTrainedTokenizerBase

Rows = Sequence[Mapping[str, str]]


class PromptTable(NamedTuple):
    """The N tokenised prompts of a data set that fit in P tokens, padded on the right."""

    tokens: np.ndarray  # i32[N, P]
    length: np.ndarray  # i32[N], at least 1
    index: np.ndarray  # type: ignore[assignment]  # i32[N], row in the data set
    dropped: int  # rows left out because they are too long


class DemonstrationTable(NamedTuple):
    """Prompts with one completion each, padded on the right to T tokens."""

    prompts: PromptTable  # `dropped` counts the rows whose prompt or completion is too long
    tokens: np.ndarray  # i32[N, T]
    mask: np.ndarray  # bool[N, T], true up to and including the end-of-sequence token


# Rows of text


def load(name: str, split: str, *, cache_dir: str | os.PathLike[str], **options: Any) -> Rows:
    """Opens a data set as a random-access sequence of rows, each a dict of text columns.

    Args:
        name: 'arithmetic', 'gsm8k' or 'jsonl'.
        split: for 'arithmetic' train or test; for the others the file `<split>.jsonl`. A TFDS slice
            may follow, as in 'test[:100]'.
        cache_dir: where data sets are prepared, and used again if options and file are the same.
        **options: for 'arithmetic' those of `datasets.ArithmeticConfig`; for 'jsonl' `folder`,
            which is relative to $GRPO_JAX_DATA_DIR unless it is absolute, and `required`, the
            columns that must exist. 'gsm8k' sets both of these.

    Raises:
        ValueError: the name or split is unknown, an option is out of range, a file is absent,
            malformed or lacks a column, or `cache_dir` cannot be written to.
    """
    from grpo_jax import datasets

    stem, bracket, part = split.partition('[')
    if name == 'arithmetic':
        config = _options(datasets.ArithmeticConfig, name, options)
        builder = datasets.prepare(datasets.Arithmetic, config, cache_dir)
    elif name in ('gsm8k', 'jsonl'):
        if name == 'gsm8k':
            options = {'folder': 'gsm8k', 'required': ('question', 'answer'), **options}
        path = _data_file(options.pop('folder', ''), f'{stem}.jsonl')
        config = _options(datasets.JsonlConfig, name, {**options, 'path': path})
        builder = datasets.prepare(datasets.Jsonl, config, cache_dir)
        stem = 'rows'
    else:
        raise ValueError(f'unknown data set {name!r}: choose arithmetic, gsm8k or jsonl')
    if stem not in builder.info.splits:
        raise ValueError(f'{name} has no split {stem!r}: choose {" or ".join(builder.info.splits)}')
    return datasets.TextRows(builder.as_data_source(f'{stem}{bracket}{part}'))


def _options(cls: Any, name: str, options: Mapping[str, Any]) -> Any:
    """A builder's config; an option that it does not have is an error that lists those it has."""
    known = [field.name for field in dataclasses.fields(cls) if field.init and field.kw_only]
    for option in options:
        if option not in known:
            raise ValueError(f'{name} has no option {option!r}: it has {", ".join(known)}')
    return cls(**options)


def _data_file(folder: str | os.PathLike[str], file: str) -> pathlib.Path:
    root = os.environ.get('GRPO_JAX_DATA_DIR', '')
    path = pathlib.Path(root, folder, file)
    if path.is_file():
        return path
    if not root and not path.is_absolute():
        raise ValueError(f'GRPO_JAX_DATA_DIR is not set: let it name the folder that holds {path}')
    raise ValueError(
        f'{path}: no such file: put it there, or let GRPO_JAX_DATA_DIR (now {root!r}) name the '
        f'folder that holds {pathlib.Path(folder, file)}'
    )


def columns(rows: Rows, index: Sequence[int] | np.ndarray, repeats: int) -> dict[str, list[str]]:
    """The columns of the rows `index` i32[B], each value `repeats` times: lists of B * repeats.

    With `repeats` = G this is the order of a rollout's completions, as reward functions take them.
    """
    chosen = [rows[int(row)] for row in index]
    return {name: [row[name] for row in chosen for _ in range(repeats)] for name in chosen[0]}


# Tables of tokens


def tokenize_prompts(
    rows: Rows, tokenizer: 'PreTrainedTokenizerBase', *, template: str, prompt_length: int
) -> PromptTable:
    """Tokenises `template.format(**row)` for every row.

    A prompt of more than `prompt_length` tokens is dropped and counted, never cut. The tokenizer
    adds to a prompt what it does by default: a beginning-of-sequence token, or nothing.

    Raises:
        ValueError: the template does not fit the columns, a prompt has no tokens, or none fits.
    """
    prompts = _encode(rows, template, tokenizer, special=True)
    return _prompt_table(prompts, _fits(prompts, 'prompt', prompt_length), prompt_length, tokenizer)


def tokenize_demonstrations(
    rows: Rows,
    tokenizer: 'PreTrainedTokenizerBase',
    *,
    template: str,
    completion_template: str,
    prompt_length: int,
    completion_length: int,
) -> DemonstrationTable:
    """Like `tokenize_prompts`, with a completion that ends with the end-of-sequence token.

    Prompt and completion are tokenised apart, as they are in sampling. A row is dropped and counted
    where either is too long; the end-of-sequence token counts.

    Raises:
        ValueError: as `tokenize_prompts`, for either template, or no row fits both lengths.
    """
    rows = list(rows)  # read from disk once
    prompts = _encode(rows, template, tokenizer, special=True)
    completions = _encode(rows, completion_template, tokenizer, special=False)
    completions = [[*tokens, tokenizer.eos_token_id] for tokens in completions]
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


def _encode(
    rows: Rows, template: str, tokenizer: 'PreTrainedTokenizerBase', *, special: bool
) -> list[list[int]]:
    texts = [_render(template, row) for row in rows]
    if not texts:
        raise ValueError('the data set has no rows: choose another split or slice')
    return tokenizer(texts, add_special_tokens=special, return_attention_mask=False)['input_ids']


def _render(template: str, row: Mapping[str, str]) -> str:
    try:
        return template.format_map(row)
    except (KeyError, IndexError, AttributeError, ValueError) as error:
        names = ', '.join(f'{{{name}}}' for name in row)
        raise ValueError(
            f'template {template!r} does not fit the data ({type(error).__name__}: {error}): the '
            f'columns are {names}; write a literal brace twice'
        ) from error


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
    table: PromptTable | DemonstrationTable, batch_size: int, *, seed: int
) -> grain.MapDataset:
    """An endless random-access sequence whose element k is the batch of step k, in numpy.

    Batch k depends on the table, the seed and k alone. Each epoch holds every row once, in an order
    of its own. Batches run on across the end of an epoch: every batch is full and no remainder is
    dropped, but a batch across that end can hold a row twice.

    Returns:
        Prompts for a table of prompts, Rollout with G = 1 and zero log-probs for demonstrations.

    Raises:
        ValueError: the batch is larger than the table, or the seed is negative.
    """
    size = len(_prompts(table).index)
    if not 1 <= batch_size <= size:
        raise ValueError(f'batch_size is {batch_size}: make it 1 to {size}, the rows of the table')
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
