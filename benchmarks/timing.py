"""A clock for the phases of a step, and the record that a run of each framework writes.

Needs NumPy alone, so that the peers' own environments can import it.
"""

import json
import os
import pathlib
import platform
import resource
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np


def summary(values: Sequence[float]) -> dict[str, float]:
    """Median, extremes and number of measurements."""
    found = [float(value) for value in values]
    return {
        'median': statistics.median(found),
        'min': min(found),
        'max': max(found),
        'n': len(found),
    }


def peak_rss() -> int:
    """Bytes of main memory that this process has had at most."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == 'darwin' else peak * 1024


def probe(size: int = 1024, repeats: int = 15) -> float:
    """FLOP/s of a float32 matrix product in NumPy now.

    Load on a shared host can halve it invisibly to /proc/stat: compare runs whose probes agree.
    """
    a = np.ones((size, size), np.float32)
    times = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        a @ a
        times.append(time.perf_counter() - start)
    return 2 * size**3 / statistics.median(times[1:])


class Clock:
    """Wall time by phase; `cut` closes a step.

    Besides its phases a step has `step`, its wall time, and `noise`: CPU seconds that other
    processes or the host took per second of it. A step well above 0 is not clean.
    """

    def __init__(self) -> None:
        self.steps: list[dict[str, float]] = []
        self.probe = probe()
        self.start()

    def start(self) -> None:
        """Begins a step and forgets what was open."""
        self._phases: dict[str, float] = {}
        self._cpu = _cpu_seconds()
        self._start = time.perf_counter()

    def cut(self) -> None:
        """Ends a step and begins the next."""
        wall = time.perf_counter() - self._start
        busy, stolen, own = (b - a for a, b in zip(self._cpu, _cpu_seconds(), strict=True))
        noise = max(0.0, busy - own + stolen) / wall
        self.steps.append(self._phases | {'step': wall, 'noise': noise})
        self.start()

    def timed(
        self,
        phase: str | Callable[[], str],
        function: Callable[..., Any],
        wait: Callable[[Any], Any] = lambda result: None,
    ) -> Callable[..., Any]:
        """`function`, its time added to a phase.

        Args:
          phase: a name, or a function that says it at each call.
          function: what to time.
          wait: called with the result; returns when it is there.
        """

        def call(*args: Any, **kwargs: Any) -> Any:
            name = phase if isinstance(phase, str) else phase()
            start = time.perf_counter()
            result = function(*args, **kwargs)
            wait(result)
            self._phases[name] = self._phases.get(name, 0.0) + time.perf_counter() - start
            return result

        return call


def _cpu_seconds() -> tuple[float, float, float]:
    """CPU seconds that anything has used, that the host has stolen, that this process has used."""
    try:
        fields = pathlib.Path('/proc/stat').read_text().split('\n', 1)[0].split()[1:9]
    except OSError:
        return 0.0, 0.0, 0.0
    user, nice, system, _, _, interrupts, soft, stolen = map(int, fields)
    ticks = os.sysconf('SC_CLK_TCK')
    busy = user + nice + system + interrupts + soft
    return busy / ticks, stolen / ticks, time.process_time()


def record(
    framework: str,
    workload: str,
    clock: Clock,
    tokens: Sequence[int],
    *,
    warmup: int,
    versions: dict[str, str],
    settings: dict[str, Any],
    first_step: float | None = None,
    peak_bytes: int | None = None,
    **more: Any,
) -> dict[str, Any]:
    """One run's measurements as a row of JSON.

    Args:
      framework: who was measured.
      workload: its name.
      clock: with all steps; each needs a `sample` phase.
      tokens: completion tokens of each step.
      warmup: how many steps to leave out.
      versions: of the packages that matter.
      settings: what the run was told.
      first_step: seconds; that of the clock by default.
      peak_bytes: that of main memory by default.
      **more: further entries.
    """
    steps, tokens = clock.steps[warmup:], tokens[warmup:]
    phases = {name: [step.get(name, 0.0) for step in steps] for name in sorted(steps[0])}

    def rates(phase: str) -> list[float]:
        return [n / seconds for n, seconds in zip(tokens, phases[phase], strict=True)]

    return {
        'framework': framework,
        'workload': workload,
        'settings': settings,
        'versions': {'python': platform.python_version(), **versions},
        'cpus': os.cpu_count(),
        'seconds': {name: summary(found) for name, found in phases.items() if name != 'noise'},
        'noise': summary(phases['noise']),
        'tokens_per_step': summary(tokens),
        'tokens_per_s': {phase: summary(rates(phase)) for phase in ('step', 'sample')},
        'first_step_s': clock.steps[0]['step'] if first_step is None else first_step,
        'peak_bytes': peak_rss() if peak_bytes is None else peak_bytes,
        'probe_flops_per_s': [clock.probe, probe()],
        **more,
    }


def write(row: dict[str, Any], path: str) -> None:
    """Prints the record in short and, with a path, appends it as a line of JSON."""
    if path:
        with pathlib.Path(path).open('a') as file:
            file.write(json.dumps(row) + '\n')
    seconds = '  '.join(
        f'{name} {s["median"]:.3f} ({s["min"]:.3f}-{s["max"]:.3f})'
        for name, s in row['seconds'].items()
    )
    probes = '-'.join(f'{x / 1e9:.0f}' for x in row['probe_flops_per_s'])
    print(
        f'[{row["framework"]} {row["workload"]}] seconds: {seconds}  '
        f'tokens/step {row["tokens_per_step"]["median"]:.0f}  '
        f'tokens/s {row["tokens_per_s"]["step"]["median"]:.0f}, '
        f'sampling {row["tokens_per_s"]["sample"]["median"]:.0f}  '
        f'first step {row["first_step_s"]:.1f} s  peak {row["peak_bytes"] / 2**30:.2f} GiB  '
        f'noise {row["noise"]["max"]:.2f}  probe {probes} GFLOP/s',
        flush=True,
    )
