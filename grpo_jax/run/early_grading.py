"""Grades groups whose completions have all ended while the devices decode the others.

One thread only dispatches blocks of decode steps, so the devices always have a next block, however
long the rewards take. The calling thread grades, and dispatches nothing until the last block has
been dispatched: several processes have to dispatch the same programs in the same order.
"""

import itertools
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import CancelledError, Future, InvalidStateError, ThreadPoolExecutor
from contextlib import suppress
from queue import Empty, SimpleQueue
from typing import Any

import jax

from grpo_jax.run import hosts
from grpo_jax.run.graded_texts import without_records
from grpo_jax.run.rollout_rewards import RolloutRewards
from grpo_jax.types import Rollout


def dispatch_first(blocks: Iterator[Rollout]) -> Iterator[Rollout]:
    """Dispatch the first block now, and the others when they are asked for."""
    return itertools.chain([next(blocks)], blocks)


def grade_while_sampling(
    blocks: Iterable[Rollout],
    grade: Callable[[Rollout, Any], RolloutRewards],
    grade_early: Callable[[Iterable[Rollout]], Any],
) -> tuple[Rollout, RolloutRewards, float]:
    """Sample a rollout in a thread, and grade it at the same time.

    An error or interrupt while grading ends the sampling after the block that is being dispatched.
    An error while sampling is raised here, once.

    Args:
      blocks: the partial rollout after each block, see `sample.sample_blocks`.
      grade: takes the whole rollout and the result of `grade_early`, or its error if there are
        several processes.
      grade_early: takes the partial rollouts, see `Grader.grade_early`.

    Returns:
      The rollout on the devices, its rewards, and the seconds that sampling took.
    """
    started = time.perf_counter()
    growing = GrowingRollout()
    with ThreadPoolExecutor(max_workers=1) as thread:
        sampling = thread.submit(growing.sample, blocks)
        try:
            try:
                early = grade_early(growing)
            except Exception as error:
                if hosts.count() == 1:
                    raise
                early = error  # the others wait for this process to sample to the end
            rollout_rewards = grade(growing.whole.result(), early)
        finally:
            growing.whole.cancel()  # no effect if the rollout is complete
    return growing.whole.result(), rollout_rewards, sampling.result() - started


class GrowingRollout:
    """A growing rollout, passed from the thread that samples to the one that grades.

    Iterating over it yields the newest partial rollout whose blocks are decoded, and ends when the
    last block is dispatched.

    Attributes:
      whole: the complete rollout, after the last block.
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
            with suppress(InvalidStateError):  # the rollout is complete, or grading has failed
                self.whole.set_exception(error)
            self._decoded.put(None)
            raise

    def _dispatch(self, blocks: Iterable[Rollout]) -> Rollout:
        previous = None
        for rollout in blocks:
            if self.whole.cancelled():
                raise CancelledError
            if previous is not None:  # it is decoded once the next block has been dispatched
                decoded = hosts.replicate(without_records(previous))
                with suppress(Empty):
                    self._decoded.get_nowait()  # replace an older one that was not consumed
                self._decoded.put(decoded)
            previous = rollout
        if previous is None:
            raise ValueError('the sampler yielded no block')
        return previous
