"""Attention over several pieces of keys and values against one softmax over their union."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from grpo_jax.models.attention import MASKED_POSITION, Piece, attend, concatenate_pieces


def pieces_of(rng, rows, kv_heads, width, sizes):
    """Pieces of given lengths, the first shared by all rows."""

    def array(*shape):
        return jnp.asarray(rng.standard_normal(shape), jnp.float32)

    shapes = [(kv_heads, sizes[0], width)] + [(rows, kv_heads, n, width) for n in sizes[1:]]
    return [(array(*shape), array(*shape)) for shape in shapes]


def softmax_attention(q, k, v, visible):
    """One softmax over all positions, in float64: q [G, S, H, h], k and v [G, K, N, h]."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    k, v = (np.repeat(x, q.shape[2] // k.shape[1], axis=1) for x in (k, v))
    scores = np.einsum('gshw,ghnw->ghsn', q, k) / np.sqrt(q.shape[-1])
    scores = np.where(visible, scores, -np.inf)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    return np.einsum('ghsn,ghnw->gshw', weights / weights.sum(-1, keepdims=True), v)


@pytest.mark.parametrize('scale', [1.0, 300.0])
@pytest.mark.parametrize('shown', [(3, 2), (0, 2), (3, 0), (1, 4)])
def test_attention_over_pieces_is_attention_over_their_union(shown, scale):
    """A piece that shows nothing counts as nothing, however large the scores are."""
    rng = np.random.default_rng(0)
    rows, length, heads, kv_heads, width, sizes = 3, 2, 4, 2, 6, (3, 4, 2)
    q = jnp.asarray(scale * rng.standard_normal((rows, length, heads, width)), jnp.float32)
    kv = pieces_of(rng, rows, kv_heads, width, sizes)
    masks = [np.arange(3) < shown[0], np.arange(4) < shown[1], np.tri(2, dtype=bool)]
    at = [
        np.where(masks[0], np.arange(3), MASKED_POSITION),
        np.where(masks[1], 3 + np.arange(4), MASKED_POSITION),
    ]
    at = [jnp.asarray(positions) for positions in (*at, 7 + np.arange(2))]
    pieces = [Piece(k, v, positions) for (k, v), positions in zip(kv, at, strict=True)]
    ours = attend(q, pieces, at[-1], scale=width**-0.5)
    kv[0] = tuple(np.broadcast_to(x, (rows, *x.shape)) for x in kv[0])
    k, v = (np.concatenate(parts, axis=2) for parts in zip(*kv, strict=True))
    visible = np.concatenate([np.broadcast_to(m, (length, m.shape[-1])) for m in masks], axis=1)
    np.testing.assert_allclose(ours, softmax_attention(q, k, v, visible), atol=2e-5 * scale**0.5)


@pytest.mark.parametrize('window', [None, 3])
def test_keys_are_read_by_whom_they_belong_to(window):
    """Two concatenated sequences of 3 and 2, over a prompt of 4 and one of 2 (5 columns).

    As two pieces, and as one, where a token names the owners of both.
    """
    rng = np.random.default_rng(1)
    shared, own = pieces_of(rng, 1, 2, 6, (9, 5))
    q = jnp.asarray(rng.standard_normal((1, 5, 4, 6)), jnp.float32)
    weights = rng.standard_normal(q.shape)
    sequence, place = jnp.array([0, 0, 0, 1, 1]), jnp.array([4, 5, 6, 2, 3])
    prompt = jnp.repeat(jnp.array([0, 1]), jnp.array([4, 5]), total_repeat_length=9)
    stands = jnp.array([0, 1, 2, 3, 0, 1, MASKED_POSITION, MASKED_POSITION, MASKED_POSITION])
    limit = None if window is None else jnp.int32(window)

    def together(q, shared, own, recompute, one):
        names = sequence[:, None]
        pieces = [Piece(*shared, stands, prompt, names), Piece(*own, place, sequence, names)]
        if one:
            names = jnp.stack([sequence, 2 + sequence], axis=-1)
            owner = jnp.concatenate([prompt, 2 + sequence])
            pieces = [concatenate_pieces(*pieces)._replace(owner=owner, read_by=names)]
        return attend(q, pieces, place, scale=0.5, window=limit, recompute=recompute)

    def apart(q, shared, own):
        parts = []
        for columns, tokens in ((slice(0, 4), slice(0, 3)), (slice(4, 6), slice(3, 5))):
            pieces = [
                Piece(*(x[:, columns] for x in shared), stands[columns]),
                Piece(*(x[:, :, tokens] for x in own), place[tokens]),
            ]
            parts.append(attend(q[:, tokens], pieces, place[tokens], scale=0.5, window=limit))
        return jnp.concatenate(parts, axis=1)

    @functools.partial(tiny.jit, static_argnums=0)
    def value_and_gradient(form, arrays):
        out, pull = jax.vjp(form, *arrays)
        return out, pull(jnp.asarray(weights, jnp.float32))

    expected = value_and_gradient(apart, (q, shared, own))
    for recompute, one in itertools.product((False, True), repeat=2):
        form = functools.partial(together, recompute=recompute, one=one)
        found = value_and_gradient(form, (q, shared, own))
        jax.tree.map(functools.partial(np.testing.assert_allclose, atol=1e-5), found, expected)
