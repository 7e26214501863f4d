"""Undoes what a reward function does to this process."""

import contextlib
import json
import logging
import os
import threading
from collections.abc import Callable, Iterator
from typing import Any, NoReturn, TypeAlias

from grpo_jax.rewards.deadlines import THREAD_NAME
from grpo_jax.rewards.output import bounded_output

Exits: TypeAlias = Callable[[threading.Thread], bool]

log = logging.getLogger('grpo_jax')

_warned: set[str] = set()
_exit_now: Any = os._exit
_exits: list[Exits] = []  # of the blocks that run
_lock = threading.Lock()


@contextlib.contextmanager
def guarded(what: str) -> Iterator[None]:
    """Restore the working directory and the module `json` after the block, with a warning.

    What is printed is bounded, see `output`. `os._exit` raises SystemExit in the thread of the
    block and in those of `deadlines`, so that the program does not end as if it had finished.

    Args:
        what: runs in the block, for messages.
    """
    thread = threading.get_ident()

    def here(current: threading.Thread) -> bool:
        return current.ident == thread or current.name == THREAD_NAME

    with bounded_output(what), restored(what, here):
        yield


@contextlib.contextmanager
def restored(what: str, exits: Exits) -> Iterator[None]:
    """Restore the working directory, the module `json` and `os._exit` after the block.

    Args:
        what: runs in the block, for the warning.
        exits: whether `os._exit` in a thread raises SystemExit, in the block.
    """
    folder, process = _working_directory(), os.getpid()
    functions = {name: getattr(json, name) for name in json.__all__}

    def leave(status: int = 0) -> NoReturn:
        current = threading.current_thread()
        if os.getpid() == process and any(raises(current) for raises in list(_exits)):
            raise SystemExit(status)
        _exit_now(status)
        raise AssertionError  # never reached

    with _lock:
        _exits.append(exits)
        os._exit = leave
    try:
        yield
    finally:
        with _lock:
            _exits.remove(exits)
            if not _exits:
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
