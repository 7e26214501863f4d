"""Bounds what environments print, each thread by itself."""

import contextlib
import sys
import threading
from collections.abc import Iterator
from typing import Any

from grpo_jax.rewards.output import LIMIT, BoundedStream, StreamBefore

_own = threading.local()  # .streams: what this thread prints to, in the place of others


class _ThreadStream(StreamBefore):
    """Writes to a stream, bounded in threads that are in the block of `bounded`."""

    def write(self, text: str) -> int:
        what = getattr(_own, 'what', None)
        if what is None:
            return int(self._stream.write(text))
        if self not in _own.streams:
            _own.streams[self] = BoundedStream(self._stream, what, LIMIT)
        return int(_own.streams[self].write(text))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)  # such as `buffer`


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
