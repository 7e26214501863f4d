"""Attention of a group's queries over several pieces of keys and values.

A completion attends to its prompt (stored once for the group), to its own earlier tokens and, while
decoding, to a cache of them. Each piece gives partial sums that are merged as in online softmax
(Milakov and Gimelshein, arXiv 1805.02867), so pieces are never concatenated and the prompt is never
repeated G times.
"""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from grpo_jax.models.kernels.blocked import blocked_attention, recomputed_attention
from grpo_jax.models.kernels.cpu import materialize
from grpo_jax.models.kernels.looped import looped_attention

MASKED_POSITION = 2**30  # of a key that no query may read: every query has a smaller position
UNLIMITED_WINDOW = 2 * MASKED_POSITION - 1  # of a layer without a window among windowed ones
# Queries are computed in blocks, each of which skips the keys after it: the smallest block size and
# the largest number of blocks.
QUERY_BLOCK, MAX_QUERY_BLOCKS = 64, 8
PACKED_QUERY_BLOCK = 128  # the smallest size where completions are packed into sequences
LONGEST_UNROLLED = 2048  # with more queries, blocks are computed in a loop: memory is linear


class Piece(NamedTuple):
    """Keys and values at N positions, either of each row or shared by all rows of the group."""

    k: Float[Array, '*axes N h']  # [G, K, N, h], or [K, N, h] when shared
    v: Float[Array, '*axes N h']  # like k
    positions: Int[Array, '*batch N']  # MASKED_POSITION where there is no token; [G, N]: of rows
    # In packed sequences query s reads only keys whose owner is in read_by[s]. Set both or neither.
    owner: Int[Array, '*batch N'] | None = None
    read_by: Int[Array, '*batch S names'] | None = None


class LayerCaches(NamedTuple):
    """Keys and values of all layers: of the prompts, and of the rows' earlier tokens."""

    prompt: tuple[Float[Array, 'L B K P h'], Float[Array, 'L B K P h']]
    own: tuple[Float[Array, 'L B G K T h'], Float[Array, 'L B G K T h']]


class DecodeCache(NamedTuple):
    """What one new token of each row attends to, read in place by `dispatch.attend_token`."""

    layers: LayerCaches
    length: Int[Array, ' B']  # real tokens of the prompts
    t: Int[Array, ''] | Int[Array, 'B G']  # earlier tokens of each row


def concatenate_pieces(shared: Piece, own: Piece) -> Piece:
    """Merges two pieces of a group of one row into one shared piece, which halves the operations.

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
    q: Float[Array, 'G S H h'],
    pieces: Sequence[Piece],
    positions: Int[Array, '*G S'],
    *,
    scale: float,
    softcap: float = 0.0,
    window: Int[Array, ''] | None = None,
    recompute: bool = False,
) -> Float[Array, 'G S H h']:
    """Causal softmax attention over the union of the pieces, scores and sums in float32.

    Args:
      q: rotated queries of G rows, S positions each.
      pieces: every query must see at least one of their positions. The last S positions of the last
        piece are those of the queries; no query sees any of them after its own.
      positions: of the queries, [S], or [G, S] where rows differ; a query sees keys up to its own
        position.
      scale: of the scores.
      softcap: scores are softcap * tanh(score / softcap), unless it is 0 (Gemma 2, arXiv
        2408.00118, section 2).
      window: how many positions a query sees, including its own; None: all.
      recompute: the gradient recomputes the scores instead of storing them, as in Dao et al.
        (arXiv 2205.14135, algorithm 4); it cannot be differentiated again.

    Returns:
      The attention's output in the dtype of q.
    """
    rows, length, heads, width = q.shape
    kv_heads = pieces[0].k.shape[-3]
    # [G, K, S, R, h]: the R query heads that read one key/value head become rows of its product.
    q = q.reshape(rows, length, kv_heads, heads // kv_heads, width).transpose(0, 2, 1, 3, 4)
    q = q * jnp.asarray(scale, q.dtype)
    form = recomputed_attention if recompute else blocked_attention
    keys_values = tuple((piece.k, piece.v) for piece in pieces)
    if recompute and length > LONGEST_UNROLLED:
        described = tuple(pieces), positions, window
        out, _ = looped_attention(softcap, _masks_of, q, keys_values, described)
    else:
        blocks = _query_blocks(length, packed=pieces[-1].owner is not None)
        visible = tuple(_visible_keys(block, pieces, positions, window) for block in blocks)
        out, _ = form(softcap, q, keys_values, materialize(visible))
    return out.astype(q.dtype).transpose(0, 2, 1, 3, 4).reshape(rows, length, heads, width)


# Which keys a query reads


def _query_blocks(length: int, *, packed: bool) -> list[slice]:
    """Cuts the queries into blocks, none of which is computed with the keys after it."""
    size = max(PACKED_QUERY_BLOCK if packed else QUERY_BLOCK, -(-length // MAX_QUERY_BLOCKS))
    return [slice(i, min(i + size, length)) for i in range(0, length, size)]


def _visible_keys(
    block: slice,
    pieces: Sequence[Piece],
    positions: Int[Array, '*G S'],
    window: Int[Array, ''] | None,
) -> tuple[Bool[Array, '*G block N'], ...]:
    """Which keys the queries of a block read: a mask for each piece, of its first N keys.

    The queries' own keys after the block are left out.
    """
    *past, own = pieces
    stop = own.positions.shape[-1] - positions.shape[-1] + block.stop
    owner = None if own.owner is None else own.owner[:stop]
    own = own._replace(positions=own.positions[..., :stop], owner=owner)
    return tuple(_visible(piece, positions, window, block) for piece in (*past, own))


def _masks_of(start: Any, size: int, stop: int, described: Any) -> tuple[Array, ...]:
    """The masks of a block of queries in a loop, see `looped.MasksOf`."""
    (*past, own), positions, window = described
    take = functools.partial(jax.lax.dynamic_slice_in_dim, start_index=start, slice_size=size)
    end = own.positions.shape[-1] - positions.shape[-1] + stop
    owner = None if own.owner is None else own.owner[:end]
    pieces = (*past, own._replace(positions=own.positions[..., :end], owner=owner))
    queries = take(positions, axis=positions.ndim - 1)
    masks = []
    for piece in pieces:
        read_by = None if piece.read_by is None else take(piece.read_by, axis=0)
        block = piece._replace(read_by=read_by)
        masks.append(_visible(block, queries, window, slice(None)))
    visible: tuple[Array, ...] = materialize(tuple(masks))
    return visible


def _visible(
    piece: Piece, positions: Int[Array, '*G S'], window: Int[Array, ''] | None, block: slice
) -> Bool[Array, '*G block N']:
    keys, positions = piece.positions, positions[..., block]
    if keys.ndim > 1:  # those of each row
        keys = keys[:, None, :]
    visible = keys <= positions[..., None]
    if window is not None:
        visible &= keys > positions[..., None] - window
    if piece.owner is not None:
        assert piece.read_by is not None
        visible &= (piece.owner[:, None] == piece.read_by[block, None]).any(-1)
    return visible
