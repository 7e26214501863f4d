"""Judging while the devices sample: parts of a batch beside later ones, groups beside longer ones.

One thread samples: it dispatches blocks of columns, and waits for nothing else. So the next block
is under way before anyone looks at the one before, however long the rewards take.
"""

import itertools
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import CancelledError, Future, InvalidStateError, ThreadPoolExecutor
from contextlib import suppress
from queue import Empty, SimpleQueue
from typing import Any

import jax
import jax.numpy as jnp

from grpo_jax.rewards import pool
from grpo_jax.types import Rollout
from grpo_jax.verdicts import Verdict, together

Blocks = Iterable[Rollout]  # a rollout as it is after each of them, see `sample.blocks`


def eager_first(parts: Iterator[Iterator[Rollout]]) -> Iterator[Iterator[Rollout]]:
    """The same parts, of the first of which the first block is dispatched now."""
    first = next(parts)
    return itertools.chain([itertools.chain([next(first)], first)], parts)


def wait_and_judge(
    parts: Iterable[Blocks],
    judge: Callable[[Rollout, Any], Verdict],
    early: Callable[[Iterable[Rollout]], Any],
    count: int,
) -> tuple[Rollout, Verdict, float]:
    """Rewards each of `count` parts while it, and the next, is sampled.

    Args:
      parts: a batch.
      judge: what is said of a whole part, with what `early` has returned.
      early: what is said of groups as they end; given the part at times, and after that judge.
      count: how many parts.

    Returns:
      the whole rollout on the devices, what the rewards say of it, and the seconds that sampling
      took.
    """
    began, before = time.perf_counter(), pool.timeouts()
    growing = [_Growing() for _ in range(count)]

    def one(part: _Growing) -> Verdict:
        found = early(part)
        return judge(part.whole.result(), found)

    with ThreadPoolExecutor(max_workers=1 + count) as threads:
        sampling = threads.submit(_draw, parts, growing)
        try:
            # A single one in the main thread, where an interrupt or a signal can end a reward.
            verdicts = list((map if count == 1 else threads.map)(one, growing))
            seconds = sampling.result() - began
        finally:
            for part in growing:
                part.whole.cancel()  # where a reward has failed, nobody waits for what is missing
    verdict = together(verdicts)
    # Parts that are judged at once have each counted the others' timeouts too.
    scores = verdict.judged.scores._replace(timeouts=pool.timeouts() - before)
    verdict = verdict._replace(judged=verdict.judged._replace(scores=scores))
    drawn = [part.whole.result() for part in growing]
    rollout = drawn[0] if count == 1 else jax.tree.map(lambda *x: jnp.concatenate(x), *drawn)
    return rollout, verdict, seconds


class _Growing:
    """A part on its way from the thread that samples to the one that judges.

    Iterating over it gives the part as it is after blocks that have been decoded, each time the
    newest; it ends when the last block is dispatched.

    Attributes:
      whole: the part after that block.
    """

    def __init__(self) -> None:
        self.whole: Future[Rollout] = Future()
        self._decoded: SimpleQueue[Rollout | None] = SimpleQueue()

    def __iter__(self) -> Iterator[Rollout]:
        return iter(self._decoded.get, None)

    def fill(self, blocks: Blocks) -> Rollout:
        decoded = None
        for rollout in blocks:
            if self.whole.cancelled():
                raise CancelledError
            if decoded is not None:
                with suppress(Empty):
                    self._decoded.get_nowait()  # nobody has seen it, and the newer one has it all
                self._decoded.put(decoded)
            decoded = rollout
        assert decoded is not None
        self.whole.set_result(decoded)
        self._decoded.put(None)
        return decoded

    def fail(self, error: BaseException) -> None:
        with suppress(InvalidStateError):  # it is there, or nobody waits for it
            self.whole.set_exception(error)
        self._decoded.put(None)


def _draw(parts: Iterable[Blocks], growing: list[_Growing]) -> float:
    """Samples all parts; the time when all are there."""
    try:
        for part, blocks in zip(growing, parts, strict=True):
            newest = part.fill(blocks)
        jax.block_until_ready(newest)
        return time.perf_counter()
    except BaseException as error:
        for part in growing:
            part.fail(error)  # wherever it happened: what comes behind is missing as well
        raise
