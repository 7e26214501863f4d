r"""Files of JSON objects, one in each line, of which a kill can tear the last one.

Lines end with '\n' alone: a text may hold any other character, such as U+0085 or U+2028, at which
`str.splitlines` splits too. A line without its end was being written when the process was killed.
"""

import contextlib
import errno
import io
import json
import os
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from grpo_jax.run.errors import naming_file


class Line(NamedTuple):
    """A line of a file, and what it holds."""

    text: bytes  # with the '\n' at its end
    row: dict[str, Any]
    number: int  # in the file, from 1


def read(path: pathlib.Path) -> Iterator[Line]:
    """Yields the lines of a file, but not a torn last one.

    Raises:
      ValueError: a line is not a JSON object; names the file and the line.
    """
    with path.open('rb') as file:
        for number, text in enumerate(file, 1):
            if not text.endswith(b'\n'):
                return
            try:
                row = json.loads(text)
                if not isinstance(row, dict):
                    raise ValueError(f'a {type(row).__name__}')
            except (ValueError, RecursionError) as error:
                raise unreadable(path, number, f'is not a JSON object ({error})') from error
            yield Line(text, row, number)


def unreadable(path: pathlib.Path, number: int, why: str) -> ValueError:
    """The error about a line that is not what a file should hold."""
    return ValueError(f'{path}, line {number} {why}: restore the line, or remove it')


def line(row: Mapping[str, Any]) -> str:
    """The line of a row of JSON types."""
    return json.dumps(row, ensure_ascii=False) + '\n'


class Appender:
    """Appends to a file. Each text is handed to the operating system at once, whole or not at all.

    Args:
      path: of the file, which is made if there is none.

    Raises:
      OSError: the file cannot be written; names it.
    """

    def __init__(self, path: pathlib.Path) -> None:
        self.path = path
        self._file = io.FileIO(path, 'a')

    def write(self, text: str) -> None:
        """Appends a text; what UTF-8 cannot encode becomes an escape of JSON."""
        left = memoryview(text.encode('utf-8', 'backslashreplace'))
        before = os.fstat(self._file.fileno()).st_size
        try:
            with naming_file(self.path):
                while left:
                    left = left[self._file.write(left) :]
        except OSError:
            with contextlib.suppress(OSError):  # a device has no length
                os.ftruncate(self._file.fileno(), before)
            raise

    def sync(self) -> None:
        """Waits until what has been written would survive the machine."""
        try:
            with naming_file(self.path):
                os.fsync(self._file.fileno())
        except OSError as error:
            if error.errno != errno.EINVAL:  # of what is no file, such as a pipe
                raise

    def close(self) -> None:
        self._file.close()
