"""Bundles: the completions of a microbatch that are processed together, and in how many columns.

A bundle is the whole microbatch, or some of its completions; they are bundled by length, the
longest first. A bundle is processed in the smallest compiled number of columns (token positions)
that holds its longest completion. Completions are numbered within each device's share of the
groups, so that none moves to another device.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Int, Shaped

from grpo_jax import models
from grpo_jax.engine import shares
from grpo_jax.sharding import anchor, data_devices
from grpo_jax.types import Batch, Prompts

NARROWEST = 32  # columns; halving a width below this is not worth another compilation

Carry = Any  # what is accumulated from bundle to bundle
Outputs = dict[str, jax.Array]  # name -> [b, g, w]


def in_smallest_width(
    function: Callable[[Carry, Batch], tuple[Carry, Outputs]], carry: Carry, part: Batch, count: int
) -> tuple[Carry, Outputs]:
    """`function(carry, part)` in the fewest of `count` compiled widths that hold all tokens.

    Outputs [b, g, w] are padded with zeros to [b, g, T].
    """
    mask = part.rollout.mask
    longest = mask.shape[-1]

    def branch(width: int) -> Callable[[Carry, Batch], tuple[Carry, Outputs]]:
        def run(carry: Carry, part: Batch) -> tuple[Carry, Outputs]:
            rows, prompts = split_prompts(part)
            rows = jax.tree.map(lambda x: x[:, :, :width] if x.ndim > 2 else x, rows)
            carry, outputs = function(carry, join_prompts(rows, prompts))
            padding = ((0, 0), (0, 0), (0, longest - width))
            return carry, jax.tree.map(lambda x: jnp.pad(x, padding), outputs)

        return run

    widths = widths_of(longest, count)
    if len(widths) == 1:
        return branch(longest)(carry, part)
    needed = jnp.where(mask, jnp.arange(1, longest + 1), 0).max()
    choice = jnp.searchsorted(jnp.asarray(widths), needed)
    return jax.lax.switch(choice, [branch(width) for width in widths], carry, part)


def widths_of(longest: int, count: int) -> tuple[int, ...]:
    """Up to `count` numbers of columns, ascending: ..., T / 4, T / 2, T (rounded up)."""
    widths = [longest]
    while len(widths) < count and widths[-1] > NARROWEST:
        widths.append(-(-widths[-1] // 2))
    return tuple(reversed(widths))


def check_rows(rows: int, total: int, mesh: Mesh | None = None) -> None:
    """Checks that the completions of a microbatch can be bundled.

    Args:
      rows: completions processed at a time; 0: all.
      total: completions of a microbatch.
      mesh: the devices over which each bundle is spread.

    Raises:
      ValueError: they cannot; the message lists the numbers that work.
    """
    shards = data_devices(mesh)
    works = [n for n in range(shards, total + 1, shards) if total % n == 0]
    if rows and rows not in works:
        raise ValueError(
            f'rows={rows} does not cut the {total} completions of a microbatch over fsdp={shards} '
            f'into equal bundles: use 0 (all at once), or one of {", ".join(map(str, works))}'
        )


def by_length(
    mask: Bool[Array, 'm G T'], shards: int, rows: int
) -> Int[Array, 'bundles shards size']:
    """The completions of each bundle, `rows / shards` from every shard, the longest first."""
    lengths = mask.sum(-1).reshape(shards, -1)
    order = jnp.argsort(-lengths, axis=1, stable=True)
    return order.reshape(shards, -1, rows // shards).swapaxes(0, 1)


def take_rows(
    part: Batch, index: Int[Array, 'shards size'], groups: Int[Array, 'shards size']
) -> Batch:
    """A batch of groups of one: the completions `index` and the prompts of their groups."""
    rows, prompts = split_prompts(part)
    rows = jax.tree.map(lambda x: take(x.reshape(-1, *x.shape[2:]), index)[:, None], rows)
    return join_prompts(rows, jax.tree.map(lambda x: take(x, groups), prompts))


def take_prompts(prompts: models.KeyValues, groups: Int[Array, 'shards size']) -> models.KeyValues:
    """Keys and values [L, shards * size, ...] of the prompts of these groups."""
    return jax.tree.map(lambda x: take(x.swapaxes(0, 1), groups).swapaxes(0, 1), prompts)


def put_back(
    x: Shaped[Array, 'bundles rows 1 T'],
    order: Int[Array, 'bundles shards size'],
    shape: tuple[int, ...],
) -> Shaped[Array, 'm G T']:
    """The outputs of all bundles, in the places that `order` took their completions from."""
    shards = order.shape[1]
    x = x.reshape(*order.shape, -1).swapaxes(0, 1).reshape(shards, -1, shape[-1])
    place = jnp.argsort(order.swapaxes(0, 1).reshape(shards, -1), axis=1)
    return anchor(shares.take(x.reshape(-1, shape[-1]), place).reshape(shape))


def take(x: Shaped[Array, 'n ...'], index: Int[Array, 'shards k']) -> Shaped[Array, 'm ...']:
    """The entries `index` of each shard's share of x, flattened over shards."""
    return shares.take(x, index).reshape(-1, *x.shape[1:])


def split_prompts(part: Batch) -> tuple[Batch, Prompts]:
    """A batch without its prompts, and the prompts."""
    absent: Any = None
    return part._replace(rollout=part.rollout._replace(prompts=absent)), part.rollout.prompts


def join_prompts(rows: Batch, prompts: Prompts) -> Batch:
    """The inverse of `split_prompts`."""
    return rows._replace(rollout=rows.rollout._replace(prompts=prompts))
