"""Attention of long sequences: a loop over blocks of queries, with the gradient of `blocked.py`.

`blocked.py` cuts the queries into a few blocks, all in the program: the scores of one grow with the
square of the length. Here blocks have a fixed size, so the scores and masks in memory at a time
grow with the length. Keys after the queries are left out in as few steps as there are stretches of
queries, each of which is one loop.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from grpo_jax.models.kernels.blocked import (
    Gradients,
    KeysValues,
    Masks,
    Queries,
    Rows,
    RowSums,
    add_gradients,
    block_gradient,
    softmax_attention,
)

BLOCK, STRETCHES = 256, 8  # queries of a block, and the largest number of stretches

# (start, size, stop, described) -> the masks of `size` queries from `start` on, with the own keys
# of the queries before `stop`.
MasksOf = Callable[[Any, int, int, Any], Masks]
_Residuals = tuple[Queries, KeysValues, Any, Queries, RowSums]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def looped_attention(
    softcap: float, masks_of: MasksOf, q: Queries, keys_values: KeysValues, described: Any
) -> tuple[Queries, RowSums]:
    """`blocked.recomputed_attention`, with masks that are computed for each block.

    Args:
      softcap: of the scores.
      masks_of: returns the masks of a block.
      q: scaled queries.
      keys_values: of each piece; the last one ends with those of the queries.
      described: arrays that `masks_of` needs.
    """
    outputs = []
    for stretch in _stretches(q.shape[2]):
        read = _read(keys_values, q.shape[2] - stretch.stop)

        def run(_: None, start: Any, size: int, stretch: slice = stretch, read: Any = read) -> Any:
            masks = masks_of(start, size, stretch.stop, described)
            return None, softmax_attention(softcap, _take(q, start, size), read, masks)

        outputs.append(_over_blocks(run, stretch, None)[1])
    out, log_sum = zip(*outputs, strict=True)
    return jnp.concatenate(out, axis=2), jnp.concatenate(log_sum, axis=2)


def _forward(
    softcap: float, masks_of: MasksOf, q: Queries, keys_values: KeysValues, described: Any
) -> tuple[tuple[Queries, RowSums], _Residuals]:
    out, log_sum = looped_attention(softcap, masks_of, q, keys_values, described)
    return (out, log_sum), (q, keys_values, described, out, log_sum)


def _backward(
    softcap: float,
    masks_of: MasksOf,
    residuals: _Residuals,
    cotangents: tuple[Queries, RowSums],
) -> tuple[Queries, KeysValues, None]:
    q, keys_values, described, out, log_sum = residuals
    grad_out, _ = cotangents  # nothing uses the second output, so its cotangent is 0
    rows = Rows(log_sum, grad_out, jnp.einsum('gksrh,gksrh->gksr', grad_out, out))
    grad_queries: list[Array] = []
    total: Gradients = ()
    for stretch in _stretches(q.shape[2]):
        read = _read(keys_values, q.shape[2] - stretch.stop)

        def run(
            total: Any, start: Any, size: int, stretch: slice = stretch, read: Any = read
        ) -> Any:
            block = Rows(*(_take(x, start, size) for x in rows))
            masks = masks_of(start, size, stretch.stop, described)
            grad_q, grad_read = block_gradient(softcap, _take(q, start, size), read, masks, block)
            return add_gradients(total, tuple(grad_read)), grad_q

        zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), read)
        grad_read, grad_q = _over_blocks(run, stretch, zeros)
        grad_queries.append(grad_q)
        total = add_gradients(total, grad_read)
    grad_q = jnp.concatenate(grad_queries, axis=2).astype(q.dtype)
    return grad_q, jax.tree.map(lambda x, y: x.astype(y.dtype), total, keys_values), None


looped_attention.defvjp(_forward, _backward)


def _stretches(length: int) -> list[slice]:
    size = -(-length // (STRETCHES * BLOCK)) * BLOCK
    return [slice(i, min(i + size, length)) for i in range(0, length, size)]


def _read(keys_values: KeysValues, after: int) -> tuple[tuple[Array, Array], ...]:
    """The keys and values without the last `after` of the last piece."""
    *past, (k, v) = keys_values
    stop = k.shape[-2] - after
    return (*past, (k[..., :stop, :], v[..., :stop, :]))


def _take(x: Float[Array, 'G K S *axes'], start: Any, size: int) -> Float[Array, 'G K size *axes']:
    return jax.lax.dynamic_slice_in_dim(x, start, size, axis=2)


def _over_blocks(run: Callable[..., tuple[Any, Any]], stretch: slice, carry: Any) -> Any:
    """Runs (carry, start, size) -> (carry, outputs of the block) for all blocks of a stretch.

    Returns:
      The last carry, and the outputs of all blocks, one after the other along axis 2.
    """
    count, rest = divmod(stretch.stop - stretch.start, BLOCK)
    parts = []
    if count:
        starts = stretch.start + BLOCK * jnp.arange(count)
        carry, stacked = jax.lax.scan(lambda carry, start: run(carry, start, BLOCK), carry, starts)
        parts.append(jax.tree.map(_join, stacked))
    if rest:
        carry, last = run(carry, stretch.stop - rest, rest)
        parts.append(last)
    return carry, jax.tree.map(lambda *x: jnp.concatenate(x, axis=2), *parts)


def _join(blocks: Float[Array, 'n G K S *axes']) -> Float[Array, 'G K nS *axes']:
    n, groups, heads, size, *rest = blocks.shape
    return jnp.moveaxis(blocks, 0, 2).reshape(groups, heads, n * size, *rest)
