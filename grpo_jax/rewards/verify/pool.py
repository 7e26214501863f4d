"""A pool of processes that compare expressions, with an enforced deadline for each comparison.

A worker is `worker.py` run as a script. It shares nothing with this process, so threads, JAX
devices and notebooks do not interfere. The caller waits for results and kills a comparison that
exceeds its deadline; no signal handler or timer is involved, so the pool works in any thread.

A worker takes seconds to import SymPy, so it compares in a copy of its warm process: where the copy
is killed, the next one is there in milliseconds, and a deadline does not delay other comparisons.
"""

import atexit
import collections
import contextlib
import importlib.util
import json
import os
import pathlib
import selectors
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence

MEMORY = 2**30  # bytes of address space of a worker
_START_SECONDS = 120.0  # for a worker to import SymPy on a busy machine
_MAX_FAILURES = 3  # failed starts in a row after which the pool gives up
_MAX_SIZE = 32
_SCRIPT = pathlib.Path(__file__).with_name('worker.py')


class Worker:
    """A worker process, its copy that compares, and the comparison that it works on.

    The process prints `ready` and the process id of its copy whenever there is a new copy. A script
    that prints `ready` alone compares itself.
    """

    def __init__(self, script: pathlib.Path, memory: int):
        # A session of its own, so that an interrupt from the keyboard does not reach it. `-P` keeps
        # the script's folder, whose numbers.py would hide the standard library's, off the search
        # path.
        self.process = subprocess.Popen(
            [sys.executable, '-P', str(script), str(memory)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        assert self.process.stdin
        assert self.process.stdout
        self._requests, self._results = self.process.stdin, self.process.stdout
        self.started = False
        self.task: int | None = None  # index of the comparison
        self.deadline = time.monotonic() + _START_SECONDS
        self._buffer = b''
        self._copy: int | None = None  # process id

    @property
    def idle(self) -> bool:
        return self.started and self.task is None

    def send(self, task: int, tree: object, seconds: float) -> bool:
        """Send a comparison to the process; return False if the process has ended."""
        try:
            self._requests.write(json.dumps([seconds, tree]).encode() + b'\n')
            self._requests.flush()
        except OSError:
            return False
        self.task, self.deadline = task, time.monotonic() + seconds
        return True

    def receive(self) -> list[str] | None:
        """Return the complete lines that have arrived; None if the process has ended."""
        data = os.read(self.fileno(), 4096)
        if not data:
            return None
        *lines, self._buffer = (self._buffer + data).split(b'\n')
        return [line.decode() for line in lines]

    def ready(self, line: str) -> None:
        """Take note of a line `ready`."""
        _, _, copy = line.partition(' ')
        self.started, self.task, self._copy = True, None, int(copy) if copy else None

    def restart(self) -> bool:
        """Kill the copy, so that there is a new one; return False if the worker has none."""
        if self._copy is None:
            return False
        with contextlib.suppress(ProcessLookupError):  # it has just ended
            os.kill(self._copy, signal.SIGKILL)
        self.started, self.task, self._copy = False, None, None
        self.deadline = time.monotonic() + _START_SECONDS
        return True

    def fileno(self) -> int:
        return self._results.fileno()

    def kill(self) -> None:
        """Kill the process and its copy, and wait until the process has ended."""
        with contextlib.suppress(ProcessLookupError, PermissionError):  # both have ended
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        self._results.close()
        with contextlib.suppress(OSError):  # the buffer may hold a request that cannot be sent
            self._requests.close()


class Pool:
    """Up to `size` workers, started when there is something to compare.

    Attributes:
        timeouts: comparisons so far that reached their deadline.
        crashes: comparisons so far whose worker ended without a result, e.g. out of memory.
    """

    def __init__(
        self, size: int | None = None, *, memory: int = MEMORY, script: pathlib.Path = _SCRIPT
    ):
        self.size = size or min(_processors(), _MAX_SIZE)
        self.timeouts = self.crashes = 0
        self._memory, self._script = memory, script
        self._failures = 0  # failed starts in a row
        self._workers: list[Worker] = []
        self._lock = threading.Lock()

    def evaluate(self, trees: Sequence[object], *, seconds: float) -> list[bool | None]:
        """Evaluate comparison trees (see `equivalence`) in parallel.

        Calls from several threads run one after another.

        Args:
            trees: N trees.
            seconds: the deadline of each.

        Returns:
            The results in the order of the trees; None for a tree that was not decided within its
            deadline or the memory of a worker.

        Raises:
            ChildProcessError: workers do not start, or math-verify is not installed.
        """
        with self._lock:
            try:
                return self._evaluate(trees, seconds)
            finally:  # after an interrupt, the next call must not receive results of this one
                self._discard([w for w in self._workers if w.task is not None])

    def close(self) -> None:
        """Kill all workers; the next evaluation starts new ones."""
        with self._lock:
            self._discard(list(self._workers))

    def _evaluate(self, trees: Sequence[object], seconds: float) -> list[bool | None]:
        waiting = collections.deque(range(len(trees)))
        results: list[bool | None] = [None] * len(trees)
        while waiting or any(w.task is not None for w in self._workers):
            self._start_workers(len(waiting))
            for worker in [w for w in self._workers if w.idle]:
                if waiting and not worker.send(waiting[0], trees[waiting[0]], seconds):
                    self._discard([worker])
                elif worker.task is not None:
                    waiting.popleft()
            self._collect(results)
        return results

    def _start_workers(self, waiting: int) -> None:
        """Start as many workers as there are comparisons without one."""
        free = sum(w.task is None for w in self._workers)
        for _ in range(min(self.size - len(self._workers), waiting - free)):
            self._workers.append(Worker(self._script, self._memory))

    def _collect(self, results: list[bool | None]) -> None:
        """Wait until a worker sends a result or reaches its deadline."""
        active = [w for w in self._workers if not w.idle]
        if not active:
            return
        with selectors.DefaultSelector() as selector:
            for worker in active:
                selector.register(worker, selectors.EVENT_READ)
            seconds = min(w.deadline for w in active) - time.monotonic()
            ready = [key.fileobj for key, _ in selector.select(max(seconds, 0))]
        for worker in active:
            if worker in ready:
                self._receive(worker, results)
            elif worker.deadline <= time.monotonic():
                self.timeouts += worker.started
                if not worker.restart():
                    self._fail(worker)
                    self._workers.append(Worker(self._script, self._memory))  # for the next ones

    def _receive(self, worker: Worker, results: list[bool | None]) -> None:
        lines = worker.receive()
        if lines is None:
            self.crashes += worker.started
            self._fail(worker)
            return
        for line in lines:
            if line.startswith('ready'):
                self.crashes += worker.task is not None  # its copy ended without a result
                worker.ready(line)
                self._failures = 0
            elif worker.task is not None:
                results[worker.task] = line == 'true'
                worker.task = None

    def _fail(self, worker: Worker) -> None:
        """Discard a worker; give up if it is one of several in a row that did not start."""
        self._discard([worker])
        self._failures = 0 if worker.started else self._failures + 1
        if self._failures == _MAX_FAILURES:
            missing = importlib.util.find_spec('math_verify') is None
            raise ChildProcessError(
                'comparing answers needs math-verify: pip install math-verify'
                if missing
                else f'{_MAX_FAILURES} workers ended before they were ready: for the reason, run '
                f'`{sys.executable} -P {self._script} {self._memory}`'
            )

    def _discard(self, workers: Sequence[Worker]) -> None:
        for worker in workers:
            worker.kill()
            self._workers.remove(worker)


def _processors() -> int:
    if hasattr(os, 'sched_getaffinity'):  # not on macOS
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


_shared: Pool | None = None
_shared_lock = threading.Lock()


def shared() -> Pool:
    """Return the pool of this process, with a worker for each processor; it closes at exit."""
    global _shared
    with _shared_lock:
        if _shared is None:
            _shared = Pool()
            atexit.register(_shared.close)
        return _shared


def timeouts() -> int:
    """Return how many comparisons of the shared pool exceeded their deadline or memory so far."""
    return _shared.timeouts + _shared.crashes if _shared else 0


def _reset_after_fork() -> None:
    """Detach a forked child, which must not use or kill the workers of its parent."""
    global _shared, _shared_lock
    if _shared is not None:
        atexit.unregister(_shared.close)
    _shared, _shared_lock = None, threading.Lock()


os.register_at_fork(after_in_child=_reset_after_fork)
