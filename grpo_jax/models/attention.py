"""Attention of a group's queries over several pieces of keys and values.

A completion attends to its prompt (stored once for the group), to its own earlier tokens and, while
decoding, to a cache of them. Each piece gives partial sums that are merged as in online softmax
(Milakov and Gimelshein, arXiv 1805.02867), so pieces are never concatenated and the prompt never
repeated G times.
"""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

NOWHERE = 2**30  # position of a key that no query may read: all of them stand before it
STRIPE, STRIPES = 64, 8  # least queries that are computed together, and most parts of them
OWNED_STRIPE = 128  # least queries of sequences that lie behind each other
_MASKED = -1e30  # finite, so that a fully masked piece gives weight 0 and not NaN


class Piece(NamedTuple):
    """Keys and values of N positions, either of each row or shared by all rows of the group."""

    k: jax.Array  # [G, K, N, h], or [K, N, h] when shared
    v: jax.Array  # like k
    positions: jax.Array  # i32[N], where they stand; NOWHERE where there is none
    # Where several sequences lie behind each other, query s reads keys of the owners that it names:
    # both or neither.
    owner: jax.Array | None = None  # i32[N]
    read_by: jax.Array | None = None  # i32[S, names]


class Stacks(NamedTuple):
    """Keys and values of all layers, of the prompts and of the rows' tokens before."""

    prompt: tuple[jax.Array, jax.Array]  # [L, B, K, P, h] each
    own: tuple[jax.Array, jax.Array]  # [L, B, G, K, W, h] each


def joined(shared: Piece, own: Piece) -> Piece:
    """One shared piece of both for a group of one row: nothing is repeated, and calls are halved.

    Args:
      shared: keys and values [..., K, M, h].
      own: [..., 1, K, N, h], with positions [..., N].

    Returns:
      [..., K, M + N, h] and positions [..., M + N], without owners.
    """
    k, v = (
        jnp.concatenate([x, y.squeeze(-4)], axis=-2)
        for x, y in ((shared.k, own.k), (shared.v, own.v))
    )
    return Piece(k, v, jnp.concatenate([shared.positions, own.positions], axis=-1))


