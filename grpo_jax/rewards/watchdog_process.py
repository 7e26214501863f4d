"""The process that watches another one (see `watchdog`), its parent; it runs as a script.

Its arguments are the parent's process id, as the parent may end before this process starts, and
the seconds without a line after which the parent counts as blocked. It reads lines on standard
input: `begin NUMBER OWNER SECONDS WHAT` when a function is called, which may take so many seconds
(0: any time), `end NUMBER OWNER` when it has returned, and so have those that its owner called
later, `alive` every second, unless no thread of Python's can run, and `quit`.
"""

import contextlib
import os
import resource
import select
import signal
import sys
import time
from typing import NamedTuple, NoReturn

_LOOK = 1.0  # seconds between looks whether the parent lives: its children may hold the pipe too
_DYING = 2.0  # seconds that a process which ends may take after its descriptors are closed
_REMEDY = 'call it in another process, as isolated=True does for a reward'


class _Call(NamedTuple):
    owner: str
    end: float  # time.monotonic
    what: str


def main() -> None:
    """Watch the parent until it ends."""
    parent, silence = int(sys.argv[1]), float(sys.argv[2])
    calls, rest, heard = dict[int, _Call](), b'', time.monotonic()
    while True:
        if select.select([0], [], [], _LOOK)[0]:
            data = os.read(0, 2**16)
            if not data:
                _at_end_of_pipe(parent, calls)
            *lines, rest = (rest + data).split(b'\n')
            for line in lines:
                _read(line.decode(errors='replace'), calls)
            heard = time.monotonic()
        elif os.getppid() != parent:
            _report_crash(calls)
        now = time.monotonic()
        heard = now if _is_suspended(parent) else heard
        # A call that is not late may be the one that blocks the parent.
        all_late = bool(calls) and all(call.end <= now for call in calls.values())
        if all_late and heard + silence <= now:
            _kill(parent, f'{_named(calls)} did not return in time and lets nothing else run')


def _is_suspended(process: int) -> bool:
    """Whether a process waits for SIGCONT or a debugger; where that is not known, it does not."""
    try:
        with open(f'/proc/{process}/stat', 'rb') as file:
            return file.read().rpartition(b') ')[2][:1] in (b'T', b't')
    except OSError:
        return False


def _read(line: str, calls: dict[int, _Call]) -> None:
    match line.split(' ', 4):
        case ['quit']:
            sys.exit()
        case ['begin', number, owner, seconds, what]:
            end = time.monotonic() + (float(seconds) or float('inf'))
            calls[int(number)] = _Call(owner, end, what)
        case ['end', number, owner]:
            first = int(number)
            for other in [n for n, call in calls.items() if n >= first and call.owner == owner]:
                del calls[other]


def _named(calls: dict[int, _Call]) -> str:
    return ' or '.join(dict.fromkeys(call.what for call in calls.values()))


def _at_end_of_pipe(parent: int, calls: dict[int, _Call]) -> NoReturn:
    """The parent has ended, or its descriptors have been closed."""
    stop = time.monotonic() + _DYING
    while calls and time.monotonic() < stop:
        if os.getppid() != parent:
            _report_crash(calls)
        time.sleep(0.02)
    if calls:
        _kill(parent, f'{_named(calls)} has closed the file descriptors of the program')
    sys.exit()


def _report_crash(calls: dict[int, _Call]) -> NoReturn:
    if calls:
        _say(f'the program ended during a call of {_named(calls)}; if it crashed there, {_REMEDY}')
    sys.exit()


def _kill(parent: int, why: str) -> NoReturn:
    try:
        _say(f'{why}, so the program was killed, with the checkpoints that it has: {_REMEDY}')
    finally:
        os.kill(parent, signal.SIGKILL)
        time.sleep(1)
        if os.getppid() == parent:  # the first process of a container, which SIGKILL does not end
            with contextlib.suppress(OSError, AttributeError):
                resource.prlimit(parent, resource.RLIMIT_CPU, (1, 1))
    sys.exit()


def _say(text: str) -> None:
    with contextlib.suppress(OSError):  # nothing reads it
        if select.select([], [2], [], 1)[1]:
            os.write(2, f'\nerror: {text}\n'.encode(errors='backslashreplace'))


if __name__ == '__main__':
    main()
