"""A pool of worker processes that answer requests, with an enforced deadline for each request.

A worker is a program that prints lines on its standard output: `ready` when it waits for a request,
and one line for each result. It reads requests as lines `[seconds, request]` in JSON. The caller
waits for results and kills what exceeds its deadline; no signal handler or timer is involved, so
the pool works in any thread, and it survives whatever happens in a worker.

A worker may answer in a copy of itself: then it prints `ready` and the process id of the copy
whenever there is a new one, and a copy that is killed is replaced without starting the program.
"""

import collections
import contextlib
import enum
import json
import os
import selectors
import signal
import subprocess
import threading
import time
from collections.abc import Mapping, Sequence

_START_SECONDS = 120.0  # for a worker to import its libraries on a busy machine
_MAX_FAILURES = 3  # failed starts in a row after which the pool gives up
_MAX_SIZE = 32


class Lost(enum.Enum):
    """Why a request has no result."""

    TIMEOUT = 'timeout'  # it reached its deadline, and its process was killed
    CRASH = 'crash'  # its process ended


class Worker:
    """A worker process, its copy if it has one, and the request that it works on."""

    def __init__(self, command: Sequence[str], environment: Mapping[str, str] | None = None):
        # A session of its own, so that an interrupt from the keyboard does not reach it.
        self.process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
            env=environment,
        )
        assert self.process.stdin
        assert self.process.stdout
        self._requests, self._results = self.process.stdin, self.process.stdout
        # A process that hangs before it reads must not block the caller.
        os.set_blocking(self._requests.fileno(), False)
        self.started = False
        self.task: int | None = None  # index of the request
        self.deadline = time.monotonic() + _START_SECONDS
        self._unsent = b''
        self._buffer = b''
        self._copy: int | None = None  # process id

    @property
    def idle(self) -> bool:
        return self.started and self.task is None

    @property
    def sending(self) -> bool:
        return bool(self._unsent)

    def send(self, task: int, request: object, seconds: float) -> bool:
        """Begin to send a request to the process; return False if the process has ended."""
        self._unsent = json.dumps([seconds, request]).encode() + b'\n'
        self.task, self.deadline = task, time.monotonic() + seconds
        if self.send_more():
            return True
        self.task = None
        return False

    def send_more(self) -> bool:
        """Send what the pipe takes of the request; return False if the process has ended."""
        try:
            while self._unsent:
                self._unsent = self._unsent[os.write(self._requests.fileno(), self._unsent) :]
        except BlockingIOError:
            pass
        except OSError:
            return False
        return True

    def receive(self) -> list[str] | None:
        """Return the complete lines that have arrived; None if the process has ended."""
        data = os.read(self.fileno(), 2**20)
        if not data:
            return None
        *lines, self._buffer = (self._buffer + data).split(b'\n')
        return [line.decode(errors='replace') for line in lines]

    def ready(self, line: str) -> None:
        """Take note of a line `ready`."""
        _, _, copy = line.partition(' ')
        self.started, self.task, self._copy = True, None, int(copy) if copy else None

    def restart(self) -> bool:
        """Kill the copy, so that there is a new one; return False if the worker has none."""
        if self._copy is None or self._unsent:  # the next copy would read the rest of a request
            return False
        with contextlib.suppress(ProcessLookupError):  # it has just ended
            os.kill(self._copy, signal.SIGKILL)
        self.started, self.task, self._copy = False, None, None
        self.deadline = time.monotonic() + _START_SECONDS
        return True

    def fileno(self) -> int:
        return self._results.fileno()

    def requests_fileno(self) -> int:
        return self._requests.fileno()

    def kill(self) -> None:
        """Kill the process and its copy, and wait until the process has ended."""
        with contextlib.suppress(ProcessLookupError, PermissionError):  # both have ended
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        self._results.close()
        with contextlib.suppress(OSError):
            self._requests.close()


