"""What reward functions print: without control characters, and not too much of it."""

import contextlib
import io
import re
import sys
from collections.abc import Iterator
from typing import Any

LIMIT = 10_000  # characters that a call may print

# Control characters but tab and line feed, and characters that change the direction of a text.
_UNPRINTABLE = re.compile(
    '[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]'
)


def printable(text: str) -> str:
    r"""Return a text that a terminal shows as it is: control characters as `\x1b`."""
    return _UNPRINTABLE.sub(lambda match: ascii(match[0])[1:-1], text)


class StreamBefore(io.TextIOBase):
    """A text stream before another one, whose properties it has; subclasses define `write`."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def flush(self) -> None:
        self._stream.flush()

    def fileno(self) -> int:
        return int(self._stream.fileno())

    def isatty(self) -> bool:
        return bool(self._stream.isatty())

    @property
    def encoding(self) -> str:  # type: ignore[override]
        return str(self._stream.encoding)

    def writable(self) -> bool:
        return True


class BoundedStream(StreamBefore):
    """Passes printable text on to a stream, up to a number of characters."""

    def __init__(self, stream: Any, what: str, limit: int) -> None:
        super().__init__(stream)
        self._what, self._left = what, limit

    def write(self, text: str) -> int:
        # A carriage return would overwrite what was printed before.
        shown = printable(text[: max(self._left, 0)].replace('\r\n', '\n').replace('\r', '\n'))
        cut = len(text) > self._left >= 0
        self._left -= len(text)
        if shown:
            self._stream.write(shown)
        if cut:
            self._left = -1
            self._stream.write(f'\n… {self._what} prints more, which is left out\n')
        return len(text)


@contextlib.contextmanager
def bounded_output(what: str, *, limit: int = LIMIT) -> Iterator[None]:
    """Bound what `print` writes in the block, and replace control characters in it.

    Programs and libraries that write to file descriptors are not bounded.

    Args:
        what: that prints, for the note that something is left out.
        limit: characters of standard output, and of standard error.
    """
    streams = contextlib.ExitStack()
    with streams:
        if sys.stdout is not None:
            streams.enter_context(
                contextlib.redirect_stdout(BoundedStream(sys.stdout, what, limit))
            )
        if sys.stderr is not None:
            streams.enter_context(
                contextlib.redirect_stderr(BoundedStream(sys.stderr, what, limit))
            )
        yield
