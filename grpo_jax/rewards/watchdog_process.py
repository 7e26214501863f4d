"""The process that watches another one (see `watchdog`), its parent; it runs as a script.

Its arguments are the parent's process id, as the parent may end before this process starts, and
the seconds without a line after which the parent counts as blocked. It reads lines on standard
input: `begin NUMBER SECONDS REMEDY<tab>WHAT` when a function is called, which may take so many
seconds (0: any time), `end NUMBER` when it has returned, `alive` every second, unless no thread of
Python's can run, and `quit`.
"""

import os
import select
import signal
import sys
import time
from typing import NamedTuple, NoReturn

_LOOK = 1.0  # seconds between looks whether the parent lives: its children may hold the pipe too
_DYING = 2.0  # seconds that a process which ends may take after its descriptors are closed


class _Call(NamedTuple):
    end: float  # time.monotonic
    remedy: str
    what: str


def main() -> None:
    """Watch the parent until it ends."""
    parent, silence = int(sys.argv[1]), float(sys.argv[2])
    calls, rest, heard = dict[str, _Call](), b'', time.monotonic()
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
        late = [call for call in calls.values() if call.end <= now]
        if late and heard + silence <= now:
            _kill(parent, f'{late[0].what} did not return in time and lets nothing else run', late)


def _is_suspended(process: int) -> bool:
    """Whether a process waits for SIGCONT or a debugger; where that is not known, it does not."""
    try:
        with open(f'/proc/{process}/stat', 'rb') as file:
            return file.read().rpartition(b') ')[2][:1] in (b'T', b't')
    except OSError:
        return False


def _read(line: str, calls: dict[str, _Call]) -> None:
    kind, _, text = line.partition(' ')
    number, _, text = text.partition(' ')
    if kind == 'quit':
        sys.exit()
    if kind == 'end':
        calls.pop(number, None)
    elif kind == 'begin':
        seconds, _, text = text.partition(' ')
        remedy, _, what = text.partition('\t')
        calls[number] = _Call(time.monotonic() + (float(seconds) or float('inf')), remedy, what)


def _at_end_of_pipe(parent: int, calls: dict[str, _Call]) -> NoReturn:
    """The parent has ended, or its descriptors have been closed."""
    stop = time.monotonic() + _DYING
    while time.monotonic() < stop:
        if os.getppid() != parent:
            _report_crash(calls)
        time.sleep(0.02)
    names = ' or '.join(call.what for call in calls.values()) or 'a function'
    _kill(parent, f'{names} has closed the file descriptors of the program', list(calls.values()))


def _report_crash(calls: dict[str, _Call]) -> NoReturn:
    for call in list(calls.values())[:1]:
        _say(f'the program ended during a call of {call.what}; if it crashed there, {call.remedy}')
    sys.exit()


def _kill(parent: int, why: str, calls: list[_Call]) -> NoReturn:
    remedies = [f': {call.remedy}' for call in calls[:1]]
    _say(f'{why}, so the program was killed, with the checkpoints that it has{"".join(remedies)}')
    os.kill(parent, signal.SIGKILL)
    sys.exit()


def _say(text: str) -> None:
    os.write(2, f'\nerror: {text}\n'.encode(errors='backslashreplace'))


if __name__ == '__main__':
    main()
