"""Which process this is, and JAX's client of the coordination service."""

from typing import Any

WAIT = 1800  # seconds that processes wait for one that is running, such as a slow reward function


class ProcessesError(ValueError):
    """The processes of a run do not fit together, or one of them is missing."""


def count() -> int:
    """The number of processes."""
    return _distributed().num_processes


def index() -> int:
    """The number of this process, from 0."""
    return _distributed().process_id


def is_first() -> bool:
    """Whether this is the process that writes records and prints."""
    return index() == 0


def say(text: str) -> None:
    """Prints in the first process."""
    if is_first():
        print(text, flush=count() > 1)


def client() -> Any:
    """JAX's client of the coordination service."""
    return _distributed().client


def late(processes: list[int], what: str) -> str:
    """A message about processes that did not come."""
    named = ', '.join(map(str, processes))
    return f'process {named} did not come to {what} within {WAIT} s: look at its output'


def _distributed() -> Any:
    """JAX's state of the distributed runtime; unlike `jax.process_count` it starts no device."""
    from jax._src import distributed

    return distributed.global_state
