"""One decoder with three entries: prefill prompts, extend groups, decode a token of each row.

RMSNorm, rotary positions, grouped-query attention and a gated MLP or experts; what distinguishes
the families (Llama, Qwen, Gemma, ...) are the options of `ModelConfig`. Arrays lead with the B axis
of groups. Parameters are a plain nested dict, the layers stacked along a leading L axis and run by
one scan, so compile time does not grow with depth; or, see `unrolled`, each layer by itself.
"""

import functools
import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from grpo_jax.models import rope
from grpo_jax.models.attention import NOWHERE, Stacks
from grpo_jax.models.block import Before, Block, KeyValues, Layer, Owners, Where
from grpo_jax.models.config import ModelConfig
from grpo_jax.models.flash import from_stacks
from grpo_jax.models.layers import RMSNorm, capped
from grpo_jax.models.lora import split
from grpo_jax.models.quantized import lookup, unpacked
from grpo_jax.sharding import anchor
from grpo_jax.types import Params


class Transformer(nn.Module):
    """The decoder; call its entries through `apply`."""

    config: ModelConfig
    unrolled: bool = False  # parameters are those of `unrolled.unstacked`

    def setup(self) -> None:
        c = self.config
        init = nn.initializers.normal(c.width**-0.5)
        self.embedding = self.param('embedding', init, (c.vocab_size, c.width), c.param_dtype)
        block = nn.remat(Block, prevent_cse=self.unrolled) if c.remat else Block
        if self.unrolled:
            self.layers = [block(c, scanned=False) for _ in range(c.layers)]
        else:
            self.blocks = nn.scan(
                block,
                variable_axes={'params': 0},
                split_rngs={'params': True},
                in_axes=(0, 0, nn.broadcast),
                length=c.layers,
                check_constancy_invariants=False,  # which would trace everything once more
            )(c, scanned=True)
        self.final_norm = RMSNorm(c)
        if c.scalar_head:
            self.score = self.param('score', nn.initializers.zeros, (c.width, 1), c.param_dtype)
        elif not c.tied_head:
            self.head = self.param('head', init, (c.width, c.vocab_size), c.param_dtype)

    def prefill(self, tokens: jax.Array, length: jax.Array) -> tuple[KeyValues, jax.Array]:
        """Reads prompts.

        Args:
          tokens: i32[B, P], padded on the right.
          length: i32[B], how many of them are real; the rest leaves no trace in what callers read.

        Returns:
          Keys and values [L, B, K, P, h], and the hidden states [B, D] that predict the first
          completion token.
        """
        positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
        seen = jnp.broadcast_to(length[:, None], tokens.shape)
        hidden, own = self._run(tokens[:, None], (), positions, seen, ())
        last = jnp.take_along_axis(hidden[:, 0], (length - 1)[:, None, None], axis=1)[:, 0]
        return KeyValues(own.k[:, :, 0], own.v[:, :, 0]), last

    def extend(self, tokens: jax.Array, prompt: KeyValues, length: jax.Array) -> jax.Array:
        """Reads completions over the prompts that their groups share.

        Args:
          tokens: i32[B, G, T].
          prompt: [L, B, K, P, h] from `prefill`.
          length: i32[B], real tokens of the prompts.

        Returns:
          Hidden states [B, G, T, D]; the one at t predicts token t + 1.
        """
        positions = length[:, None] + jnp.arange(tokens.shape[2])
        past = (_prompt_positions(prompt, length),)
        return self._run(tokens, (prompt,), positions, positions + 1, past)[0]

    def extend_packed(
        self,
        tokens: jax.Array,
        positions: jax.Array,
        prompts: KeyValues,
        prompt_positions: jax.Array,
        owners: Owners,
    ) -> jax.Array:
        """Reads sequences in which completions of several prompts lie behind each other.

        Args:
          tokens: i32[N, S].
          positions: i32[N, S], of each token behind its prompt's start.
          prompts: [L, N, K, M, h], the keys and values of all prompts that a sequence reads.
          prompt_positions: i32[N, M], NOWHERE where there is no token.
          owners: whose the prompts' keys and those of the sequence are, and who reads them.

        Returns:
          Hidden states [N, S, D]; each has read its token.
        """
        hidden, _ = self._run(
            tokens[:, None], (prompts,), positions, positions + 1, (prompt_positions,), owners
        )
        return hidden[:, 0]

    def decode(
        self, token: jax.Array, t: jax.Array, prompt: KeyValues, length: jax.Array, own: KeyValues
    ) -> tuple[jax.Array, KeyValues]:
        """Reads one token of each row.

        Args:
          token: i32[B, G], completion token t of each row.
          t: i32[], its position in the completion, from 0.
          prompt: [L, B, K, P, h] from `prefill`.
          length: i32[B], real tokens of the prompts.
          own: [L, B, G, K, T, h] keys and values of the rows' tokens before t.

        Returns:
          Hidden states [B, G, D] that predict token t + 1, and the column [L, B, G, K, 1, h] of
          keys and values that the caller writes at t.
        """
        positions = (length + t)[:, None]
        run = functools.partial(self._run, token[..., None])
        if from_stacks(self.config):
            before = Before(Stacks((prompt.k, prompt.v), (own.k, own.v)), length, t)
            hidden, column = run((), positions, positions + 1, (), before=before)
        else:
            columns = jnp.arange(own.k.shape[-2])
            filled = jnp.where(columns < t, length[:, None] + columns, NOWHERE)
            past = (_prompt_positions(prompt, length), filled)
            hidden, column = run((prompt, own), positions, positions + 1, past)
        return hidden[:, :, 0], column

    def logits(self, hidden: jax.Array) -> jax.Array:
        """f32[..., V] from hidden states [..., D]."""
        c, (matrix, scale) = self.config, unpacked(self.output_matrix())
        rows = hidden.reshape(-1, c.width)  # two axes: see `layers.project`
        logits = jnp.matmul(rows, matrix.astype(c.dtype), preferred_element_type=jnp.float32)
        logits = logits if scale is None else logits * scale
        return capped(c, logits).reshape(*hidden.shape[:-1], -1)

    def output_matrix(self) -> Any:
        """[D, V] that hidden states are multiplied with, as an array or `Quantized`."""
        c = self.config
        if c.scalar_head:
            raise ValueError(
                'a model with scalar_head=True has no logits: ask for its scores, or take a '
                'language model'
            )
        return jax.tree.map(jnp.transpose, self.embedding) if c.tied_head else self.head

    def scores(self, hidden: jax.Array) -> jax.Array:
        """f32[...] from hidden states [..., D], with a scalar head."""
        c = self.config
        if not c.scalar_head:
            raise ValueError(
                'a model with scalar_head=False has no scores: ask for its logits, or make a '
                'reward model or critic of it by `with_scalar_head` and `scalar_params`'
            )
        rows = hidden.reshape(-1, c.width)
        scores = jnp.matmul(rows, self.score.astype(c.dtype), preferred_element_type=jnp.float32)
        return scores.reshape(hidden.shape[:-1])

    def _run(self, tokens, past, positions, seen, past_positions, owners=None, before=None):
        """Hidden states [B, G, S, D] of tokens [B, G, S], and their keys and values of all layers.

        positions, seen: i32[B, S], see `rope.tables`.
        """
        c = self.config
        x = lookup(self.embedding, tokens, c.dtype)
        if c.embedding_scaled:
            x = x * jnp.asarray(math.sqrt(c.width), x.dtype)
        cos, sin = _rotations(c, positions, seen)
        where = Where(positions, past_positions, owners, before, cos, sin)
        x, own = self._through(anchor(x), past, where)
        return self.final_norm(x), own

    def _through(self, x, past, where):
        """What all layers make of x [B, G, S, D], and its tokens' keys and values [L, ...]."""
        layers = _layers(self.config)
        if not self.unrolled:
            return self.blocks(x, past, layers, where)
        own = []
        for i, block in enumerate(self.layers):
            before, layer = jax.tree.map(lambda a, i=i: a[i], (past, layers))
            x, new = block(x, before, layer, where)
            own.append(new)
        return x, jax.tree.map(lambda *a: jnp.stack(a), *own)


