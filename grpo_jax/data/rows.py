"""Rows: open a data set, and select columns of its rows."""

import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Int


class MissingSplitError(ValueError):
    """The data set has no such split, or no file of it."""


class OptionError(ValueError):
    """The data set does not have some options, or their values are out of range.

    Attributes:
      messages: one for each option, by its name.
    """

    def __init__(self, messages: Mapping[str, str]) -> None:
        super().__init__('; '.join(messages.values()))
        self.messages = dict(messages)


Row = Mapping[str, Any]  # column -> value, see `values`
Rows = Sequence[Row]


def load(name: str, split: str, *, cache_dir: str | os.PathLike[str], **options: Any) -> Rows:
    """Open a data set as a random-access sequence of rows, each a dict of columns.

    A value has the type that it has in the file: text, a number, a boolean, None, a list or a dict.

    Two data sets are generated, each with splits train and test: 'arithmetic' and 'countdown'. All
    others are read from files below $GRPO_JAX_DATA_DIR whose names contain the split: the published
    'gsm8k', 'math', 'cmath', 'svamp', 'mawps', 'humaneval', 'mbpp', 'apps' and 'livecodebench'
    (see `datasets.sources`), and your own as 'jsonl' (`<split>.jsonl`, also `.gz` or `.json`),
    'parquet' (`<split>.parquet`, or in parts) and 'hf' (a folder written by
    `datasets.Dataset.save_to_disk`, or Parquet files). A path such as 'my_data:problems' names a
    function of your own, `(split, **options) -> rows`.

    Args:
      name: data set.
      split: train or test, for example. A TFDS slice may follow, as in 'test[:100]'.
      cache_dir: folder for prepared data sets, which are used again if options and files are the
        same.
      **options: for a generated data set, the fields of `datasets.ArithmeticConfig` or
        `datasets.CountdownConfig`. For one in files: `folder`, relative to $GRPO_JAX_DATA_DIR
        unless it is absolute; `file`, a pattern such as '{split}_v2.jsonl' or the name of one file
        with all rows; `columns`, a mapping from new column names to those in the file; `required`,
        the columns that must exist; and `heldout`, a fraction (0.1) or number (500) of the
        questions of train, which are moved from train to a split named heldout.

    Raises:
      OptionError: options that the data set does not have, or that are out of range.
      ValueError: the name or split is unknown, an option is out of range, a file is missing,
        malformed or lacks a column, or `cache_dir` cannot be written to.
    """
    from grpo_jax.data import datasets  # imports tensorflow_datasets, which is slow

    if ':' in name or '.' in name:
        from grpo_jax.data.own_rows import load_own

        return load_own(name, split, options)
    split_name, bracket, part = split.partition('[')
    builder_class, config, builder_split = datasets.resolve(name, split_name, options)
    builder = datasets.prepare(builder_class, config, cache_dir)
    splits = builder.info.splits
    if builder_split not in splits:
        raise MissingSplitError(
            f'{name} has no split {builder_split!r}: choose {" or ".join(splits)}'
        )
    return datasets.PreparedRows(builder.as_data_source(f'{builder_split}{bracket}{part}'))


def columns(
    rows: Rows, index: Sequence[int] | Int[np.ndarray, ' B'], repeats: int
) -> dict[str, list[Any]]:
    """Return the columns of selected rows, with each value repeated.

    With `repeats` = G, the values are in the order of a rollout's completions, as reward functions
    take them.

    Args:
      rows: rows of a data set.
      index: positions of B rows.
      repeats: how often each value occurs.

    Returns:
      For each column, a list of B * `repeats` values.
    """
    selected = [rows[int(position)] for position in index]
    return {name: [row[name] for row in selected for _ in range(repeats)] for name in selected[0]}
