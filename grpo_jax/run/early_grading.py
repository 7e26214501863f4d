"""Grades groups whose completions have all ended while the devices decode the others.

One thread samples: it dispatches blocks of decode steps and does nothing else, so the devices have
their next block whatever time the rewards take. Grading is in the thread of the caller.
"""

import itertools
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import CancelledError, Future, InvalidStateError, ThreadPoolExecutor
from contextlib import suppress
from queue import Empty, SimpleQueue
from typing import Any

import jax

from grpo_jax.run.grading import RolloutRewards
from grpo_jax.types import Rollout


def dispatch_first(blocks: Iterator[Rollout]) -> Iterator[Rollout]:
    """Dispatch the first block now, and the others when they are asked for."""
    return itertools.chain([next(blocks)], blocks)


def grade_while_sampling(
    blocks: Iterable[Rollout],
    grade: Callable[[Rollout, Any], RolloutRewards],
    grade_early: Callable[[Iterable[Rollout]], Any],
) -> tuple[Rollout, RolloutRewards, float]:
    """Sample a rollout in a thread and grade it meanwhile.

    An error, or an interrupt, of grading ends sampling after the block that is being dispatched. An
    error of sampling is raised here, once.

    Args:
      blocks: the partial rollout after each block, see `sample.sample_blocks`.
      grade: takes the whole rollout and the result of `grade_early`.
      grade_early: takes the partial rollouts, see `Grader.grade_early`.

    Returns:
      The rollout on the devices, its rewards, and the seconds that sampling took.
    """
    started = time.perf_counter()
    growing = GrowingRollout()
    with ThreadPoolExecutor(max_workers=1) as thread:
        sampling = thread.submit(growing.sample, blocks)
        try:
            early = grade_early(growing)
            rollout_rewards = grade(growing.whole.result(), early)
        finally:
            growing.whole.cancel()  # no effect on a rollout that is whole
    return growing.whole.result(), rollout_rewards, sampling.result() - started


class GrowingRollout:
    """A rollout on its way from the thread that samples to the one that grades.

    Iterating over it yields the partial rollout after decoded blocks, each time the newest one, and
    ends when the last block is dispatched.

    Attributes:
      whole: the rollout after the last block.
    """

    def __init__(self) -> None:
        self.whole: Future[Rollout] = Future()
        self._decoded: SimpleQueue[Rollout | None] = SimpleQueue()

    def __iter__(self) -> Iterator[Rollout]:
        return iter(self._decoded.get, None)

    def sample(self, blocks: Iterable[Rollout]) -> float:
        """Dispatch all blocks, and return the time when the rollout is ready."""
        try:
            newest = self._dispatch(blocks)
            self.whole.set_result(newest)
            self._decoded.put(None)
            jax.block_until_ready(newest)
            return time.perf_counter()
        except BaseException as error:
            with suppress(InvalidStateError):  # the rollout is whole, or grading has failed
                self.whole.set_exception(error)
            self._decoded.put(None)
            raise

    def _dispatch(self, blocks: Iterable[Rollout]) -> Rollout:
        previous = None
        for rollout in blocks:
            if self.whole.cancelled():
                raise CancelledError
            if previous is not None:  # it is decoded once the next block has been dispatched
                with suppress(Empty):
                    self._decoded.get_nowait()  # an older one that nobody has taken
                self._decoded.put(previous)
            previous = rollout
        if previous is None:
            raise ValueError('the sampler yielded no block')
        return previous
