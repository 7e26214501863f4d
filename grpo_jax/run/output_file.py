"""A file or folder that a command writes: whole, or as it was before."""

import os
import pathlib
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TextIO

from grpo_jax.run.errors import naming_file


@contextmanager
def replaced(path: pathlib.Path) -> Iterator[TextIO]:
    """Opens a file to write, which replaces the one at `path` when the block ends without an error.

    It is opened at once, so that a file that cannot be written fails before the work.

    Raises:
      ValueError: the path is a folder.
      OSError: the file cannot be written.
    """
    path = path.resolve()  # a link stays one
    if path.is_dir():
        raise ValueError(f'--output={path} is a folder: name a file')
    if path.exists() and not path.is_file():  # a device or pipe, which cannot be replaced
        with naming_file(path), path.open('w', encoding='utf-8', errors='backslashreplace') as file:
            yield file
        return
    if path.exists() and not os.access(path, os.W_OK):
        raise PermissionError(f'--output={path} is write-protected: name another file')
    with _scratch_folder(path) as scratch:
        partial = scratch / path.name
        with (
            naming_file(path),
            partial.open('w', encoding='utf-8', errors='backslashreplace') as file,
        ):
            yield file
        os.replace(partial, path)


@contextmanager
def new_folder(target: pathlib.Path) -> Iterator[pathlib.Path]:
    """Makes a folder, which is moved to `target` when the block ends without an error.

    Args:
      target: a folder that does not exist, or is empty.
    """
    target = target.resolve()
    target.parent.mkdir(parents=True, exist_ok=True)
    with _scratch_folder(target) as scratch:
        folder = scratch / target.name
        folder.mkdir()
        with naming_file(target):
            yield folder
        if target.exists():
            target.rmdir()
        folder.rename(target)


@contextmanager
def _scratch_folder(path: pathlib.Path) -> Iterator[pathlib.Path]:
    """Makes a folder beside `path` under a name of its own, and removes it."""
    if not path.parent.is_dir():
        raise FileNotFoundError(f'{path}: there is no folder {path.parent}')
    scratch = pathlib.Path(tempfile.mkdtemp(prefix=f'.{path.name}.', dir=path.parent))
    try:
        yield scratch
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
