"""Everything that is wrong with a config, in one error. Imports nothing that is slow."""

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager


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
    return error.problems if isinstance(error, ConfigError) else (str(error),)


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
