"""Gathers and scatters within each device's share of an array, so that no entry changes device."""

import jax
from jaxtyping import Array, Int, Shaped

from grpo_jax.sharding import anchor_rows


def take(x: Shaped[Array, 'n ...'], index: Int[Array, 'shards ...']) -> Shaped[Array, 'shards ...']:
    """Entries `index` of each share of x, whose first axis is shares * entries.

    Args:
      x: [shards * n, ...].
      index: i32[shards, ...], numbered within a share.

    Returns:
      [shards, *index.shape[1:], *x.shape[1:]].
    """
    shares = x.reshape(len(index), -1, *x.shape[1:])
    return anchor_rows(jax.vmap(lambda share, i: share[i])(shares, index))


def put(
    x: Shaped[Array, 'n ...'], index: Int[Array, 'shards k'], values: Shaped[Array, 'm ...']
) -> Shaped[Array, 'n ...']:
    """Writes values [shards * k, ...] over the entries `index` of each share of x.

    An index past the end of the share is ignored.
    """
    shares, values = (y.reshape(len(index), -1, *x.shape[1:]) for y in (x, values))
    write = jax.vmap(lambda share, i, new: share.at[i].set(new, mode='drop'))
    return anchor_rows(write(shares, index, values).reshape(x.shape))
