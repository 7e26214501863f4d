"""One layer of the decoder, and what the layers are told about the tokens they read."""

from typing import NamedTuple

import flax.linen as nn
import jax

from grpo_jax.models import rope
from grpo_jax.models.attention import Piece, Stacks, joined
from grpo_jax.models.config import ModelConfig
from grpo_jax.models.flash import attend_groups, attend_token
from grpo_jax.models.layers import RMSNorm, experts, mlp, project
from grpo_jax.sharding import anchor
from grpo_jax.types import Array


class KeyValues(NamedTuple):
    """Rotated keys, and values: [L, B, K, N, h] of prompts, [L, B, G, K, N, h] of completions."""

    k: jax.Array
    v: jax.Array


class Owners(NamedTuple):
    """Whose keys are whose, see `attention.Piece`."""

    owner: jax.Array  # i32[B, N], of all keys: those that came before, and the new tokens'
    read_by: jax.Array  # i32[B, S, names]


class Before(NamedTuple):
    """Of a token of each row."""

    stacks: Stacks
    length: jax.Array  # i32[B], of the prompts
    t: jax.Array  # i32[], of the rows


class Where(NamedTuple):
    """Where the new tokens stand and what they may read; the same for all layers."""

    positions: jax.Array  # i32[B, S]
    past: tuple[jax.Array, ...]  # i32[B, N] for each piece of keys and values that came before
    owners: Owners | None  # None: all is everyone's
    before: Before | None  # all that came before one token, where that stays in its stacks
    cos: jax.Array  # f32[kinds, B, S, n], of which a layer names one
    sin: jax.Array


class Layer(NamedTuple):
    """What differs from layer to layer; [L] each, scanned."""

    index: Array  # i32
    rotation: jax.Array  # i32, which kind of rotation
    window: jax.Array | None  # i32


class Block(nn.Module):
    """One layer over x [B, G, S, D]; also returns the keys and values [B, G, K, S, h] of x."""

    config: ModelConfig
    # Outside of a scan a compiler would merge what the backward pass computes again with what the
    # forward pass did, unless told not to; inside of one it cannot, and telling it costs memory.
    scanned: bool

    @nn.compact
    def __call__(self, x, past, layer: Layer, where: Where):
        c = self.config
        y, own = self._attention(self._norm('attention_norm', x, 'post'), past, layer, where)
        x = x + self._norm('attention_post_norm', y, 'pre')
        y = (experts if c.experts else mlp)(self, self._norm('mlp_norm', x, 'post'))
        return anchor(x + self._norm('mlp_post_norm', y, 'pre')), own

    def _norm(self, name: str, x: jax.Array, absent: str) -> jax.Array:
        c = self.config
        if c.norms == absent:
            return x
        return RMSNorm(c, self.scanned, name=name)(x)

    def _attention(self, x, past, layer: Layer, where: Where):
        c = self.config
        bias = c.attention_bias
        q = project(self, 'query', x, (c.heads, c.head_dim), bias=bias)
        k = project(self, 'key', x, (c.kv_heads, c.head_dim), bias=bias)
        v = project(self, 'value', x, (c.kv_heads, c.head_dim), bias=bias).swapaxes(2, 3)
        q, k = self._qk_norm('query_norm', q), self._qk_norm('key_norm', k)
        cos, sin = (table[layer.rotation][:, None] for table in (where.cos, where.sin))
        q, k = rope.rotate(q, cos, sin), rope.rotate(k, cos, sin).swapaxes(2, 3)
        if where.before is not None:
            stacks, length, t = where.before
            new = k[..., 0, :], v[..., 0, :]
            out, new = attend_token(c, q[:, :, 0], new, stacks, layer.index, length, t)
            out, (k, v) = out[:, :, None], (x[..., None, :] for x in new)
        else:
            pieces = [Piece(kv.k, kv.v, at) for kv, at in zip(past, where.past, strict=True)]
            pieces.append(Piece(k, v, where.positions))
            if where.owners is not None:
                pieces = [joined(*pieces)._replace(**where.owners._asdict())]
            out = attend_groups(c, q, pieces, where.positions, layer.window)
        out = project(self, 'out', out, (c.width,), inputs=2, bias=c.out_bias)
        return out, KeyValues(k, v)

    def _qk_norm(self, name: str, x: jax.Array) -> jax.Array:
        c = self.config
        if not c.qk_norm:
            return x
        norm = RMSNorm(c, self.scanned, name=name)
        if c.qk_norm == 'head':
            return norm(x)
        return norm(x.reshape(*x.shape[:-2], -1)).reshape(x.shape)
