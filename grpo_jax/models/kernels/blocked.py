"""Attention by plain products, a block of queries at a time; see `attention.attend`.

A piece's keys and values are [G, K, N, h] or shared by the group, [K, N, h], and its scores are
f32[G, K, S, R, N] or [K, G, S, R, N]: the natural order of its product. Each block of queries has a
mask `visible` for every piece, [S, N] or [G, S, N], of as many keys as it reads.
"""

import functools
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from grpo_jax.models.kernels.cpu import materialize

_MASKED_SCORE = -1e30  # finite, so that a fully masked piece gets weight 0 and not NaN

Queries = Float[Array, 'G K S R h']
RowSums = Float[Array, 'G K S R']
KeysValues = Sequence[tuple[Float[Array, '... _ h'], Float[Array, '... _ h']]]  # of each piece
Masks = Sequence[Bool[Array, '*_ _ _']]  # of a block of queries and each piece
Gradients = Sequence[tuple[Float[Array, '... _ h'], Float[Array, '... _ h']]]
_Residuals = tuple[Queries, KeysValues, Sequence[Masks], Queries, RowSums]


def cap_scores(scores: Float[Array, '*axes'], softcap: float) -> Float[Array, '*axes']:
    """Computes softcap * tanh(scores / softcap), or the scores themselves if softcap is 0."""
    return softcap * jnp.tanh(scores / softcap) if softcap else scores


def blocked_attention(
    softcap: float, q: Queries, keys_values: KeysValues, visible: Sequence[Masks]
) -> tuple[Queries, RowSums]:
    """The output in float32, and the logarithms of the softmax's denominators."""
    outputs = [softmax_attention(softcap, *b) for b in _cut_blocks(q, keys_values, visible)]
    out, log_sum = zip(*outputs, strict=True)
    return _concatenate_blocks(out), _concatenate_blocks(log_sum)


def _cut_blocks(
    q: Queries, keys_values: KeysValues, visible: Sequence[Masks]
) -> Iterator[tuple[Queries, KeysValues, Masks]]:
    """Yields each block's queries, the keys and values that they read, and the masks."""
    start = 0
    for masks in visible:
        stop = start + masks[0].shape[-2]
        read = [
            (k[..., : mask.shape[-1], :], v[..., : mask.shape[-1], :])
            for (k, v), mask in zip(keys_values, masks, strict=True)
        ]
        yield q[:, :, start:stop], read, masks
        start = stop


def _concatenate_blocks(blocks: Sequence[Array]) -> Array:
    return jnp.concatenate(blocks, axis=2) if len(blocks) > 1 else blocks[0]


def softmax_attention(
    softcap: float, q: Queries, keys_values: KeysValues, visible: Masks
) -> tuple[Queries, RowSums]:
    """`blocked_attention` for one block."""
    scores = [
        jnp.where(_of_scores(mask, k), cap_scores(_scores(q, k), softcap), _MASKED_SCORE)
        for (k, _), mask in zip(keys_values, visible, strict=True)
    ]
    shared = [_is_shared(k) for k, _ in keys_values]
    maxima = [s.max(-1, initial=_MASKED_SCORE) for s in scores]
    maximum = functools.reduce(jnp.maximum, map(_swap_rows, maxima, shared))
    maximum = jax.lax.stop_gradient(maximum)
    weights = [
        jnp.exp(s - _swap_rows(maximum, is_shared)[..., None])
        for s, is_shared in zip(scores, shared, strict=True)
    ]
    total = functools.reduce(jnp.add, map(_swap_rows, [w.sum(-1) for w in weights], shared))
    sums = [_weighted_sum(w, v) for w, (_, v) in zip(weights, keys_values, strict=True)]
    return functools.reduce(jnp.add, sums) / total[..., None], maximum + jnp.log(total)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def recomputed_attention(
    softcap: float, q: Queries, keys_values: KeysValues, visible: Sequence[Masks]
) -> tuple[Queries, RowSums]:
    """`blocked_attention` with a gradient that computes the scores again."""
    return blocked_attention(softcap, q, keys_values, visible)


def _attention_forward(
    softcap: float, q: Queries, keys_values: KeysValues, visible: Sequence[Masks]
) -> tuple[tuple[Queries, RowSums], _Residuals]:
    out, log_sum = blocked_attention(softcap, q, keys_values, visible)
    return (out, log_sum), (q, keys_values, visible, out, log_sum)


