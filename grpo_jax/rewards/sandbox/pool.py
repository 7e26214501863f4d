"""A pool of workers that run programs in sandboxes, each program in a new one.

A worker keeps two processes ready. One is for the next program, and ends with it: whatever a
program leaves behind, the kernel removes with its sandbox. The other, the checker, is in a sandbox
of its own and runs tests; it gets one end of the program's connection, so that a program and its
tests share nothing but plain values. Results reach this process over the checker's connection,
which no program has.
"""

import atexit
import compileall
import os
import pathlib
import queue
import threading
from collections.abc import Sequence
from concurrent.futures import Future

from grpo_jax.rewards.sandbox.bubblewrap import Sandbox
from grpo_jax.rewards.sandbox.jobs import Inputs, Job, Limits, Result
from grpo_jax.rewards.sandbox.worker import Worker

_MAX_SIZE = 32


class Pool:
    """Workers in threads of their own, started when there is something to run.

    Args:
        size: how many programs run at the same time; by default, one for each processor.
        unsafe: run them without a sandbox, with limits alone.

    Raises:
        SandboxError: there is no sandbox here.
    """

    def __init__(self, size: int | None = None, *, unsafe: bool = False):
        self._sandbox = Sandbox(unsafe=unsafe)
        self.size = size or min(len(os.sched_getaffinity(0)), _MAX_SIZE)
        self._jobs: queue.SimpleQueue[tuple[Future[Result], Job, Limits] | None]
        self._jobs = queue.SimpleQueue()
        self._threads: list[threading.Thread] = []
        self._workers: list[Worker] = []
        self._closed = False
        self._lock = threading.Lock()
        inside = pathlib.Path(__file__).with_name('inside')
        compileall.compile_dir(inside, quiet=2)  # read-only in the sandbox

    def run(self, jobs: Sequence[Job], limits: Limits) -> list[Result]:
        """Run programs in parallel; any thread may call this.

        Raises:
            SandboxError: no sandbox starts.
        """
        futures: list[Future[Result]] = [Future() for _ in jobs]
        with self._lock:
            if self._closed:
                raise RuntimeError('this pool of sandboxes is closed: make another one')
            for _ in range(min(self.size, len(jobs)) - len(self._threads)):
                worker = Worker(self._sandbox)
                thread = threading.Thread(target=self._work, args=(worker,), daemon=True)
                thread.start()
                self._workers.append(worker)
                self._threads.append(thread)
        for future, job in zip(futures, jobs, strict=True):
            self._jobs.put((future, job, limits))
        try:
            return [future.result() for future in futures]
        finally:
            for future in futures:
                future.cancel()

    def close(self) -> None:
        """End all processes, also of programs that run; a closed pool runs nothing more."""
        with self._lock:
            self._closed = True
            for worker in self._workers:
                self._jobs.put(None)
                worker.stop()
            for thread in self._threads:
                thread.join()
            self._threads = []
            self._sandbox.close()

    def _work(self, worker: Worker) -> None:
        try:
            while item := self._jobs.get():
                future, job, limits = item
                if self._closed:
                    future.cancel()
                if not future.set_running_or_notify_cancel():
                    continue
                try:
                    future.set_result(worker.run(job, limits))
                except BaseException as error:
                    future.set_exception(error)
        finally:
            worker.close()


_shared: dict[bool, Pool] = {}
_shared_lock = threading.Lock()


def shared(*, unsafe: bool = False) -> Pool:
    """Return the pool of this process, after one program has run in it; it closes at exit.

    Raises:
        SandboxError: programs cannot be run; names what to install.
    """
    with _shared_lock:
        if unsafe not in _shared:
            pool = Pool(unsafe=unsafe)
            pool.run([Inputs('', ('',), ('',))], Limits(10.0, 2**29))
            _shared[unsafe] = pool
            atexit.register(pool.close)
        return _shared[unsafe]


def _reset_after_fork() -> None:
    """Detach a forked child, which must not use or end the workers of its parent."""
    global _shared_lock
    for pool in _shared.values():
        atexit.unregister(pool.close)
    _shared.clear()
    _shared_lock = threading.Lock()


os.register_at_fork(after_in_child=_reset_after_fork)
