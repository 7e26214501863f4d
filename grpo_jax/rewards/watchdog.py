"""Kills this process where a function has left it unable to go on, and says which function it was.

A process beside this one watches, since no thread can: C code may hold Python's lock for ever, a
crash ends all threads, and without file descriptors nothing can be written. It is told when calls
begin and end, and once a second that Python runs.
"""

import atexit
import contextlib
import fcntl
import itertools
import logging
import os
import pathlib
import select
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any, NoReturn

from grpo_jax.rewards.output import printable

SILENCE = 5.0  # seconds without a sign of life after which no thread of this process can run
_BEAT = 1.0  # seconds between these signs
_SCRIPT = pathlib.Path(__file__).with_name('watchdog_process.py')
_LONGEST = 300  # characters of a name, so that a line is written at once or not at all
_KILLED_WITHIN = 10  # seconds, after the descriptors have been closed
_MOST_FAILURES = 3  # watching processes that ended too soon, after which there is none
_UNREAD = 'the process that watches has ended, or does not read'
_exit_now: Any = os._exit  # reward functions may replace it

log = logging.getLogger('grpo_jax')

_numbers = itertools.count()
_lock = threading.RLock()  # a signal may arrive while it is held
_process: '_Process | None' = None
_failures = 0


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
        # Not the number of a standard stream, which may be free.
        self._pipe = fcntl.fcntl(self._child.stdin.fileno(), fcntl.F_DUPFD_CLOEXEC, 3)
        self._child.stdin.close()
        os.set_blocking(self._pipe, False)  # it may be suspended, and not read
        self._identity = self._found()
        self._ended = threading.Event()
        threading.Thread(target=self._beat, name='watchdog', daemon=True).start()

    def send(self, line: str, seconds: float = 2.0) -> bool:
        """Write a line; return False if nothing reads it within so many seconds."""
        if not self.has_pipe():
            return False
        data = line.encode() + b'\n'
        try:
            try:
                return os.write(self._pipe, data) == len(data)
            except BlockingIOError:  # it starts, or is suspended
                select.select([], [self._pipe], [], seconds)
                return os.write(self._pipe, data) == len(data)
        except OSError:
            return False

    def has_pipe(self) -> bool:
        """Return whether the descriptor is still that of the pipe, and no other file's."""
        return self._found() == self._identity

    def end(self) -> None:
        """End the process at once."""
        self._ended.set()
        if self.has_pipe():
            os.close(self._pipe)
        self._child.kill()
        self._child.wait()

    def _beat(self) -> None:
        while not self._ended.wait(_BEAT):
            with _lock:
                if self is _process and not self.send('alive') and self.has_pipe():
                    _give_up(_UNREAD)

    def _found(self) -> tuple[int, int] | None:
        try:
            status = os.fstat(self._pipe)
        except OSError:
            return None
        return status.st_dev, status.st_ino


def begin(what: str, seconds: float) -> int:
    """Have this process killed, with a line on standard error, if a call lets nothing else run.

    That is where the call takes longer than `seconds` and no other thread runs, or has closed the
    descriptors of the process. A line is written too where the process ends during the call. Where
    no process can be started that watches, calls are not watched, with a warning.

    Args:
        what: is called, for the line.
        seconds: after which the process may be killed; 0: never.

    Returns:
        The number of the call, for `end`.
    """
    number = next(_numbers)
    _begin(number, f'call-{number}', what, seconds)
    return number


def end(number: int) -> None:
    """Take note that a call is over, or that its thread was left behind."""
    _end_calls(number, f'call-{number}')


def _end_calls(number: int, owner: str) -> None:
    """End a call, and those of its owner that began after it."""
    with _lock:
        if _process is None:
            return
        if not _process.has_pipe():
            time.sleep(_KILLED_WITHIN)  # the other process has seen that the pipe is closed
            _exit_now(2)
        if not _process.send(f'end {number} {owner}'):
            _give_up(_UNREAD)


@contextlib.contextmanager
def watched(what: str, seconds: float) -> Iterator[None]:
    """Watch a call in the block; see `begin`."""
    number, owner = next(_numbers), f'thread-{threading.get_ident()}'
    try:
        _begin(number, owner, what, seconds)
        yield
    finally:  # also calls within this one that were interrupted by its deadline
        _end_calls(number, owner)


def exit_now(status: int) -> NoReturn:
    """End this process at once, as `os._exit` does, without a line about the calls that go on."""
    if _process is not None:
        _process.send('quit', seconds=0)
    _exit_now(status)
    raise AssertionError  # never reached


def _begin(number: int, owner: str, what: str, seconds: float) -> None:
    line = f'begin {number} {owner} {seconds} {" ".join(printable(what[:_LONGEST]).split())}'
    with _lock:
        while _failures < _MOST_FAILURES:
            try:
                if _started().send(line):
                    return
                why = _UNREAD
            except Exception as error:
                why = str(error)
            _give_up(why)


def _started() -> _Process:
    """Return the process, a new one if there is none."""
    global _process
    if _process is None:
        _process = _Process()
    return _process


def _give_up(why: str) -> None:
    """Leave a process that does not read any more; after several there is none, with a warning."""
    global _failures
    _failures += 1
    if _failures == _MOST_FAILURES:
        log.warning('functions that crash or block the program are no longer named: %s', why)
    _end()


@atexit.register
def _end_at_exit() -> None:
    """End the process, and start none for calls of threads that still run."""
    global _failures
    _failures = _MOST_FAILURES
    _end()


def _end() -> None:
    global _process
    with _lock:
        process, _process = _process, None
    if process is not None:
        process.end()


def _forget_after_fork() -> None:
    """A forked child of a program that is watched is not."""
    global _process, _lock, _failures
    if _process is not None:
        _process, _failures = None, _MOST_FAILURES
    _lock = threading.RLock()


os.register_at_fork(after_in_child=_forget_after_fork)
