"""What goes wrong in an environment, as an outcome of one turn."""

import contextlib
from collections.abc import Iterator

from grpo_jax.environments.turns import one_line
from grpo_jax.plugins import place_of
from grpo_jax.rewards.deadlines import DeadlineExceeded
from grpo_jax.rewards.output import printable


class Failure(Exception):
    """An environment failed.

    Attributes:
        outcome: of `turns.OUTCOMES`.
        text: what the model may be told.
        detail: one line for logs.
    """

    def __init__(self, outcome: str, text: str, place: str = '') -> None:
        super().__init__(text)
        self.outcome, self.text = outcome, one_line(printable(text))
        self.detail = f'{self.text}{place}'


@contextlib.contextmanager
def failures() -> Iterator[None]:
    """Turn whatever the user's code raises in the block into a `Failure`."""
    try:
        yield
    except Failure:
        raise
    except DeadlineExceeded as error:
        raise Failure('timeout', str(error)) from error
    except BaseException as error:  # with SystemExit and KeyboardInterrupt, in a thread
        text = f'{type(error).__name__}: {_message(error)}'.removesuffix(': ')
        raise Failure('error', text, place_of(error)) from None


def _message(error: BaseException) -> str:
    try:
        return str(error)
    except BaseException as another:
        return f'(its message cannot be made: {type(another).__name__})'
