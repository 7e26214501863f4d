"""Prepares the files of a builder once and opens them as rows of text."""

import contextlib
import io
import os
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import filelock
import tensorflow_datasets as tfds
from absl import logging


class TextRows(Sequence[dict[str, str]]):
    """A TFDS data source of byte strings as a sequence of rows of text, read when indexed."""

    def __init__(self, source: Sequence[Mapping[str, bytes]]) -> None:
        self._source = source

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, row: Any) -> Any:
        if not 0 <= row < len(self):
            raise IndexError(f'row {row}: the data set has rows 0 to {len(self) - 1}')
        return {name: text.decode() for name, text in self._source[row].items()}


def prepare(
    builder_class: type[tfds.core.DatasetBuilder],
    config: tfds.core.BuilderConfig,
    cache_dir: str | os.PathLike[str],
) -> tfds.core.DatasetBuilder:
    """Returns a builder whose files lie in `cache_dir`, where they are used again if they exist.

    Processes may share `cache_dir`: one of them writes while the others wait.

    Raises:
        ValueError: `cache_dir` cannot be written to, or the builder rejects its options or files.
    """
    folder = pathlib.Path(cache_dir).expanduser()
    with _quiet():
        builder = builder_class(config=config, data_dir=folder, file_format='array_record')
        if not builder.is_prepared():
            # TFDS renames a finished folder into place, but a second process that has written the
            # same data meanwhile fails at that, so only one may write at a time.
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
    """Keeps TFDS from printing, and from warning that it does not list the config beforehand."""
    verbosity = logging.get_verbosity()
    logging.set_verbosity(logging.ERROR)
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        logging.set_verbosity(verbosity)
