"""Kills this process where a function has left it unable to go on, and says which function it was.

A process beside this one watches, since no thread can: C code may hold Python's lock for ever, a
crash ends all threads, and without file descriptors nothing can be written.
"""

import atexit
import contextlib
import itertools
import os
import pathlib
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any, NoReturn

from grpo_jax.rewards.output import printable

_SCRIPT = pathlib.Path(__file__).with_name('watchdog_process.py')
SILENCE = 5.0  # seconds without a sign of life after which no thread of this process can run
_BEAT = 1.0  # seconds between these signs
_LONGEST = 300  # characters of a text, so that a line is written at once or not at all
_KILLED_WITHIN = 10  # seconds, after the descriptors have been closed
_exit_now: Any = os._exit  # reward functions may replace it

_numbers = itertools.count()
_lock = threading.Lock()
_process: '_Process | None' = None


class _Process:
    """The process that watches this one; it ends when this one does."""

    def __init__(self) -> None:
        self._child = subprocess.Popen(
            [sys.executable, '-I', '-S', str(_SCRIPT), str(os.getpid()), str(SILENCE)],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            bufsize=0,
            start_new_session=True,  # an interrupt from the keyboard does not reach it
        )
        assert self._child.stdin
        self._pipe = self._child.stdin
        os.set_blocking(self._pipe.fileno(), False)  # it may be suspended, and not read
        self._identity = self._found()
        self._ended = threading.Event()
        threading.Thread(target=self._beat, name='watchdog', daemon=True).start()
        atexit.register(self.end)

    def send(self, line: str) -> bool:
        """Write a line, or nothing if the pipe is full; return False if the process has ended."""
        try:
            self._pipe.write(line.encode() + b'\n')
        except (OSError, ValueError):
            return False
        return True

    def has_pipe(self) -> bool:
        """Return whether the descriptor is still that of the pipe, and no other file's."""
        return self._found() == self._identity

    def end(self) -> None:
        """End the process, which has nothing to watch any more."""
        self._ended.set()
        atexit.unregister(self.end)
        if self.has_pipe():
            self.send('quit')
            self._pipe.close()
            self._child.wait()

    def _beat(self) -> None:
        while not self._ended.wait(_BEAT) and self.has_pipe():
            self.send('alive')

    def _found(self) -> tuple[int, int] | None:
        try:
            status = os.fstat(self._pipe.fileno())
        except (OSError, ValueError):
            return None
        return status.st_dev, status.st_ino


def begin(what: str, seconds: float, remedy: str) -> int:
    """Have this process killed, with a line on standard error, if a call lets nothing else run.

    That is where the call takes longer than `seconds` and no other thread runs, or has closed the
    descriptors of the process. A line is written too where the process ends during the call.

    Args:
        what: is called, for the line.
        seconds: after which the process may be killed; 0: never.
        remedy: what to do, for the line.

    Returns:
        The number of the call, for `end`.
    """
    global _process
    number = next(_numbers)
    shown = '\t'.join(' '.join(printable(text[:_LONGEST]).split()) for text in (remedy, what))
    with _lock:
        if _process is None or not _process.send(f'begin {number} {seconds} {shown}'):
            _process = _Process()  # the one before has been killed
            _process.send(f'begin {number} {seconds} {shown}')
    return number


def end(number: int) -> None:
    """Take note that a call is over, or that its thread was left behind."""
    with _lock:
        if _process is None:
            return
        if not _process.has_pipe():
            time.sleep(_KILLED_WITHIN)  # the other process has seen that the pipe is closed
            _exit_now(2)
        _process.send(f'end {number}')


@contextlib.contextmanager
def watched(what: str, seconds: float) -> Iterator[None]:
    """Watch a call of a function that can be isolated, in the block; see `begin`."""
    number = begin(what, seconds, 'call it with isolated=True')
    try:
        yield
    finally:
        end(number)


def exit_now(status: int) -> NoReturn:
    """End this process at once, as `os._exit` does, without a line about the calls that go on."""
    if _process is not None:
        _process.send('quit')
    _exit_now(status)
    raise AssertionError  # never reached


def _forget_after_fork() -> None:
    """A forked child has no process that watches it."""
    global _process, _lock
    if _process is not None:
        atexit.unregister(_process.end)
    _process, _lock = None, threading.Lock()


os.register_at_fork(after_in_child=_forget_after_fork)
