"""Everything that is wrong with a config, in one error. Imports nothing that is slow."""

import errno
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

_NO_ROOM = (errno.ENOSPC, errno.EDQUOT)


class ConfigError(ValueError):
    """All problems that were found; the command prints a line for each.

    Attributes:
      problems: one message each.
    """

    def __init__(self, problems: Sequence[str]) -> None:
        self.problems = tuple(dict.fromkeys(problems))
        super().__init__('; '.join(self.problems))


def problems_of(error: Exception) -> tuple[str, ...]:
    """The messages of an error: several of a `ConfigError`, one of any other."""
    if isinstance(error, ConfigError):
        return error.problems
    if number := _no_room(error):
        return (
            f'{_file_of(error) or "a file"} cannot be written ({os.strerror(number)}): make room '
            'there, and give the same command again',
        )
    return (str(error),)


def is_disk_full(error: BaseException) -> bool:
    """Whether there was no room for a file."""
    return _no_room(error) != 0


def _no_room(error: BaseException) -> int:
    """The number of the system's error if there was no room, or 0."""
    if isinstance(error, OSError) and error.errno in _NO_ROOM:
        return error.errno
    # Libraries in C++ and Rust say it in the message of an error of any class.
    return next((number for number in _NO_ROOM if os.strerror(number) in str(error)), 0)


def _file_of(error: BaseException) -> str:
    """The file that an error names, or the first absolute path in its message; or empty."""
    if isinstance(error, OSError) and error.filename is not None:
        return os.fsdecode(error.filename)
    found = re.search(r'"(/[^"]+)"', str(error)) or re.search(r'(?:^| )(/[^\s;:,"]+)', str(error))
    return found[1] if found else ''


@contextmanager
def naming_file(path: str | os.PathLike[str]) -> Iterator[None]:
    """Names a file in errors of writing in the block that name none.

    Raises:
      OSError: in place of an error of another class, if there was no room.
    """
    try:
        yield
    except Exception as error:
        number = _no_room(error) or getattr(error, 'errno', None)
        if _file_of(error) or not number:
            raise
        raise OSError(number, os.strerror(number), os.fspath(path)) from error


@contextmanager
def reading(path: str | os.PathLike[str], remedy: str) -> Iterator[None]:
    """Names a file whose content the code of the block cannot use.

    Args:
      path: of the file.
      remedy: what to do.

    Raises:
      ValueError: in place of what reading JSON, or using it as if it were right, raises.
    """
    try:
        yield
    except (AttributeError, LookupError, RecursionError, TypeError, ValueError) as error:
        what = f'no {error}' if isinstance(error, KeyError) else error
        raise ValueError(f'{os.fspath(path)} cannot be read ({what}): {remedy}') from error


@contextmanager
def renamed(names: Mapping[str, str]) -> Iterator[None]:
    """Gives what the message of a ValueError in the block names the names that it has in a config.

    Args:
      names: {text in the message: text in its place}.
    """
    try:
        yield
    except ValueError as error:
        text = str(error)
        for name, other in names.items():
            text = re.sub(rf'(?<![\w.]){re.escape(name)}', other, text)
        if text == str(error):
            raise
        raise ValueError(text) from error


@contextmanager
def naming(key: str) -> Iterator[None]:
    """Adds a key of the config to the message of a ValueError in the block that does not name it.

    Args:
      key: the path of the key, or `path=value`.
    """
    try:
        yield
    except ValueError as error:
        if key.partition('=')[0] in str(error):
            raise
        raise ValueError(f'{error} ({key})') from error


@contextmanager
def caught(problems: list[str]) -> Iterator[None]:
    """Adds the messages of a ValueError or OSError in the block to `problems`."""
    try:
        yield
    except (ValueError, OSError) as error:
        problems.extend(problems_of(error))
