"""Numbers that processes share: the parts of a batch, collectives, and copies on every host."""

import functools
import itertools
import re
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding, PartitionSpec

from grpo_jax.run.hosts.state import WAIT, ProcessesError, client, count, index, late

T = TypeVar('T')

_rounds = itertools.count()


def share(size: int) -> np.ndarray:
    """The numbers of the groups that this process grades, of `size`; all with one process."""
    return shares(size)[index()]


def shares(size: int) -> list[np.ndarray]:
    """The parts of `size` groups that the processes grade, as even as possible."""
    bounds = [size * k // count() for k in range(count() + 1)]
    return [np.arange(*pair) for pair in itertools.pairwise(bounds)]


def gather(tree: T, what: str) -> list[T]:
    """Gathers the host arrays of all processes in one collective.

    Args:
      tree: a tree of host arrays, which have the same shapes and types in all processes.
      what: what the processes come to, for the error message.

    Returns:
      The tree of each process.

    Raises:
      ProcessesError: one of them did not come within `WAIT` seconds.
    """
    if count() == 1:
        return [tree]
    leaves, structure = jax.tree.flatten(tree)
    # The order of the devices decides that of the rows, so each holds its process's number.
    arrays = [np.asarray(index()), *(np.asarray(leaf) for leaf in leaves)]
    # As bytes: JAX would convert 64-bit numbers.
    flat = np.concatenate([np.frombuffer(array.tobytes(), np.uint8) for array in arrays])
    _wait_for_all(what)
    rows = np.asarray(multihost_utils.process_allgather(flat))
    bounds = np.cumsum([array.nbytes for array in arrays])[:-1]
    found = {}
    for row in rows:
        number, *parts = (
            np.frombuffer(part.tobytes(), array.dtype).reshape(array.shape)
            for part, array in zip(np.split(row, bounds), arrays, strict=True)
        )
        found[int(number)] = jax.tree.unflatten(structure, parts)
    return [found[process] for process in range(count())]


def fetch(tree: T) -> T:
    """Copies arrays to the host; those that are split over processes are gathered first."""
    copies: T = jax.device_get(replicate(tree))
    return copies


def select(function: Callable[..., T], *trees: Any) -> T:
    """Calls a function that selects entries of arrays, where they are.

    Arrays that are split over processes stay on the devices; others are copied to the host.

    Args:
      function: of the module that computes, NumPy or `jax.numpy`, and the trees.
      *trees: arrays, and indices that are the same in all processes.
    """
    if _split(trees):
        return _program(function)(*trees)
    return function(np, *jax.device_get(trees))


@functools.cache
def _program(function: Callable[..., T]) -> Callable[..., T]:
    return jax.jit(functools.partial(function, jnp))


def replicate(tree: T) -> T:
    """Arrays that every process holds; dispatches a program for those that some do not hold."""
    split = _split(tree)
    return _replicator(split[0].sharding.mesh)(tree) if split else tree


def _split(tree: Any) -> list[Any]:
    """The arrays of which this process holds a part only."""
    return [
        x
        for x in jax.tree.leaves(tree)
        if isinstance(x, jax.Array) and not (x.is_fully_addressable or x.is_fully_replicated)
    ]


@functools.cache
def _replicator(mesh: jax.sharding.Mesh) -> Callable[[Any], Any]:
    return jax.jit(lambda tree: tree, out_shardings=NamedSharding(mesh, PartitionSpec()))


def _wait_for_all(what: str) -> None:
    try:
        client().wait_at_barrier(f'grpo_jax/{next(_rounds)}', 1000 * WAIT)
    except jax.errors.JaxRuntimeError as error:
        missing = [int(n) for n in re.findall(r'^(\d+)$', str(error), re.MULTILINE)]
        if not missing:
            raise
        raise ProcessesError(late(missing, what)) from error
