"""One decoder with three entries: prefill a prompt, extend a group, decode a token.

RMSNorm, rotary positions, grouped-query attention and a gated MLP: the shape of Llama and Qwen.
Every entry is written for one group and is `vmap`ped over B by its callers. Parameters are a plain
nested dict, the layers stacked along a leading L axis and run by one scan, so compile time does not
grow with depth.
"""

import dataclasses
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from grpo_jax.models.attention import Piece, attend, rotate
from grpo_jax.sharding import anchor
from grpo_jax.types import Params

DTYPES = ('float32', 'bfloat16', 'float16')


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Sizes and options of the decoder.

    Raises:
      ValueError: heads not a multiple of kv_heads, an odd head_dim, or an unknown dtype.
    """

    vocab_size: int  # V
    width: int  # D
    layers: int  # L
    heads: int  # H
    kv_heads: int  # K
    head_dim: int  # h
    mlp_width: int
    rope_theta: float = 10_000.0
    norm_eps: float = 1e-6
    tied_head: bool = True  # the output projection is the embedding's transpose
    attention_bias: bool = False  # biases on the q, k and v projections (Qwen2)
    qk_norm: bool = False  # RMSNorm over each head of q and k (Qwen3)
    dtype: str = 'float32'  # of the computation; parameters are float32
    remat: bool = True  # recompute each layer in the backward pass instead of storing it

    def __post_init__(self) -> None:
        if self.heads % self.kv_heads:
            raise ValueError(
                f'model heads={self.heads} is not a multiple of kv_heads={self.kv_heads}: '
                'every key/value head serves the same number of query heads'
            )
        if self.head_dim % 2:
            raise ValueError(f'model head_dim={self.head_dim} is odd: rotary positions need pairs')
        if self.dtype not in DTYPES:
            raise ValueError(
                f'model dtype={self.dtype!r} is unknown: use one of {", ".join(DTYPES)}'
            )


class KeyValues(NamedTuple):
    """Rotated keys, and values: [L, K, N, h] of a prompt, [L, G, K, N, h] of completions."""

    k: jax.Array
    v: jax.Array


class RMSNorm(nn.Module):
    """Zhang and Sennrich, arXiv 1910.07467: x / rms(x) * scale, in float32."""

    eps: float

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        scale = self.param('scale', nn.initializers.ones, (x.shape[-1],))
        x32 = x.astype(jnp.float32)
        x32 = x32 * jax.lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + self.eps)
        return (x32 * scale).astype(x.dtype)


class Block(nn.Module):
    """One layer over x [G, S, D]; also returns the keys and values [G, K, S, h] that x brought."""

    config: ModelConfig

    @nn.compact
    def __call__(self, x, past, where):
        c = self.config
        y, own = self._attention(RMSNorm(c.norm_eps, name='attention_norm')(x), past, where)
        x = x + y
        x = x + self._mlp(RMSNorm(c.norm_eps, name='mlp_norm')(x))
        return anchor(x), own

    def _kernel(self, name: str, *shape: int) -> jax.Array:
        """A matrix; those that write into the residual stream start small, so that tokens show."""
        if name in ('out', 'down'):
            init = nn.initializers.normal(0.02 / (2 * self.config.layers) ** 0.5)
        else:
            init = nn.initializers.normal(shape[0] ** -0.5)
        return self.param(name, init, shape).astype(self.config.dtype)

    def _heads(self, x: jax.Array, name: str, heads: int) -> jax.Array:
        c = self.config
        y = jnp.einsum('gsd,dnh->gsnh', x, self._kernel(name, c.width, heads, c.head_dim))
        if c.attention_bias:
            bias = self.param(f'{name}_bias', nn.initializers.zeros, (heads, c.head_dim))
            y = y + bias.astype(y.dtype)
        return y

    def _attention(self, x, past, where):
        c = self.config
        q, k = self._heads(x, 'query', c.heads), self._heads(x, 'key', c.kv_heads)
        v = self._heads(x, 'value', c.kv_heads).swapaxes(1, 2)
        if c.qk_norm:
            q = RMSNorm(c.norm_eps, name='query_norm')(q)
            k = RMSNorm(c.norm_eps, name='key_norm')(k)
        q = rotate(q, where.positions, c.rope_theta)
        k = rotate(k, where.positions, c.rope_theta).swapaxes(1, 2)
        causal = jnp.tri(x.shape[1], dtype=bool)
        pieces = [Piece(kv.k, kv.v, mask) for kv, mask in zip(past, where.masks, strict=True)]
        out = attend(q, [*pieces, Piece(k, v, causal)])
        out = jnp.einsum('gsnh,nhd->gsd', out, self._kernel('out', c.heads, c.head_dim, c.width))
        return out, KeyValues(k, v)

    def _mlp(self, x: jax.Array) -> jax.Array:
        c = self.config
        gate = x @ self._kernel('gate', c.width, c.mlp_width)
        up = x @ self._kernel('up', c.width, c.mlp_width)
        return (jax.nn.silu(gate) * up) @ self._kernel('down', c.mlp_width, c.width)


class _Where(NamedTuple):
    """Where the new tokens stand and what they see of each past piece."""

    positions: jax.Array  # i32[S]
    masks: tuple[jax.Array, ...] = ()  # bool[N] for each piece


class Transformer(nn.Module):
    """The decoder; call its entries through `apply`."""

    config: ModelConfig

    def setup(self) -> None:
        c = self.config
        self.embedding = self.param(
            'embedding', nn.initializers.normal(c.width**-0.5), (c.vocab_size, c.width)
        )
        block = nn.remat(Block, prevent_cse=False) if c.remat else Block
        self.blocks = nn.scan(
            block,
            variable_axes={'params': 0},
            split_rngs={'params': True},
            in_axes=(0, nn.broadcast),
            length=c.layers,
        )(c)
        self.final_norm = RMSNorm(c.norm_eps)
        if not c.tied_head:
            init = nn.initializers.normal(c.width**-0.5)
            self.head = self.param('head', init, (c.width, c.vocab_size))

    def prefill(self, tokens: jax.Array, length: jax.Array) -> tuple[KeyValues, jax.Array]:
        """Reads one prompt.

        Args:
          tokens: i32[P], padded on the right.
          length: i32[], how many of them are real; the rest leaves no trace in what callers read.

        Returns:
          Keys and values [L, K, P, h], and the hidden state [D] that predicts the first completion
          token.
        """
        hidden, own = self._run(tokens[None], (), _Where(jnp.arange(tokens.shape[0])))
        return KeyValues(own.k[:, 0], own.v[:, 0]), hidden[0, length - 1]

    def extend(self, tokens: jax.Array, prompt: KeyValues, length: jax.Array) -> jax.Array:
        """Reads a group's completions over the prompt that they share.

        Args:
          tokens: i32[G, T].
          prompt: [L, K, P, h] from `prefill`.
          length: i32[], real tokens of the prompt.

        Returns:
          Hidden states [G, T, D]; the one at t predicts token t + 1.
        """
        where = _Where(length + jnp.arange(tokens.shape[1]), (_first(prompt, length),))
        return self._run(tokens, (prompt,), where)[0]

    def decode(
        self, token: jax.Array, t: jax.Array, prompt: KeyValues, length: jax.Array, own: KeyValues
    ) -> tuple[jax.Array, KeyValues]:
        """Reads one token of each row.

        Args:
          token: i32[G], completion token t of each row.
          t: i32[], its position in the completion, from 0.
          prompt: [L, K, P, h] from `prefill`.
          length: i32[], real tokens of the prompt.
          own: [L, G, K, T, h] keys and values of the rows' tokens before t.

        Returns:
          Hidden states [G, D] that predict token t + 1, and the column [L, G, K, 1, h] of keys and
          values that the caller writes at t. (The caller writes: under vmap a write here would be a
          scatter.)
        """
        where = _Where((length + t)[None], (_first(prompt, length), _first(own, t)))
        hidden, column = self._run(token[:, None], (prompt, own), where)
        return hidden[:, 0], column

    def logits(self, hidden: jax.Array) -> jax.Array:
        """f32[..., V] from hidden states [..., D]."""
        c = self.config
        head = self.embedding.T if c.tied_head else self.head
        return jnp.matmul(hidden, head.astype(c.dtype), preferred_element_type=jnp.float32)

    def _run(self, tokens, past, where):
        x = anchor(self.embedding.astype(self.config.dtype)[tokens])
        x, own = self.blocks(x, past, where)
        return self.final_norm(x), own


def _first(kv: KeyValues, count: jax.Array) -> jax.Array:
    return jnp.arange(kv.k.shape[-2]) < count


def init(model: Transformer, key: jax.Array) -> Params:
    """Random float32 parameters: matrices scaled by their inputs, small ones at the outputs."""
    variables = model.init(key, jnp.zeros(2, jnp.int32), jnp.int32(2), method='prefill')
    return variables['params']


def apply(model: Transformer, params: Params, *args: Any, method: str) -> Any:
    """Calls an entry with plain parameters: `apply(model, params, hidden, method='logits')`."""
    return model.apply({'params': params}, *args, method=method)


def group_hidden(
    model: Transformer, params: Params, prompt: jax.Array, length: jax.Array, tokens: jax.Array
) -> jax.Array:
    """Hidden states that predict each completion token of one group, the prompt read once.

    Args:
      model: the decoder.
      params: its parameters.
      prompt: i32[P], padded on the right.
      length: i32[], real prompt tokens.
      tokens: i32[G, T].

    Returns:
      [G, T, D]; the state at t predicts tokens[:, t]. Gradients flow through the prompt, once per
      group.
    """
    keys_values, last = apply(model, params, prompt, length, method='prefill')
    hidden = apply(model, params, tokens[:, :-1], keys_values, length, method='extend')
    first = jnp.broadcast_to(last, (tokens.shape[0], 1, last.shape[-1]))
    return jnp.concatenate([first, hidden], axis=1)