class ProcessPool:
    """Up to `size` workers, started when there is something to do.

    Args:
        command: of a worker.
        size: largest number of workers; None: one for each processor.
        environment: of the workers; None: that of this process.

    Attributes:
        timeouts: requests so far that reached their deadline.
        crashes: requests so far whose worker ended without a result, e.g. out of memory.
    """

    def __init__(
        self,
        command: Sequence[str],
        size: int | None = None,
        *,
        environment: Mapping[str, str] | None = None,
    ):
        self.size = size or min(_processors(), _MAX_SIZE)
        self.timeouts = self.crashes = 0
        self._command, self._environment = tuple(command), environment
        self._failures = 0  # failed starts in a row
        self._workers: list[Worker] = []
        self._lock = threading.Lock()

    def run(self, requests: Sequence[object], *, seconds: float) -> list[str | Lost]:
        """Send requests to the workers, which work in parallel.

        Calls from several threads run one after another.

        Args:
            requests: N values that JSON can hold.
            seconds: the deadline of each.

        Returns:
            The result of each request, or why it has none.

        Raises:
            ChildProcessError: workers do not start.
        """
        with self._lock:
            try:
                return self._run(requests, seconds)
            finally:  # after an interrupt, the next call must not receive results of this one
                self._discard([w for w in self._workers if w.task is not None])

    def close(self) -> None:
        """Kill all workers; the next call starts new ones."""
        with self._lock:
            self._discard(list(self._workers))

    def why_none_starts(self) -> str:
        """Return the error for workers that end before they are ready."""
        return (
            f'{_MAX_FAILURES} workers ended before they were ready: for the reason, run '
            f'`{" ".join(self._command)}`'
        )

    def _run(self, requests: Sequence[object], seconds: float) -> list[str | Lost]:
        waiting = collections.deque(range(len(requests)))
        results: list[str | Lost] = [Lost.CRASH] * len(requests)
        while waiting or any(w.task is not None for w in self._workers):
            self._start_workers(len(waiting))
            for worker in [w for w in self._workers if w.idle]:
                if waiting and not worker.send(waiting[0], requests[waiting[0]], seconds):
                    self._discard([worker])
                elif worker.task is not None:
                    waiting.popleft()
            self._collect(results)
        return results

    def _start_workers(self, waiting: int) -> None:
        """Start as many workers as there are requests without one."""
        free = sum(w.task is None for w in self._workers)
        for _ in range(min(self.size - len(self._workers), waiting - free)):
            self._workers.append(self._new_worker())

    def _new_worker(self) -> Worker:
        return Worker(self._command, self._environment)

    def _collect(self, results: list[str | Lost]) -> None:
        """Wait until a worker sends a result, takes more of a request or reaches its deadline."""
        active = [w for w in self._workers if not w.idle]
        if not active:
            return
        with selectors.DefaultSelector() as selector:
            for worker in active:
                selector.register(worker, selectors.EVENT_READ)
                if worker.sending:
                    selector.register(worker.requests_fileno(), selectors.EVENT_WRITE)
            seconds = min(w.deadline for w in active) - time.monotonic()
            ready = [key.fileobj for key, _ in selector.select(max(seconds, 0))]
        for worker in active:
            if worker in ready:
                self._receive(worker, results)
            elif worker.deadline <= time.monotonic():
                if worker.task is not None:
                    self.timeouts += 1
                    results[worker.task] = Lost.TIMEOUT
                if not worker.restart():
                    self._fail(worker)
                    self._workers.append(self._new_worker())  # for the next ones
            elif worker.sending:
                worker.send_more()  # if the process has ended, its results end too

    def _receive(self, worker: Worker, results: list[str | Lost]) -> None:
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
                results[worker.task] = line
                worker.task = None

    def _fail(self, worker: Worker) -> None:
        """Discard a worker; give up if it is one of several in a row that did not start."""
        self._discard([worker])
        self._failures = 0 if worker.started else self._failures + 1
        if self._failures == _MAX_FAILURES:
            self._failures = 0
            raise ChildProcessError(self.why_none_starts())

    def _discard(self, workers: Sequence[Worker]) -> None:
        for worker in workers:
            worker.kill()
            self._workers.remove(worker)


def _processors() -> int:
    if hasattr(os, 'sched_getaffinity'):  # not on macOS
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
