"""Signals that stop a run: what has been computed is saved first.

SIGINT (Ctrl-C), SIGTERM (a scheduler, or a machine that is about to be preempted) and SIGHUP (a
terminal that was closed) drop the step in flight, and the newest finished one is saved. Several
processes stop after the same step, see `hosts.stop_requested`. A second signal ends at once.
"""

import contextlib
import dataclasses
import os
import signal
import threading
from collections.abc import Iterator
from typing import Any

from grpo_jax.rewards import watchdog
from grpo_jax.run import hosts

_NUMBERS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@dataclasses.dataclass
class _State:
    active: bool = False  # whether the handlers are installed
    received: int = 0  # the first signal
    raised: bool = False  # whether it has been raised
    delays: int = 0  # blocks of `delayed` that have been entered


_state = _State()


@contextlib.contextmanager
def handled() -> Iterator[None]:
    """Raises `hosts.Stopped` in the block at the first signal; a second one ends the process.

    Signals that the process ignores, as under `nohup`, and those that have a handler of the user's
    own stay as they are. So do all outside of the main thread, and in a block within this one.
    """
    if _state.active or threading.current_thread() is not threading.main_thread():
        yield
        return
    ours = (signal.SIG_DFL, signal.default_int_handler)
    before = {number: signal.getsignal(number) for number in _NUMBERS}
    before = {number: handler for number, handler in before.items() if handler in ours}
    _state.active = True
    try:
        for number in before:
            signal.signal(number, _handle)
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        vars(_state).update(vars(_State()))


def _handle(number: int, _: Any) -> None:
    name = signal.Signals(number).name
    if _state.received:
        os.write(2, f'{name}: ended at once\n'.encode())
        watchdog.exit_now(128 + number)
    _state.received = number
    what = 'ends all processes after this step' if hosts.count() > 1 else 'drops this step'
    os.write(2, f'{name}: {what} and saves the last; a second signal ends at once\n'.encode())
    if hosts.count() > 1:
        hosts.request_stop(number)
    elif not _state.delays:
        _raise()


def _raise() -> None:
    _state.raised = True
    raise hosts.Stopped(_state.received)


@contextlib.contextmanager
def delayed() -> Iterator[None]:
    """Delays the end of one process by a signal until the block has ended."""
    _state.delays += 1
    try:
        yield
    finally:
        _state.delays -= 1
    if _state.received and not (_state.raised or _state.delays) and hosts.count() == 1:
        _raise()


def check() -> None:
    """Raises what a signal has raised before, if other code has caught it."""
    if _state.received and hosts.count() == 1:
        _raise()