def _rotations(c: ModelConfig, positions: jax.Array, seen: jax.Array):
    """Cosines and sines f32[3, B, S, n]: of most layers, of windowed ones, and of those without."""
    most = rope.tables(
        positions, seen, width=c.rope_width, theta=c.rope_theta, scaling=c.rope_scaling
    )
    windowed = most
    if c.local_rope_theta:
        windowed = rope.tables(
            positions, seen, width=c.rope_width, theta=c.local_rope_theta, scaling={}
        )
    without = (jnp.ones_like(most[0]), jnp.zeros_like(most[1]))
    return tuple(jnp.stack(tables) for tables in zip(most, windowed, without, strict=True))


def _layers(c: ModelConfig) -> Layer:
    rotation = np.zeros(c.layers, np.int32)
    rotation[list(c.window_layers)] = 1
    rotation[list(c.unrotated_layers)] = 2
    index = np.arange(c.layers, dtype=np.int32)
    if not c.window:
        return Layer(index, jnp.asarray(rotation), None)
    window = np.full(c.layers, 2 * NOWHERE - 1, np.int32)
    window[list(c.window_layers)] = c.window
    return Layer(index, jnp.asarray(rotation), jnp.asarray(window))


def _prompt_positions(prompt: KeyValues, length: jax.Array) -> jax.Array:
    """i32[B, P], with NOWHERE behind the prompts' ends."""
    columns = jnp.arange(prompt.k.shape[-2])
    return jnp.where(columns < length[:, None], columns, NOWHERE)


def init(model: Transformer, key: jax.Array) -> Params:
    """Random parameters: matrices scaled by their inputs, small ones at the outputs."""
    tokens, length = jnp.zeros((1, 2), jnp.int32), jnp.full(1, 2)
    return model.init(key, tokens, length, method='prefill')['params']


def apply(model: Transformer, params: Params, *args: Any, method: str) -> Any:
    """Calls an entry with plain parameters: `apply(model, params, hidden, method='logits')`."""
    return model.apply({'params': params}, *args, method=method)


def scalar_params(params: Params, config: ModelConfig) -> Params:
    """Parameters of a model with a scalar head that is a language model but for its score, 0.

    Args:
      params: of the language model, adapters merged. Its arrays are shared, not copied.
      config: of either model.

    Raises:
      ValueError: there are adapters.
    """
    if split(params)[1]:
        raise ValueError('scalar_params of parameters with adapters: `merge` them first')
    trunk = {name: value for name, value in params.items() if name != 'head'}
    return trunk | {'score': jnp.zeros((config.width, 1), config.param_dtype)}
