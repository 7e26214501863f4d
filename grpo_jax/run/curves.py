"""The points of a stage's curves, in files that TensorBoard reads."""

import pathlib
import struct
import time
from collections.abc import Iterator, Mapping
from typing import Any

from grpo_jax.run.errors import naming_file

_SUFFIX = '.grpo_jax'  # of the names of our event files


class Curves:
    """Writes points to an event file, which holds those of all earlier starts of the stage too.

    An event file can be appended to only by the process that opened it. So the first point of a
    process begins a new one, with a copy of the points of the others that come before its first
    step, and removes the others: the curves of a run that was killed are those of an unbroken one.

    Args:
      folder: of the stage; it is made with the first point.
      step: the first step of this process; points of it and later are written again.
    """

    def __init__(self, folder: pathlib.Path, step: int) -> None:
        self.folder, self.step = folder, step
        self._writer: Any = None  # made late: with PyTorch installed, the import is slow

    def add(self, step: int, values: Mapping[str, float]) -> None:
        """Adds a point to each curve.

        Raises:
          OSError: the file cannot be written; names it.
        """
        with naming_file(self.folder):
            if self._writer is None:
                self._writer = self._opened()
            self._write(step, time.time(), values)
            self._writer.flush()

    def remove_from(self, step: int) -> None:
        """Removes the points of a step and later, to write them again."""
        self.close()
        self._writer, self.step = None, step

    def close(self) -> None:
        if self._writer is not None:
            with naming_file(self.folder):
                self._writer.close()

    def _opened(self) -> Any:
        from tensorboardX.event_file_writer import EventsWriter
        from tensorboardX.proto.event_pb2 import Event, SessionLog

        self.folder.mkdir(parents=True, exist_ok=True)
        others = sorted(self.folder.glob(f'events.out.tfevents.*{_SUFFIX}'))
        points: dict[int, tuple[float, dict[str, float]]] = {}
        for path in others:
            for event in _events(path):
                if event.summary.value and event.step < self.step:
                    _, values = points.setdefault(event.step, (event.wall_time, {}))
                    values |= {value.tag: value.simple_value for value in event.summary.value}
        suffix = f'.{time.time_ns()}{_SUFFIX}'  # two starts in one second have their own files
        self._writer = EventsWriter(str(self.folder / 'events'), suffix)
        # What TensorBoard has read of these steps before is no longer shown.
        begin = Event(step=min(points, default=self.step))
        begin.session_log.status = SessionLog.START
        self._writer.write_event(begin)
        for step, (wall_time, values) in sorted(points.items()):
            self._write(step, wall_time, values)
        self._writer.flush()
        for path in others:
            path.unlink()
        return self._writer

    def _write(self, step: int, wall_time: float, values: Mapping[str, float]) -> None:
        from tensorboardX.proto.event_pb2 import Event
        from tensorboardX.summary import scalar

        event = Event(step=step, wall_time=wall_time)
        for name, value in values.items():
            event.summary.value.extend(scalar(name, value).value)
        self._writer.write_event(event)


def _events(path: pathlib.Path) -> Iterator[Any]:
    """Yields the events of a file until its end, or until a record that is not whole."""
    from google.protobuf.message import DecodeError
    from tensorboardX.proto.event_pb2 import Event

    data, start = path.read_bytes(), 0
    while start + 12 <= len(data):  # length, its checksum, event, its checksum
        (length,) = struct.unpack_from('<Q', data, start)
        end = start + 12 + length
        if end + 4 > len(data):
            return
        try:
            yield Event.FromString(data[start + 12 : end])
        except DecodeError:
            return
        start = end + 4
