"""Undoes what a reward function does to this process."""

import contextlib
import json
import logging
import os
import threading
from collections.abc import Iterator
from typing import Any, NoReturn

from grpo_jax.rewards.deadlines import THREAD_NAME
from grpo_jax.rewards.output import bounded_output

log = logging.getLogger('grpo_jax')

_warned: set[str] = set()
_exit_now: Any = os._exit


@contextlib.contextmanager
def guarded(what: str) -> Iterator[None]:
    """Restore the working directory and the module `json` after the block, with a warning.

    What is printed is bounded, see `output`. `os._exit` raises SystemExit in the thread of the
    block and in those of `deadlines`, so that the program does not end as if it had finished.

    Args:
        what: runs in the block, for messages.
    """
    folder = _working_directory()
    functions = {name: getattr(json, name) for name in json.__all__}
    process, thread = os.getpid(), threading.get_ident()

    def leave(status: int = 0) -> NoReturn:
        here = threading.current_thread()
        if os.getpid() == process and (here.ident == thread or here.name == THREAD_NAME):
            raise SystemExit(status)
        _exit_now(status)
        raise AssertionError  # never reached

    with bounded_output(what):
        os._exit = leave
        try:
            yield
        finally:
            os._exit = _exit_now
            replaced = [name for name, f in functions.items() if getattr(json, name, None) is not f]
            for name in replaced:
                setattr(json, name, functions[name])
            if replaced:
                _warn(f'{what} replaced json.{replaced[0]}, which is restored')
            if folder is not None and _working_directory() != folder:
                os.chdir(folder)
                _warn(f'{what} changed the working directory, which is restored to {folder}')


def _working_directory() -> str | None:
    try:
        return os.getcwd()
    except OSError:  # it has been deleted
        return None


def _warn(message: str) -> None:
    """Log a message the first time."""
    if message not in _warned:
        _warned.add(message)
        log.warning('%s', message)
