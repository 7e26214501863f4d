"""Programs per second in the sandbox, beside bare starts of Python.

    python -m benchmarks.sandbox

Prints Markdown. Every figure is a rate with as many programs at a time as there are processors; the
kinds take turns, so that other work on the machine meets all of them alike.
"""

import os
import pathlib
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

ROOT = pathlib.Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from grpo_jax.rewards import sandbox  # noqa: E402

LIMITS = sandbox.Limits(seconds=60.0, memory=2**29)
PROGRAM = 'def double(x):\n    return 2 * x\n'
TEST = ''.join(f'assert double({x}) == {2 * x}\n' for x in range(8))
ECHO = 'print(2 * int(input()))\n'
INPUTS = tuple(str(x) for x in range(8))
OUTPUTS = tuple(f'{2 * x}\n' for x in range(8))
COUNT, ROUNDS = 24, 5


def bare(code: str) -> Callable[[], None]:
    """Return a function that starts Python `COUNT` times, without a sandbox."""
    size = len(os.sched_getaffinity(0))

    def start(_: int) -> None:
        subprocess.run([sys.executable, '-I', '-S', '-c', code], check=True)

    def run() -> None:
        with ThreadPoolExecutor(size) as threads:
            list(threads.map(start, range(COUNT)))

    return run


def pooled(pool: sandbox.Pool, job: sandbox.Job) -> Callable[[], None]:
    """Return a function that runs a job `COUNT` times."""

    def run() -> None:
        results = pool.run([job] * COUNT, LIMITS)
        assert all(result.passed == result.cases for result in results), results[0]

    return run


def main() -> None:
    """Measure all kinds in turns and print the table."""
    safe, unsafe = sandbox.Pool(), sandbox.Pool(unsafe=True)
    tests, inputs = sandbox.Tests(PROGRAM, TEST), sandbox.Inputs(ECHO, INPUTS, OUTPUTS)
    kinds = {
        'bare `python -I -S -c pass`': bare('pass'),
        'bare, with the modules that the sandbox imports': bare(
            'import datetime, decimal, fractions, json, resource, select, signal, socket, typing'
        ),
        'sandbox, 8 unit tests': pooled(safe, tests),
        'sandbox, 8 inputs': pooled(safe, inputs),
        '`unsafe=True`, 8 unit tests': pooled(unsafe, tests),
    }
    seconds: dict[str, list[float]] = {name: [] for name in kinds}
    for _ in range(ROUNDS + 1):
        for name, run in kinds.items():
            start = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - start)
    print(f'{len(os.sched_getaffinity(0))} processors, medians of {ROUNDS} rounds\n')
    print('| | programs/s | bare starts / this |\n|---|---|---|')
    first = statistics.median(seconds[next(iter(kinds))][1:])
    for name, each in seconds.items():
        median = statistics.median(each[1:])  # the first round starts the workers
        print(f'| {name} | {COUNT / median:.0f} | {median / first:.2f} |')
    safe.close()
    unsafe.close()


if __name__ == '__main__':
    main()
