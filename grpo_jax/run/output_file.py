"""A file that a command writes: whole, or as it was before."""

import os
import pathlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TextIO


@contextmanager
def replaced(path: pathlib.Path) -> Iterator[TextIO]:
    """Opens a file to write, which replaces the one at `path` when the block ends without an error.

    It is opened at once, so that a file that cannot be written fails before the work.

    Raises:
      ValueError: the path is a folder.
      OSError: the file cannot be written.
    """
    if path.is_dir():
        raise ValueError(f'--output={path} is a folder: name a file')
    partial = path.with_name(path.name + '.partial')
    try:
        with partial.open('w', encoding='utf-8', errors='backslashreplace') as file:
            yield file
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
