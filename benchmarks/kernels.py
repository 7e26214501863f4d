"""Which of a device's programs took longest, from a profile."""

import collections
import contextlib
import pathlib
import tempfile
from collections.abc import Iterator

import jax


@contextlib.contextmanager
def profiled(count: int) -> Iterator[None]:
    """Prints the `count` GPU or TPU programs in the block that took longest; 0: nothing."""
    if not count:
        yield
        return
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            yield
        for line in longest(pathlib.Path(folder), count):
            print(line)


def longest(folder: pathlib.Path, count: int) -> list[str]:
    """A line for each: milliseconds, their share, how often it ran, its name.

    Args:
      folder: that `jax.profiler.trace` wrote to.
      count: how many.

    Returns:
      The lines; one that says so where no accelerator ran anything.
    """
    found: dict[str, list[float]] = collections.defaultdict(lambda: [0.0, 0])
    for path in folder.glob('**/*.xplane.pb'):
        for plane in jax.profiler.ProfileData.from_file(str(path)).planes:
            if not plane.name.startswith('/device:'):
                continue
            for line in plane.lines:
                if line.name.startswith(('Stream', 'XLA Ops')):
                    for event in line.events:
                        found[event.name][0] += event.duration_ns
                        found[event.name][1] += 1
    total = sum(took for took, _ in found.values())
    if not total:
        return ['no accelerator ran anything']
    ordered = sorted(found.items(), key=lambda item: -item[1][0])
    return [
        f'{took / 1e6:9.3f} ms {took / total:6.1%} {times:6.0f}  {name[:80]}'
        for name, (took, times) in ordered[:count]
    ]