def attend(
    q: jax.Array,
    pieces: Sequence[Piece],
    positions: jax.Array,
    *,
    scale: float,
    softcap: float = 0.0,
    window: jax.Array | None = None,
    recompute: bool = False,
) -> jax.Array:
    """Causal softmax attention over the union of the pieces, scores and sums in float32.

    Args:
      q: [G, S, H, h] rotated queries of G rows, S positions each.
      pieces: every query must see at least one position of them. The last S of the last one are
        the queries' own, and no query sees any of them behind its own.
      positions: i32[S], where the queries stand; a query sees keys up to its own position.
      scale: of the scores.
      softcap: scores are softcap * tanh(score / softcap), unless it is 0 (Gemma 2, arXiv
        2408.00118, section 2).
      window: i32[], how many positions a query sees, its own counted; None is all.
      recompute: the gradient computes the scores again instead of keeping them, as Dao et al.
        (arXiv 2205.14135, algorithm 4) do; it has no derivative of its own.

    Returns:
      [G, S, H, h] in the dtype of q.
    """
    rows, length, heads, width = q.shape
    kv_heads = pieces[0].k.shape[-3]
    # [G, K, S, R, h]: the R query heads that read one key/value head become rows of its product.
    q = q.reshape(rows, length, kv_heads, heads // kv_heads, width).transpose(0, 2, 1, 3, 4)
    q = q * jnp.asarray(scale, q.dtype)
    form = _recomputed if recompute else _in_stripes
    keys_values = tuple((piece.k, piece.v) for piece in pieces)
    least = STRIPE if pieces[-1].owner is None else OWNED_STRIPE
    stripes = _stripes(length, least)
    visible = tuple(_read_by(stripe, pieces, positions, window) for stripe in stripes)
    # Compilers for CPUs would compare positions anew for every score.
    out, _ = form(softcap, q, keys_values, jax.lax.optimization_barrier(visible))
    return out.astype(q.dtype).transpose(0, 2, 1, 3, 4).reshape(rows, length, heads, width)


def _stripes(length: int, least: int) -> list[slice]:
    """Parts of the queries, none of which is computed with keys that stand behind all of it."""
    size = max(least, -(-length // STRIPES))
    return [slice(i, min(i + size, length)) for i in range(0, length, size)]


def _read_by(stripe: slice, pieces: Sequence[Piece], positions: jax.Array, window):
    """Which keys each query of a stripe reads: bool[S, N] for each piece, of its first N keys.

    None of the queries' own that stands after the stripe.
    """
    *past, own = pieces
    stop = len(own.positions) - len(positions) + stripe.stop
    owner = None if own.owner is None else own.owner[:stop]
    own = own._replace(positions=own.positions[:stop], owner=owner)
    return tuple(_visible(piece, positions, window, stripe) for piece in (*past, own))


def _visible(piece: Piece, positions: jax.Array, window, stripe: slice) -> jax.Array:
    """bool[S, N] of the queries of a stripe."""
    positions = positions[stripe]
    visible = piece.positions <= positions[:, None]
    if window is not None:
        visible &= piece.positions > positions[:, None] - window
    if piece.owner is not None:
        assert piece.read_by is not None
        visible &= (piece.owner[:, None] == piece.read_by[stripe, None]).any(-1)
    return visible


# Below, a piece's keys and values are [G, K, N, h] or shared, [K, N, h], and its scores
# f32[G, K, S, R, N] or [K, G, S, R, N]: the natural order of its product. Each stripe has a mask
# `visible` for every piece, of as many keys as it reads.


def _in_stripes(softcap: float, q, keys_values, visible) -> tuple[jax.Array, jax.Array]:
    """What queries [G, K, S, R, h] read, f32, and the logarithms [G, K, S, R] of their sums."""
    found = [_softmax(softcap, *stripe) for stripe in _cut(q, keys_values, visible)]
    out, log_sum = zip(*found, strict=True)
    return _whole(out), _whole(log_sum)


def _cut(q, keys_values, visible):
    """(queries, keys and values that they read, masks) of each stripe."""
    start = 0
    for masks in visible:
        stop = start + len(masks[0])
        read = [
            (k[..., : seen.shape[1], :], v[..., : seen.shape[1], :])
            for (k, v), seen in zip(keys_values, masks, strict=True)
        ]
        yield q[:, :, start:stop], read, masks
        start = stop


def _whole(stripes: Sequence[jax.Array]) -> jax.Array:
    return jnp.concatenate(stripes, axis=2) if len(stripes) > 1 else stripes[0]


def _softmax(softcap: float, q, keys_values, visible) -> tuple[jax.Array, jax.Array]:
    """`_in_stripes` for one of them."""
    scores = [
        jnp.where(seen[:, None, :], _cap(_scores(q, k), softcap), _MASKED)
        for (k, _), seen in zip(keys_values, visible, strict=True)
    ]
    shared = [_shared(k) for k, _ in keys_values]
    peaks = [s.max(-1, initial=_MASKED) for s in scores]
    peak = functools.reduce(jnp.maximum, map(_row_major, peaks, shared))
    peak = jax.lax.stop_gradient(peak)
    weights = [
        jnp.exp(s - _row_major(peak, is_shared)[..., None])
        for s, is_shared in zip(scores, shared, strict=True)
    ]
    total = functools.reduce(jnp.add, map(_row_major, [w.sum(-1) for w in weights], shared))
    read = [_read(w, v) for w, (_, v) in zip(weights, keys_values, strict=True)]
    return functools.reduce(jnp.add, read) / total[..., None], peak + jnp.log(total)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _recomputed(softcap: float, q, keys_values, visible):
    return _in_stripes(softcap, q, keys_values, visible)


def _forward(softcap: float, q, keys_values, visible):
    out, log_sum = _in_stripes(softcap, q, keys_values, visible)
    return (out, log_sum), (q, keys_values, visible, out, log_sum)


def _backward(softcap: float, kept, cotangents):
    q, keys_values, visible, out, log_sum = kept
    slope, _ = cotangents  # nothing reads the logarithms
    mean = jnp.einsum('gksrh,gksrh->gksr', slope, out)
    to_q, to_keys_values, start = [], (), 0
    for some_q, read, masks in _cut(q, keys_values, visible):
        stripe = slice(start, start := start + some_q.shape[2])
        of_rows = (x[:, :, stripe] for x in (log_sum, slope, mean))
        found, changes = _slopes(softcap, some_q, read, masks, *of_rows)
        to_q.append(found)
        to_keys_values = _plus(to_keys_values, changes)

    def like(new, old):
        return new.astype(old.dtype)

    return like(_whole(to_q), q), jax.tree.map(like, tuple(to_keys_values), keys_values), None


def _slopes(softcap: float, q, keys_values, visible, log_sum, slope, mean):
    """The loss's slopes by a stripe's queries and by what it reads, f32.

    Products keep the scores' axes in their place, whose reordering costs more than they do.
    """
    to_q, to_keys_values = jnp.zeros(q.shape, jnp.float32), []
    for (k, v), seen in zip(keys_values, visible, strict=True):
        shared = _shared(k)
        plain = _scores(q, k)
        capped = _cap(plain, softcap)
        weights = jnp.exp(capped - _row_major(log_sum, shared)[..., None])
        weights = jnp.where(seen[:, None, :], weights, 0.0)
        change = _scores(slope.astype(v.dtype), v) - _row_major(mean, shared)[..., None]
        change = change * weights
        if softcap:
            change = change * (1 - jnp.square(capped / softcap))
        to_q += _read(change, k)
        to_keys_values.append((_columns(q, change, k), _columns(slope, weights, v)))
    return to_q, to_keys_values


def _plus(total, new):
    """Sums of arrays [..., N, h]; a later stripe may read more columns than those before it."""

    def add(x, y):
        columns = x.shape[-2]
        if columns == y.shape[-2]:
            return x + y
        return jnp.concatenate([x + y[..., :columns, :], y[..., columns:, :]], axis=-2)

    return jax.tree.map(add, total, new) if total else new


_recomputed.defvjp(_forward, _backward)


def _shared(k: jax.Array) -> bool:
    return k.ndim == 3


def _cap(scores: jax.Array, softcap: float) -> jax.Array:
    return softcap * jnp.tanh(scores / softcap) if softcap else scores


def _scores(q: jax.Array, k: jax.Array) -> jax.Array:
    """Products of each row with each key."""
    product = 'gksrh,knh->kgsrn' if _shared(k) else 'gksrh,gknh->gksrn'
    return jnp.einsum(product, q, k, preferred_element_type=jnp.float32)


def _read(weights: jax.Array, v: jax.Array) -> jax.Array:
    """Sums f32[G, K, S, R, h] of values by their weights."""
    product = 'kgsrn,knh->kgsrh' if _shared(v) else 'gksrn,gknh->gksrh'
    out = jnp.einsum(product, weights.astype(v.dtype), v, preferred_element_type=jnp.float32)
    return _row_major(out, _shared(v))


def _columns(rows: jax.Array, weights: jax.Array, like: jax.Array) -> jax.Array:
    """Sums f32 of rows [G, K, S, R, h] by the weights of each key, in the shape of `like`."""
    product = 'gksrh,kgsrn->khn' if _shared(like) else 'gksrh,gksrn->gkhn'
    rows, weights = rows.astype(like.dtype), weights.astype(like.dtype)
    out = jnp.einsum(product, rows, weights, preferred_element_type=jnp.float32)
    return jax.lax.optimization_barrier(out).swapaxes(-1, -2)


def _row_major(x: jax.Array, shared: bool) -> jax.Array:
    """Swaps the leading G and K axes of a shared piece's array; its own inverse."""
    return x.swapaxes(0, 1) if shared else x
