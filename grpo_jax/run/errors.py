"""Everything that is wrong with a config, in one error. Imports nothing that is slow."""

from collections.abc import Iterator, Sequence
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
def caught(problems: list[str]) -> Iterator[None]:
    """Adds the messages of a ValueError or OSError in the block to `problems`."""
    try:
        yield
    except (ValueError, OSError) as error:
        problems.extend(problems_of(error))
