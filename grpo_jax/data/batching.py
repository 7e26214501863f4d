"""Form batches of a table: an endless shuffled sequence, or every row once and in order."""

from collections.abc import Iterator
from typing import Protocol, TypeVar, cast, runtime_checkable

import numpy as np
from jaxtyping import Int

from grpo_jax.types import Prompts, Rollout

BatchT = TypeVar('BatchT', bound=Prompts | Rollout, covariant=True)


@runtime_checkable
class Table(Protocol[BatchT]):
    """Rows in memory that batches are selected from: a PromptTable or a DemonstrationTable."""

    def __len__(self) -> int: ...

    def select(self, positions: Int[np.ndarray, ' B']) -> BatchT:
        """Return the batch of the rows at B positions."""
        ...


@runtime_checkable
class BatchSequence(Protocol[BatchT]):
    """An endless sequence of batches with random access."""

    def __getitem__(self, k: int, /) -> BatchT: ...


def batches(
    table: Table[BatchT], batch_size: int, *, seed: int, name: str = 'batch_size', split: str = ''
) -> BatchSequence[BatchT]:
    """Return an endless sequence of batches in random order.

    Element k is a pure function of the table, the batch size, the seed and k. It takes the same
    time for any k, so there is no iterator whose state would have to be saved: a run resumes, or
    draws more prompts, by a counter of the batches used so far.

    Batches pass through the table in epochs. Each epoch has every row once, in its own random
    order. A batch may extend over the end of an epoch and can then have a row twice; every batch is
    full, and no row is left out.

    Args:
      table: rows to select from.
      batch_size: rows in a batch.
      seed: seed of the order.
      name: name of the batch size in error messages.
      split: name of the split that the table has the usable rows of, for error messages.

    Returns:
      A sequence of Prompts for a PromptTable, of Rollout for a DemonstrationTable.

    Raises:
      ValueError: the batch is larger than the table or empty, or the seed is negative.
    """
    size = len(table)
    check_batch_size(batch_size, size, name=name, split=split)
    if seed < 0:
        raise ValueError(f'seed is {seed}: make it at least 0')
    import grain  # imports JAX and Orbax

    # Grain shuffles epoch e by seed + e. Without this hash, the epochs of seed 1 would be those of
    # seed 0 from the second on.
    hashed_seed = int(np.random.SeedSequence(seed).generate_state(1)[0])
    order = grain.MapDataset.range(size).shuffle(seed=hashed_seed).repeat().batch(batch_size)
    return cast(BatchSequence[BatchT], order.map(table.select))


def check_batch_size(
    batch_size: int, size: int, *, name: str = 'batch_size', split: str = ''
) -> None:
    """Check that a table has the rows of a batch.

    Args:
      batch_size: rows in a batch.
      size: rows of the table.
      name: see `batches`.
      split: see `batches`.

    Raises:
      ValueError: the batch is larger than the table or empty.
    """
    if not 1 <= batch_size <= size:
        of = f'the usable rows of the split {split!r}' if split else 'the rows of the table'
        raise ValueError(f'{name} is {batch_size}: make it 1 to {size}, {of}')


def in_order(table: Table[BatchT], batch_size: int) -> Iterator[tuple[BatchT, int]]:
    """Yield every row once, in batches in the order of the table.

    The last batch is filled up with copies of the last row, so that all batches have one shape and
    a program that takes them is compiled once.

    Args:
      table: rows to select from.
      batch_size: rows in a batch.

    Yields:
      A batch of the type that `batches` returns, and the number of its rows before the copies.
    """
    size = len(table)
    for start in range(0, size, batch_size):
        positions = np.arange(start, start + batch_size)
        yield table.select(np.minimum(positions, size - 1)), min(batch_size, size - start)
