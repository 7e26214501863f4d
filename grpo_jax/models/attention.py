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
_MASKED = -1e30  # finite, so that a fully masked piece gives weight 0 and not NaN


class Piece(NamedTuple):
    """Keys and values of N positions, either of each row or shared by all rows of the group."""

    k: jax.Array  # [G, K, N, h], or [K, N, h] when shared
    v: jax.Array  # like k
    positions: jax.Array  # i32[N], where they stand; NOWHERE where there is none

    @property
    def shared(self) -> bool:
        return self.k.ndim == 3


def attend(
    q: jax.Array,
    pieces: Sequence[Piece],
    positions: jax.Array,
    *,
    scale: float,
    softcap: float = 0.0,
    window: jax.Array | None = None,
) -> jax.Array:
    """Causal softmax attention over the union of the pieces, scores and sums in float32.

    Args:
      q: [G, S, H, h] rotated queries of G rows, S positions each.
      pieces: every query must see at least one position of them.
      positions: i32[S], where the queries stand; a query sees keys up to its own position.
      scale: of the scores.
      softcap: scores are softcap * tanh(score / softcap), unless it is 0 (Gemma 2, arXiv
        2408.00118, section 2).
      window: i32[], how many positions a query sees, its own counted; None is all.

    Returns:
      [G, S, H, h] in the dtype of q.
    """
    rows, length, heads, width = q.shape
    kv_heads = pieces[0].k.shape[-3]
    # [G, K, S, R, h]: the R query heads that read one key/value head become rows of its product.
    q = q.reshape(rows, length, kv_heads, heads // kv_heads, width).transpose(0, 2, 1, 3, 4)
    q = q * jnp.asarray(scale, q.dtype)
    scores = []
    for piece in pieces:
        visible = piece.positions <= positions[:, None]
        if window is not None:
            visible &= piece.positions > positions[:, None] - window
        scores.append(_scores(q, piece, visible, softcap))
    peaks = [s.max(-1, initial=_MASKED) for s in scores]
    peak = functools.reduce(jnp.maximum, map(_row_major, peaks, pieces))
    peak = jax.lax.stop_gradient(peak)
    weights = [
        jnp.exp(s - _row_major(peak, p)[..., None]) for s, p in zip(scores, pieces, strict=True)
    ]
    sums = [w.sum(-1) for w in weights]
    total = functools.reduce(jnp.add, map(_row_major, sums, pieces))
    out = functools.reduce(jnp.add, map(_read, weights, pieces))
    out = (out / total[..., None]).astype(q.dtype)
    return out.transpose(0, 2, 1, 3, 4).reshape(rows, length, heads, width)


def _scores(q: jax.Array, piece: Piece, visible: jax.Array, softcap: float) -> jax.Array:
    """f32[G, K, S, R, N], or [K, G, S, R, N] for a shared piece: its product's natural order."""
    product = 'gksrh,knh->kgsrn' if piece.shared else 'gksrh,gknh->gksrn'
    scores = jnp.einsum(product, q, piece.k, preferred_element_type=jnp.float32)
    if softcap:
        scores = softcap * jnp.tanh(scores / softcap)
    return jnp.where(visible[:, None, :], scores, _MASKED)


def _read(weights: jax.Array, piece: Piece) -> jax.Array:
    product = 'kgsrn,knh->kgsrh' if piece.shared else 'gksrn,gknh->gksrh'
    weights = weights.astype(piece.v.dtype)
    out = jnp.einsum(product, weights, piece.v, preferred_element_type=jnp.float32)
    return _row_major(out, piece)


def _row_major(x: jax.Array, piece: Piece) -> jax.Array:
    """Swaps the leading G and K axes of a shared piece's array; its own inverse."""
    return x.swapaxes(0, 1) if piece.shared else x
