"""Deadlines of functions that run in this process.

Python cannot kill a thread. In the main thread a function is interrupted by a signal whose handler
raises: it ends Python code, regular expressions and waits such as `time.sleep`, but not code in C
that never looks for signals. Such a function ends the program, see `watchdog`, unless it is called
in another process, see `isolated`.
"""

import contextlib
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from types import FrameType
from typing import TypeVar

from grpo_jax.rewards.watchdog import exit_now, watched

T = TypeVar('T')

GRACE = 10  # seconds in which an interrupted function has to end
THREAD_NAME = 'reward function'
MAX_ABANDONED = 8  # threads that have not ended

# From a thread, to end a wait. It is ignored by default, so that a late one does nothing.
_SIGNAL = getattr(signal, 'SIGURG', None)
_TICK = 0.5  # seconds of processor time between signals to code that lets no thread run

_abandoned: list[threading.Thread] = []


class DeadlineExceeded(BaseException):
    """A function has not returned in time. No Exception, so that the function does not catch it."""


class CannotInterrupt(RuntimeError):
    """Too many functions go on after their deadline."""


def call_within(seconds: float, what: str, function: Callable[[], T]) -> T:
    """Call a function, and end it after its deadline.

    Args:
        seconds: the deadline; 0: none.
        what: is called, for error messages.
        function: without arguments.

    Raises:
        DeadlineExceeded: it did not return in time.
        CannotInterrupt: see `call_in_thread`.
    """
    if not seconds:
        with watched(what, 0):
            return function()
    if threading.current_thread() is threading.main_thread() and _SIGNAL is not None:
        with (
            watched(what, seconds + GRACE),
            _interrupted_after(seconds, what, _SIGNAL),
        ):
            return function()
    return call_in_thread(seconds, what, function)


def call_in_thread(seconds: float, what: str, function: Callable[[], T]) -> T:
    """Call a function in a new thread, which is abandoned after the deadline.

    Args:
        seconds: the deadline; 0: none.
        what: is called, for error messages.
        function: without arguments.

    Raises:
        DeadlineExceeded: it did not return in time.
        CannotInterrupt: more than `MAX_ABANDONED` threads go on after their deadlines.
    """
    result: Future[T] = Future()

    def run() -> None:
        try:
            value = function()
        except BaseException as error:
            result.set_exception(error)
        else:
            result.set_result(value)

    # The program ends without waiting for a daemon.
    thread = threading.Thread(target=run, name=THREAD_NAME, daemon=True)
    with watched(what, seconds and seconds + GRACE):
        thread.start()
        try:
            return result.result(seconds or None)
        except TimeoutError:
            if result.done():  # just now, or it raised this error itself
                return result.result()
    _abandoned[:] = [other for other in _abandoned if other.is_alive()] + [thread]
    if len(_abandoned) > MAX_ABANDONED:
        raise CannotInterrupt(
            f'{len(_abandoned)} calls go on after their deadlines, which cannot be ended in this '
            f'process (the last is {what}): call it with isolated=True'
        )
    raise DeadlineExceeded(message(seconds))


@contextlib.contextmanager
def _interrupted_after(seconds: float, what: str, number: signal.Signals) -> Iterator[None]:
    """Raise DeadlineExceeded in the block, which runs in the main thread, after its deadline.

    A block that does not end within `GRACE` seconds then ends the program.
    """
    active, ended, deadline = True, threading.Event(), time.monotonic() + seconds

    def interrupt(number: int, frame: FrameType | None) -> None:
        if active and time.monotonic() >= deadline:
            raise DeadlineExceeded(message(seconds))

    def watch(thread: int) -> None:
        if ended.wait(seconds):
            return
        for _ in range(GRACE):  # again and again, where the function catches it
            signal.pthread_kill(thread, number)
            if ended.wait(1):
                return
        text = (
            f'error: {what} did not return within its deadline of {seconds:g} s and cannot be '
            'interrupted, so the program ends without a checkpoint of the last steps: call it '
            'with isolated=True\n'
        )
        os.write(2, text.encode(errors='backslashreplace'))
        exit_now(2)

    numbers = (number, signal.SIGVTALRM)
    before = [signal.signal(each, interrupt) for each in numbers]
    signal.siginterrupt(signal.SIGVTALRM, False)  # other threads may receive it
    watcher = threading.Thread(target=watch, args=(threading.get_ident(),), daemon=True)
    try:
        try:
            # Code that holds Python's lock keeps the thread from running, but not this timer.
            signal.setitimer(signal.ITIMER_VIRTUAL, seconds, _TICK)
            watcher.start()
            yield
        finally:
            active = False
    finally:
        active = False  # the signal may have arrived just before the line above
        ended.set()
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        for each, handler in zip(numbers, before, strict=True):
            signal.signal(each, handler)
        if watcher.ident is not None:  # it was started, and ends at once
            watcher.join()


def message(seconds: float) -> str:
    """Return what is said of a function that took longer."""
    return f'it did not return within its deadline of {seconds:g} s'
