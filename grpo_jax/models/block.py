"""One layer of the decoder, and the positions and options that it is called with."""

from typing import NamedTuple

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from grpo_jax.models import rope
from grpo_jax.models.attention import UNLIMITED_WINDOW, DecodeCache, Piece, concatenate_pieces
from grpo_jax.models.config import ModelConfig
from grpo_jax.models.kernels.dispatch import attend_groups, attend_token
from grpo_jax.models.layers import RMSNorm, experts, mlp, project
from grpo_jax.sharding import anchor


class KeyValues(NamedTuple):
    """Rotated keys, and values: [L, B, K, N, h] of prompts, [L, B, G, K, N, h] of completions."""

    k: Float[Array, '*axes K N h']
    v: Float[Array, '*axes K N h']


class Owners(NamedTuple):
    """Which sequence each key belongs to, and which ones a token reads; see `attention.Piece`."""

    owner: Int[Array, 'B N']  # of all keys: the earlier ones', then the new tokens'
    read_by: Int[Array, 'B S names']


class TokenPositions(NamedTuple):
    """Where the new tokens are and what they may read; the same for all layers."""

    positions: Int[Array, '*batch S']  # [B, S], or [B, G, S] where rows differ
    past: tuple[Int[Array, '*_ _'], ...]  # positions of the keys in each earlier piece
    owners: Owners | None  # None: every token may read all keys up to its position
    cache: DecodeCache | None  # what one new token attends to, where caches are read in place
    cos: Float[Array, 'kinds *batch S n']  # a layer selects one of the kinds
    sin: Float[Array, 'kinds *batch S n']


class LayerOptions(NamedTuple):
    """What differs between layers; the leading L axis is scanned."""

    number: Int[np.ndarray, '*L'] | Int[Array, '*L'] | np.integer
    rotation: Int[Array, '*L']  # which kind of rotation
    window: Int[Array, '*L'] | None


def rotations(
    c: ModelConfig, positions: Int[Array, '*batch S'], seen: Int[Array, '*batch S']
) -> tuple[Float[Array, '3 *batch S n'], Float[Array, '3 *batch S n']]:
    """Cosines and sines: of most layers, of windowed ones, and of those without positions."""
    most = rope.tables(
        positions, seen, width=c.rope_width, theta=c.rope_theta, scaling=c.rope_scaling
    )
    windowed = most
    if c.local_rope_theta:
        windowed = rope.tables(
            positions, seen, width=c.rope_width, theta=c.local_rope_theta, scaling={}
        )
    without = (jnp.ones_like(most[0]), jnp.zeros_like(most[1]))
    cos, sin = (jnp.stack(tables) for tables in zip(most, windowed, without, strict=True))
    return cos, sin


def layer_options(c: ModelConfig) -> LayerOptions:
    """The options of all layers, [L] each."""
    rotation = np.zeros(c.layers, np.int32)
    rotation[list(c.window_layers)] = 1
    rotation[list(c.unrotated_layers)] = 2
    number = np.arange(c.layers, dtype=np.int32)
    if not c.window:
        return LayerOptions(number, jnp.asarray(rotation), None)
    window = np.full(c.layers, UNLIMITED_WINDOW, np.int32)
    window[list(c.window_layers)] = c.window
    return LayerOptions(number, jnp.asarray(rotation), jnp.asarray(window))


class Block(nn.Module):
    """One layer over x [B, G, S, D]; also returns the keys and values [B, G, K, S, h] of x."""

    config: ModelConfig
    # Outside a scan, the compiler would merge what the backward pass recomputes with the forward
    # pass, unless a barrier prevents it. Inside a scan it cannot, and a barrier costs memory.
    scanned: bool

    @nn.compact
    def __call__(
        self,
        x: Float[Array, 'B G S D'],
        past: tuple[KeyValues, ...],
        layer: LayerOptions,
        tokens: TokenPositions,
    ) -> tuple[Float[Array, 'B G S D'], KeyValues]:
        c = self.config
        y, own = self._attention(self._norm('attention_norm', x, 'post'), past, layer, tokens)
        x = x + self._norm('attention_post_norm', y, 'pre')
        y = (experts if c.experts else mlp)(self, self._norm('mlp_norm', x, 'post'))
        return anchor(x + self._norm('mlp_post_norm', y, 'pre')), own

    def _norm(self, name: str, x: Float[Array, 'B G S D'], absent: str) -> Float[Array, 'B G S D']:
        """Normalizes x, unless `config.norms` is `absent`, with which the model lacks this norm."""
        c = self.config
        if c.norms == absent:
            return x
        return RMSNorm(c, self.scanned, name=name)(x)

    def _attention(
        self,
        x: Float[Array, 'B G S D'],
        past: tuple[KeyValues, ...],
        layer: LayerOptions,
        tokens: TokenPositions,
    ) -> tuple[Float[Array, 'B G S D'], KeyValues]:
        c = self.config
        bias = c.attention_bias
        q = project(self, 'query', x, (c.heads, c.head_dim), bias=bias)
        k = project(self, 'key', x, (c.kv_heads, c.head_dim), bias=bias)
        v = project(self, 'value', x, (c.kv_heads, c.head_dim), bias=bias).swapaxes(2, 3)
        q, k = self._qk_norm('query_norm', q), self._qk_norm('key_norm', k)
        cos, sin = (
            table[layer.rotation] if tokens.positions.ndim == 3 else table[layer.rotation][:, None]
            for table in (tokens.cos, tokens.sin)
        )
        q, k = rope.rotate(q, cos, sin), rope.rotate(k, cos, sin).swapaxes(2, 3)
        if tokens.cache is not None:
            new, number = (k[..., 0, :], v[..., 0, :]), jnp.asarray(layer.number)
            out, new = attend_token(c, q[:, :, 0], new, tokens.cache, number, layer.window)
            out, (k, v) = out[:, :, None], (x[..., None, :] for x in new)
        else:
            pieces = [Piece(kv.k, kv.v, at) for kv, at in zip(past, tokens.past, strict=True)]
            pieces.append(Piece(k, v, tokens.positions))
            if tokens.owners is not None:
                pieces = [concatenate_pieces(*pieces)._replace(**tokens.owners._asdict())]
            out = attend_groups(c, q, pieces, tokens.positions, layer.window)
        out = project(self, 'out', out, (c.width,), inputs=2, bias=c.out_bias)
        return out, KeyValues(k, v)

    def _qk_norm(
        self, name: str, x: Float[Array, 'B G S heads h']
    ) -> Float[Array, 'B G S heads h']:
        c = self.config
        if not c.qk_norm:
            return x
        norm = RMSNorm(c, self.scanned, name=name)
        if c.qk_norm == 'head':
            return norm(x)
        return norm(x.reshape(*x.shape[:-2], -1)).reshape(x.shape)
