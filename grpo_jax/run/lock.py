"""A lock on a run's folder: one run trains in it at a time.

The process that trains, or the first of several, holds a POSIX lock on a file in the folder. The
kernel releases it when the process ends, however it ends, so a lock is never left behind on its own
machine; children of the process do not inherit it. The file says who holds it. Where the folder is
shared by machines that do not see each other's locks, the file tells: its holder counts up a number
in it every few seconds, and a number that stands still is one of a process that has ended.
"""

import contextlib
import datetime
import errno
import fcntl
import json
import logging
import os
import pathlib
import socket
import threading
import time
from collections.abc import Iterator
from typing import Any

from grpo_jax.run.errors import naming_file

log = logging.getLogger('grpo_jax')

FILE = 'train.lock'
BEAT = 10  # seconds between two numbers
_PATIENCE = 2.5  # beats without another number after which a holder on another machine has ended

_held: set[str] = set()  # by this process, for which the kernel's lock is none


class LockedError(ValueError):
    """Another process trains in the folder."""


@contextlib.contextmanager
def held(workdir: pathlib.Path) -> Iterator[None]:
    """Holds the lock of a run's folder during the block.

    A folder that cannot be written to is not locked: the check of the config reports it.

    Args:
      workdir: the run's folder; it is made.

    Raises:
      LockedError: another process holds it; says which, since when, and what to do.
    """
    name, record, ended = os.path.realpath(workdir), _identity(), threading.Event()
    if name in _held:  # opening and closing the file again would release the lock
        raise _refused(workdir, record)
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        file = _open(workdir / FILE)
    except OSError as error:
        if os.access(workdir, os.W_OK):
            raise LockedError(
                f'{workdir / FILE} cannot be opened ({error.strerror}): remove it, if no run uses '
                'the folder'
            ) from error
        yield
        return
    try:
        _take(file, workdir)
        with naming_file(workdir / FILE):
            _write(file, record)
    except BaseException:
        os.close(file)
        raise
    _held.add(name)
    beats = threading.Thread(target=_beat, args=(file, record, ended), daemon=True)
    beats.start()
    try:
        yield
    finally:
        ended.set()
        beats.join()
        _held.discard(name)
        (workdir / FILE).unlink(missing_ok=True)
        os.close(file)


def _open(path: pathlib.Path) -> int:
    """Opens the file; its last holder may be removing it."""
    while True:
        file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        locked = _lock(file)
        with contextlib.suppress(FileNotFoundError):
            if locked is False or os.path.samestat(os.fstat(file), os.stat(path)):
                return file
        os.close(file)


def _take(file: int, workdir: pathlib.Path) -> None:
    """Takes the lock of an open file, or raises LockedError."""
    locked, other = _lock(file), _read(file)
    if locked is False:
        for _ in range(10):  # it may have been taken just now
            if not other:
                time.sleep(0.1)
                other = _read(file)
        raise _refused(workdir, other)
    if not other:
        return
    if other.get('boot') == _boot():
        # On this machine the kernel's lock has told, if the file system has locks.
        if locked is None and _started(other.get('pid')) == other.get('process_started'):
            raise _refused(workdir, other)
    elif _beats(file, workdir, other):
        raise _refused(workdir, other)


def _lock(file: int) -> bool | None:
    """Whether the kernel gives the lock; None if the file system has none."""
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EAGAIN):
            return False
        return None
    return True


def _beats(file: int, workdir: pathlib.Path, other: dict[str, Any]) -> bool:
    """Whether the holder on another machine still counts; waits for it for some seconds."""
    seconds = _PATIENCE * BEAT
    log.warning(
        'workdir %r: process %s on %s has not removed its lock; waiting %g s for a sign of it',
        str(workdir), other.get('pid'), other.get('host'), seconds,
    )  # fmt: skip
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        time.sleep(BEAT / 10)
        _lock(file)  # a network file system reads what is new
        if _read(file) not in ({}, other):
            return True
    return False


def _beat(file: int, record: dict[str, Any], ended: threading.Event) -> None:
    while not ended.wait(BEAT):
        record['beats'] += 1
        with contextlib.suppress(OSError):  # a full disk; the kernel's lock holds
            _write(file, record)


def _refused(workdir: pathlib.Path, other: dict[str, Any]) -> LockedError:
    who = 'another process'
    if {'pid', 'host', 'since'} <= other.keys():
        who = f'process {other["pid"]} on {other["host"]}, since {other["since"]}'
    return LockedError(
        f'workdir {str(workdir)!r} is in use: {who} trains in it; wait until it has ended, stop it '
        'by SIGTERM, or name another --workdir'
    )


def _identity() -> dict[str, Any]:
    return {
        'pid': os.getpid(),
        'host': socket.gethostname(),
        'since': datetime.datetime.now().astimezone().isoformat(' ', 'seconds'),
        'process_started': _started(os.getpid()),
        'boot': _boot(),
        'beats': 0,
    }


def _boot() -> str:
    """A name of this start of this machine; another container of it has the same."""
    try:
        return pathlib.Path('/proc/sys/kernel/random/boot_id').read_text().strip()
    except OSError:
        return socket.gethostname()


def _started(pid: Any) -> str | None:
    """When a process of this machine started, in ticks since its boot; None if there is none."""
    try:
        stat = pathlib.Path(f'/proc/{pid}/stat').read_text()
    except OSError:
        return None
    return stat.rpartition(')')[2].split()[19]


def _read(file: int) -> dict[str, Any]:
    """What the file says; empty if it says nothing that can be read."""
    try:
        value = json.loads(os.pread(file, 4096, 0))
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}


def _write(file: int, record: dict[str, Any]) -> None:
    text = json.dumps(record).encode()
    os.pwrite(file, text, 0)
    os.ftruncate(file, len(text))
