"""Bounds what environments print, each thread by itself."""

import contextlib
import io
import sys
import threading
from collections.abc import Iterator
from typing import Any

from grpo_jax.rewards.output import LIMIT, BoundedStream

_own = threading.local()  # .streams: what this thread prints to, in the place of others


class _ThreadStream(io.TextIOBase):
    """Writes to a stream, bounded in threads that are in the block of `bounded`."""

    def __init__(self, stream: Any) -> None:
        self._shared = stream

    def write(self, text: str) -> int:
        what = getattr(_own, 'what', None)
        if what is None:
            return int(self._shared.write(text))
        if self not in _own.streams:
            _own.streams[self] = BoundedStream(self._shared, what, LIMIT)
        return int(_own.streams[self].write(text))

    def flush(self) -> None:
        self._shared.flush()

    def fileno(self) -> int:
        return int(self._shared.fileno())

    def isatty(self) -> bool:
        return bool(self._shared.isatty())

    @property
    def encoding(self) -> str:  # type: ignore[override]
        return str(self._shared.encoding)

    def writable(self) -> bool:
        return True

    def __getattr__(self, name: str) -> Any:
        return getattr(self._shared, name)  # such as `buffer`


@contextlib.contextmanager
def streams_by_thread() -> Iterator[None]:
    """In the block, threads can bound what they print by `bounded`."""
    shared = {name: getattr(sys, name) for name in ('stdout', 'stderr')}
    installed = {
        name: _ThreadStream(stream)
        for name, stream in shared.items()
        if stream is not None and not isinstance(stream, _ThreadStream)
    }
    for name, stream in installed.items():
        setattr(sys, name, stream)
    try:
        yield
    finally:
        for name, stream in installed.items():
            if getattr(sys, name) is stream:  # else who replaced it puts it back
                setattr(sys, name, shared[name])


@contextlib.contextmanager
def bounded(what: str) -> Iterator[None]:
    """Bound what this thread prints in the block, as `rewards.output.bounded_output` does.

    Args:
        what: that prints, for the note that something is left out.
    """
    _own.what, _own.streams = what, {}
    try:
        yield
    finally:
        _own.what = None
