"""A pool of processes that compare expressions, with an enforced deadline for each comparison.

A worker is `worker.py` run as a script. It shares nothing with this process, so threads, JAX
devices and notebooks do not interfere. A worker takes seconds to import SymPy, so it compares in a
copy of its warm process: where the copy is killed, the next one is there in milliseconds, and a
deadline does not delay other comparisons.
"""

import atexit
import importlib.util
import os
import pathlib
import sys
import threading
from collections.abc import Sequence

from grpo_jax.rewards.processes import Lost, ProcessPool

MEMORY = 2**30  # bytes of address space of a worker
_SCRIPT = pathlib.Path(__file__).with_name('worker.py')


class Pool(ProcessPool):
    """Up to `size` workers, started when there is something to compare; see `ProcessPool`."""

    def __init__(
        self, size: int | None = None, *, memory: int = MEMORY, script: pathlib.Path = _SCRIPT
    ):
        # `-P` keeps the script's folder, whose numbers.py would hide the standard library's, off
        # the search path.
        super().__init__([sys.executable, '-P', str(script), str(memory)], size)

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
        results = self.run(trees, seconds=seconds)
        return [None if isinstance(result, Lost) else result == 'true' for result in results]

    def why_none_starts(self) -> str:
        """Return the error for workers that end before they are ready."""
        if importlib.util.find_spec('math_verify') is None:
            return 'comparing answers needs math-verify: pip install math-verify'
        return super().why_none_starts()


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
