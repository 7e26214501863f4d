"""Prepare the files of a builder once, and open them as rows."""

import contextlib
import io
import os
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, overload

import filelock
import tensorflow_datasets as tfds
from absl import logging

from grpo_jax.data.datasets.records import Row
from grpo_jax.data.values import json_text, parse_json

_CHUNK = 1024  # rows that are read at a time


def encode_row(row: Row) -> dict[str, str]:
    """Return a row as it is prepared: each value as JSON."""
    return {name: json_text(value) for name, value in row.items()}


class PreparedRows(Sequence[Row]):
    """The rows of a TFDS data source of JSON. A row is read from disk when it is indexed."""

    def __init__(self, source: Any) -> None:
        self._source = source

    def __len__(self) -> int:
        return len(self._source)

    @overload
    def __getitem__(self, index: int) -> Row: ...

    @overload
    def __getitem__(self, index: slice) -> list[Row]: ...

    def __getitem__(self, index: int | slice) -> Row | list[Row]:
        if isinstance(index, slice):
            return [self[row] for row in range(*index.indices(len(self)))]
        if not 0 <= index < len(self):
            raise IndexError(f'row {index}: the data set has rows 0 to {len(self) - 1}')
        return _decoded(self._source[index])

    def __iter__(self) -> Iterator[Row]:
        for start in range(0, len(self), _CHUNK):  # a call for each row takes half as long again
            rows = range(start, min(start + _CHUNK, len(self)))
            yield from map(_decoded, self._source.__getitems__(rows))


def _decoded(row: Mapping[str, bytes]) -> Row:
    return {name: parse_json(text) for name, text in row.items()}


def prepare(
    builder_class: type[tfds.core.DatasetBuilder],
    config: tfds.core.BuilderConfig,
    cache_dir: str | os.PathLike[str],
) -> tfds.core.DatasetBuilder:
    """Return a builder whose files exist in `cache_dir`; write them unless they are there.

    Several processes may share `cache_dir`: one writes while the others wait.

    Args:
      builder_class: class of the builder.
      config: its options.
      cache_dir: folder of prepared data sets.

    Raises:
      ValueError: `cache_dir` cannot be written to, or the builder rejects its options or files.
    """
    folder = pathlib.Path(cache_dir).expanduser()
    with _quiet():
        builder = builder_class(config=config, data_dir=folder, file_format='array_record')
        # Without splits, another process finished it after this builder had looked.
        if not builder.is_prepared() or not builder.info.splits:
            # TFDS renames a finished folder into place, which fails if another process has written
            # the same data in the meantime. The lock lets one process write at a time.
            with _locked(folder):
                builder = builder_class(config=config, data_dir=folder, file_format='array_record')
                builder.download_and_prepare()
    return builder


def _locked(folder: pathlib.Path) -> filelock.BaseFileLock:
    lock = filelock.FileLock(folder / 'prepare.lock')
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except OSError as error:
        raise ValueError(
            f'cache_dir {folder}: {error.strerror}: name a folder that can be written to'
        ) from error
    return lock


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Suppress the output of TFDS and its warning about an unknown config."""
    verbosity = logging.get_verbosity()
    logging.set_verbosity(logging.ERROR)
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        logging.set_verbosity(verbosity)