def _attention_backward(
    softcap: float, residuals: _Residuals, cotangents: tuple[Queries, RowSums]
) -> tuple[Queries, KeysValues, None]:
    q, keys_values, visible, out, log_sum = residuals
    grad_out, _ = cotangents  # nothing uses the second output, so its cotangent is 0
    mean = jnp.einsum('gksrh,gksrh->gksr', grad_out, out)
    grad_blocks: list[Array] = []
    grad_keys_values: Gradients = ()
    start = 0
    for q_block, read, masks in _cut_blocks(q, keys_values, visible):
        block = slice(start, start := start + q_block.shape[2])
        rows = Rows(*(x[:, :, block] for x in (log_sum, grad_out, mean)))
        grad_block, grad_read = block_gradient(softcap, q_block, read, masks, rows)
        grad_blocks.append(grad_block)
        grad_keys_values = add_gradients(grad_keys_values, grad_read)

    def cast(grad: Array, primal: Array) -> Array:
        return grad.astype(primal.dtype)

    grad_q = cast(_concatenate_blocks(grad_blocks), q)
    return grad_q, jax.tree.map(cast, tuple(grad_keys_values), keys_values), None


class Rows(NamedTuple):
    """What the backward pass needs of the queries of a block, besides themselves."""

    log_sum: RowSums
    grad_out: Queries
    mean: RowSums  # of grad_out * out: what the softmax's gradient subtracts


def block_gradient(
    softcap: float, q: Queries, keys_values: KeysValues, visible: Masks, rows: Rows
) -> tuple[Queries, Gradients]:
    """f32 gradients of the queries of a block, and of the keys and values that it reads.

    Products keep the order of the scores' axes: transposing scores costs more than the products.
    """
    log_sum, grad_out, mean = rows
    grad_q, grad_keys_values = jnp.zeros(q.shape, jnp.float32), []
    for (k, v), mask in zip(keys_values, visible, strict=True):
        shared = _is_shared(k)
        scores = _scores(q, k)
        capped = cap_scores(scores, softcap)
        weights = jnp.exp(capped - _swap_rows(log_sum, shared)[..., None])
        weights = jnp.where(_of_scores(mask, k), weights, 0.0)
        grad_scores = _scores(grad_out.astype(v.dtype), v) - _swap_rows(mean, shared)[..., None]
        grad_scores = grad_scores * weights
        if softcap:
            grad_scores = grad_scores * (1 - jnp.square(capped / softcap))
        grad_q += _weighted_sum(grad_scores, k)
        grad_k, grad_v = _sum_of_rows(q, grad_scores, k), _sum_of_rows(grad_out, weights, v)
        grad_keys_values.append((grad_k, grad_v))
    return grad_q, grad_keys_values


def add_gradients(total: Gradients, new: Gradients) -> Gradients:
    """Adds trees of [..., N, h]; a later block may read more keys than the blocks before it."""

    def add(x: Array, y: Array) -> Array:
        keys = x.shape[-2]
        if keys == y.shape[-2]:
            return x + y
        return jnp.concatenate([x + y[..., :keys, :], y[..., keys:, :]], axis=-2)

    return jax.tree.map(add, total, new) if total else new


recomputed_attention.defvjp(_attention_forward, _attention_backward)


# Products


def _is_shared(k: Array) -> bool:
    return k.ndim == 3


def _of_scores(mask: Bool[Array, '*_ S N'], k: Array) -> Bool[Array, '... 1 N']:
    """A mask in the order of the axes of the scores with these keys."""
    mask = mask[..., None, :]
    return mask if mask.ndim == 3 or _is_shared(k) else mask[:, None]


def _scores(q: Queries, k: Float[Array, '... N h']) -> Float[Array, '_ _ S R N']:
    """Products of each query with each key."""
    product = 'gksrh,knh->kgsrn' if _is_shared(k) else 'gksrh,gknh->gksrn'
    return jnp.einsum(product, q, k, preferred_element_type=jnp.float32)


def _weighted_sum(
    weights: Float[Array, '_ _ S R N'], v: Float[Array, '... N h']
) -> Float[Array, 'G K S R h']:
    """f32 sums of the values by the weights of each query."""
    product = 'kgsrn,knh->kgsrh' if _is_shared(v) else 'gksrn,gknh->gksrh'
    out = jnp.einsum(product, weights.astype(v.dtype), v, preferred_element_type=jnp.float32)
    return _swap_rows(out, _is_shared(v))


def _sum_of_rows(
    rows: Queries, weights: Float[Array, '_ _ S R N'], like: Float[Array, '*axes N h']
) -> Float[Array, '*axes N h']:
    """f32 sums of the rows by the weights of each key, in the shape of `like`."""
    product = 'gksrh,kgsrn->khn' if _is_shared(like) else 'gksrh,gksrn->gkhn'
    rows, weights = rows.astype(like.dtype), weights.astype(like.dtype)
    out = jnp.einsum(product, rows, weights, preferred_element_type=jnp.float32)
    return materialize(out).swapaxes(-1, -2)


def _swap_rows(x: Array, shared: bool) -> Array:
    """Swaps the leading G and K axes of a shared piece's array; its own inverse."""
    return x.swapaxes(0, 1) if shared else x
