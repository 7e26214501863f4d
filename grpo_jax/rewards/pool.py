"""Processes that compare expressions, each comparison with a deadline that holds.

A worker is `worker.py` run as a script: it shares nothing with this process, so neither threads nor
JAX's devices nor a notebook stand in the way. The caller waits for answers and kills a worker that
exceeds its deadline; no signal handler or timer is involved, so any thread can ask.
"""

import atexit
import collections
import contextlib
import importlib.util
import json
import os
import pathlib
import selectors
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from typing import Any

MEMORY = 2**30  # bytes of address space of a worker
_START_SECONDS = 120.0  # for a worker to import SymPy, on a machine that is busy
_MAX_FAILURES = 3  # to start a worker, one after another
_MAX_SIZE = 32
_SCRIPT = pathlib.Path(__file__).with_name('worker.py')


class Worker:
    """One process and the question it is working on."""

    def __init__(self, script: pathlib.Path, memory: int):
        # A session of its own, so that an interrupt from the keyboard does not reach it. `-P` keeps
        # the script's folder, whose math.py is not the standard library's, off the search path.
        self.process = subprocess.Popen(
            [sys.executable, '-P', str(script), str(memory)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        assert self.process.stdin
        assert self.process.stdout
        self._questions, self._answers = self.process.stdin, self.process.stdout
        self.started = False
        self.question: int | None = None
        self.deadline = time.monotonic() + _START_SECONDS
        self._read = b''

    @property
    def idle(self) -> bool:
        return self.started and self.question is None

    def send(self, question: int, tree: Any, seconds: float) -> bool:
        """Hands over a question; False where the process is gone."""
        try:
            self._questions.write(json.dumps([seconds, tree]).encode() + b'\n')
            self._questions.flush()
        except OSError:
            return False
        self.question, self.deadline = question, time.monotonic() + seconds
        return True

    def receive(self) -> str | None:
        """A line from the process: '' while there is none, None when the process is gone."""
        data = os.read(self.fileno(), 4096)
        self._read += data
        if not data:
            return None
        line, end, rest = self._read.partition(b'\n')
        if not end:
            return ''
        self._read = rest
        return line.decode()

    def fileno(self) -> int:
        return self._answers.fileno()

    def kill(self) -> None:
        """Ends the process and waits for its end."""
        self.process.kill()
        self.process.wait()
        self._answers.close()
        with contextlib.suppress(OSError):  # what was not yet written has nowhere to go
            self._questions.close()


class Pool:
    """Up to `size` workers, started when there is something to ask.

    Attributes:
      timeouts: comparisons so far that reached their deadline.
      crashes: comparisons so far whose worker ended on them, as one out of memory does.
    """

    def __init__(
        self, size: int | None = None, *, memory: int = MEMORY, script: pathlib.Path = _SCRIPT
    ):
        self.size = size or min(_processors(), _MAX_SIZE)
        self.timeouts = self.crashes = 0
        self._memory, self._script = memory, script
        self._failures = 0  # to start, one after another
        self._workers: list[Worker] = []
        self._lock = threading.Lock()

    def ask(self, trees: Sequence[Any], *, seconds: float) -> list[bool | None]:
        """The workers' verdicts in the order of the questions.

        None for a question that was not decided within `seconds`, or within the memory of a worker.
        Calls from several threads run one after another.

        Raises:
          ChildProcessError: workers do not start.
        """
        with self._lock:
            try:
                return self._ask(trees, seconds)
            finally:  # after an interrupt, the next call must not take these answers for its own
                self._drop([w for w in self._workers if w.question is not None])

    def close(self) -> None:
        """Ends all workers; asking again starts new ones."""
        with self._lock:
            self._drop(list(self._workers))

    def _ask(self, trees: Sequence[Any], seconds: float) -> list[bool | None]:
        waiting = collections.deque(range(len(trees)))
        verdicts: list[bool | None] = [None] * len(trees)
        while waiting or any(w.question is not None for w in self._workers):
            self._start(len(waiting))
            for worker in [w for w in self._workers if w.idle]:
                if waiting and not worker.send(waiting[0], trees[waiting[0]], seconds):
                    self._drop([worker])
                elif worker.question is not None:
                    waiting.popleft()
            self._collect(verdicts)
        return verdicts

    def _start(self, waiting: int) -> None:
        """As many workers as there is work for."""
        free = sum(w.question is None for w in self._workers)
        for _ in range(min(self.size - len(self._workers), waiting - free)):
            self._workers.append(Worker(self._script, self._memory))

    def _collect(self, verdicts: list[bool | None]) -> None:
        """Waits until a worker answers or reaches its deadline."""
        active = [w for w in self._workers if not w.idle]
        if not active:
            return
        with selectors.DefaultSelector() as selector:
            for worker in active:
                selector.register(worker, selectors.EVENT_READ)
            rest = min(w.deadline for w in active) - time.monotonic()
            ready = [key.fileobj for key, _ in selector.select(max(rest, 0))]
        for worker in active:
            if worker in ready:
                self._hear(worker, verdicts)
            elif worker.deadline <= time.monotonic():
                self.timeouts += worker.started
                self._end(worker)
                self._workers.append(Worker(self._script, self._memory))  # ready for what follows

    def _hear(self, worker: Worker, verdicts: list[bool | None]) -> None:
        line = worker.receive()
        if line is None:
            self.crashes += worker.started
            self._end(worker)
        elif line and worker.question is not None:
            verdicts[worker.question] = line == 'true'
            worker.question = None
        elif line:
            worker.started, self._failures = True, 0

    def _end(self, worker: Worker) -> None:
        self._drop([worker])
        self._failures = 0 if worker.started else self._failures + 1
        if self._failures == _MAX_FAILURES:
            missing = importlib.util.find_spec('math_verify') is None
            raise ChildProcessError(
                'comparing answers needs math-verify: pip install math-verify'
                if missing
                else f'{_MAX_FAILURES} workers ended before they were ready: see what '
                f'`{sys.executable} -P {self._script} {self._memory}` says'
            )

    def _drop(self, workers: Sequence[Worker]) -> None:
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
    """The pool of this process, with a worker for each processor; it closes at exit."""
    global _shared
    with _shared_lock:
        if _shared is None:
            _shared = Pool()
            atexit.register(_shared.close)
        return _shared


def timeouts() -> int:
    """Comparisons of the shared pool so far that were not decided within their limits."""
    return _shared.timeouts + _shared.crashes if _shared else 0


def _forget() -> None:
    """A forked child must not talk to, or end, the workers of its parent."""
    global _shared, _shared_lock
    if _shared is not None:
        atexit.unregister(_shared.close)
    _shared, _shared_lock = None, threading.Lock()


os.register_at_fork(after_in_child=_forget)
