"""One decoder with three entry points: prefill prompts, extend groups, decode one token per row.

RMSNorm, rotary positions, grouped-query attention and a gated MLP or experts; the options of
`ModelConfig` distinguish the families (Llama, Qwen, Gemma, ...). The leading axis of
arrays is B, the groups; the rows of a group are its G completions. Parameters are a plain nested
dict, with the layers stacked along a leading L axis and run by one scan, so that compile time does
not grow with depth; or with separate layers, see `unrolled`.
"""

import functools
import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Float, Int, Key

from grpo_jax.models.attention import MASKED_POSITION, DecodeCache, LayerCaches
from grpo_jax.models.block import (
    Block,
    KeyValues,
    LayerOptions,
    Owners,
    TokenPositions,
    layer_options,
    rotations,
)
from grpo_jax.models.config import ModelConfig
from grpo_jax.models.kernels.selection import caches_in_place
from grpo_jax.models.layers import CHOSEN, PROBABILITIES, RECORDED, RMSNorm, finish_logits
from grpo_jax.models.quantization import Quantized, lookup, unpack
from grpo_jax.sharding import anchor, by_axes
from grpo_jax.types import Array, Params


class Transformer(nn.Module):
    """The decoder; call its methods through `apply`."""

    config: ModelConfig
    unrolled: bool = False  # parameters are those of `unrolled.unstack_layers`

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
                variable_axes={'params': 0, CHOSEN: 0, RECORDED: 0, PROBABILITIES: 0},
                split_rngs={'params': True},
                in_axes=(0, 0, nn.broadcast),
                length=c.layers,
                check_constancy_invariants=False,  # the check would trace everything once more
            )(c, scanned=True)
        self.final_norm = RMSNorm(c)
        if c.scalar_head:
            self.score = self.param('score', nn.initializers.zeros, (c.width, 1), c.param_dtype)
        elif not c.tied_head:
            self.head = self.param('head', init, (c.width, c.vocab_size), c.param_dtype)

    def prefill(
        self, tokens: Int[Array, 'B P'], length: Int[Array, ' B']
    ) -> tuple[KeyValues, Float[Array, 'B D']]:
        """Processes prompts.

        Args:
          tokens: the prompts, padded on the right.
          length: real tokens of each prompt; padding does not change what callers read.

        Returns:
          Keys and values [L, B, K, P, h], and the hidden states that predict the first completion
          token.
        """
        positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
        seen = jnp.broadcast_to(length[:, None], tokens.shape)
        hidden, own = self._run_layers(tokens[:, None], (), positions, seen, ())
        last = jnp.take_along_axis(hidden[:, 0], (length - 1)[:, None, None], axis=1)[:, 0]
        return KeyValues(own.k[:, :, 0], own.v[:, :, 0]), last

    def extend(
        self, tokens: Int[Array, 'B G T'], prompt: KeyValues, length: Int[Array, ' B']
    ) -> Float[Array, 'B G T D']:
        """Processes completions over the prompts that their groups share.

        Args:
          tokens: the completions.
          prompt: [L, B, K, P, h] from `prefill`.
          length: real tokens of the prompts.

        Returns:
          Hidden states; the one at t predicts token t + 1.
        """
        length = jnp.asarray(length)
        positions = length[:, None] + jnp.arange(tokens.shape[2])
        past = (_prompt_positions(prompt, length),)
        return self._run_layers(tokens, (prompt,), positions, positions + 1, past)[0]

    def extend_packed(
        self,
        tokens: Int[Array, 'N S'],
        positions: Int[Array, 'N S'],
        prompts: KeyValues,
        prompt_positions: Int[Array, 'N M'],
        owners: Owners,
    ) -> Float[Array, 'N S D']:
        """Processes sequences into which completions of several prompts are packed.

        Args:
          tokens: one completion after another.
          positions: of each token, counted from the start of its prompt.
          prompts: [L, N, K, M, h], the keys and values of all prompts that a sequence reads.
          prompt_positions: MASKED_POSITION where there is no token.
          owners: which keys of prompts and sequence each token reads.

        Returns:
          Hidden states; each has read its token.
        """
        hidden, _ = self._run_layers(
            tokens[:, None], (prompts,), positions, positions + 1, (prompt_positions,),
            owners=owners,
        )  # fmt: skip
        return hidden[:, 0]

    def decode(
        self,
        token: Int[Array, 'B G'],
        t: Int[Array, ''] | Int[Array, 'B G'],
        prompt: KeyValues,
        length: Int[Array, ' B'],
        own: KeyValues,
    ) -> tuple[Float[Array, 'B G D'], KeyValues]:
        """Processes one token of each row.

        Args:
          token: completion token t of each row.
          t: its position in the completion, from 0; the same for all rows, or one for each.
          prompt: [L, B, K, P, h] from `prefill`.
          length: real tokens of the prompts.
          own: [L, B, G, K, T, h] keys and values of the rows' tokens before t.

        Returns:
          Hidden states that predict token t + 1, and the column [L, B, G, K, 1, h] of keys and
          values that the caller writes at t.
        """
        length, t = jnp.asarray(length), jnp.asarray(t)
        start = length[:, None] if t.ndim else length
        positions = (start + t)[..., None]
        run = functools.partial(self._run_layers, token[..., None])
        if caches_in_place(self.config) and not (t.ndim and self.config.window):
            cache = DecodeCache(LayerCaches((prompt.k, prompt.v), (own.k, own.v)), length, t)
            hidden, column = run((), positions, positions + 1, (), cache=cache)
        else:
            filled = _own_positions(own, start, t)
            past = (_prompt_positions(prompt, length), filled)
            hidden, column = run((prompt, own), positions, positions + 1, past)
        return hidden[:, :, 0], column

    def extend_cached(
        self,
        tokens: Int[Array, 'N F'],
        t: Int[Array, ' N'],
        prompt: KeyValues,
        length: Int[Array, ' N'],
        own: KeyValues,
    ) -> KeyValues:
        """Processes several tokens of each row, after those that its cache holds.

        Args:
          tokens: completion tokens t, t + 1, ... of each row.
          t: the position of the first of them in the completion.
          prompt: [L, N, K, P, h], the prompt of each row.
          length: real tokens of the prompts.
          own: [L, N, 1, K, T, h] keys and values of the rows' tokens before t.

        Returns:
          Keys and values [L, N, 1, K, F, h] of the tokens.
        """
        positions = (length + t)[:, None] + jnp.arange(tokens.shape[1])
        past = _prompt_positions(prompt, length), _own_positions(own, length, t)
        return self._run_layers(tokens[:, None], (prompt, own), positions, positions + 1, past)[1]

    def logits(self, hidden: Float[Array, '*axes D']) -> Float[Array, '*axes V']:
        """f32 logits of the next token from hidden states."""
        c, (matrix, scale) = self.config, unpack(self.output_matrix())
        rows = hidden.reshape(-1, c.width)  # two axes: see `layers.project`
        matrix = by_axes(matrix.astype(c.dtype), 'head')
        logits = jnp.matmul(rows, matrix, preferred_element_type=jnp.float32)
        logits = logits if scale is None else logits * scale
        return finish_logits(c, logits).reshape(*hidden.shape[:-1], -1)

    def output_matrix(self) -> Float[Array, 'D V'] | Quantized:
        """The matrix that hidden states are multiplied with to obtain logits.

        Raises:
          ValueError: the model has a scalar head.
        """
        c = self.config
        if c.scalar_head:
            raise ValueError(
                'a model with scalar_head=True has no logits: ask for its scores, or use a '
                'language model'
            )
        return jax.tree.map(jnp.transpose, self.embedding) if c.tied_head else self.head

    def scores(self, hidden: Float[Array, '*axes D']) -> Float[Array, '*axes']:
        """f32 scores from hidden states, with a scalar head.

        Raises:
          ValueError: the model has logits instead.
        """
        c = self.config
        if not c.scalar_head:
            raise ValueError(
                'a model with scalar_head=False has no scores: ask for its logits, or make a '
                'reward model or critic of it by `with_scalar_head` and `scalar_params`'
            )
        rows = hidden.reshape(-1, c.width)
        scores = jnp.matmul(rows, self.score.astype(c.dtype), preferred_element_type=jnp.float32)
        return scores.reshape(hidden.shape[:-1])

    def _run_layers(
        self,
        tokens: Int[Array, 'B G S'],
        past: tuple[KeyValues, ...],
        positions: Int[Array, '*batch S'],
        seen: Int[Array, '*batch S'],
        past_positions: tuple[Int[Array, '*_ _'], ...],
        *,
        owners: Owners | None = None,
        cache: DecodeCache | None = None,
    ) -> tuple[Float[Array, 'B G S D'], KeyValues]:
        """Hidden states of the tokens, and their keys and values [L, B, G, K, S, h].

        Args:
          tokens: what to process.
          past: pieces of earlier keys and values of all layers.
          positions: of the tokens, [B, S], or [B, G, S] where rows differ.
          seen: see `rope.tables`.
          past_positions: of the keys in each piece of `past`.
          owners: see `TokenPositions`.
          cache: see `TokenPositions`.
        """
        c = self.config
        x = lookup(self.embedding, tokens, c.dtype)
        if c.embedding_scaled:
            x = x * jnp.asarray(math.sqrt(c.width), x.dtype)
        cos, sin = rotations(c, positions, seen)
        token_positions = TokenPositions(positions, past_positions, owners, cache, cos, sin)
        x, layers = anchor(x), layer_options(c)
        if self.unrolled:
            x, own = self._loop_over_layers(x, past, layers, token_positions)
        else:
            x, own = self.blocks(x, past, layers, token_positions)
        return self.final_norm(x), own

    def _loop_over_layers(
        self,
        x: Float[Array, 'B G S D'],
        past: tuple[KeyValues, ...],
        layers: LayerOptions,
        token_positions: TokenPositions,
    ) -> tuple[Float[Array, 'B G S D'], KeyValues]:
        """What the scan over `blocks` computes, by a Python loop."""
        columns = []
        for i, block in enumerate(self.layers):
            layer_past, layer = jax.tree.map(lambda a, i=i: a[i], (past, layers))
            x, new = block(x, layer_past, layer, token_positions)
            columns.append(new)
        return x, jax.tree.map(lambda *a: jnp.stack(a), *columns)


def _prompt_positions(prompt: KeyValues, length: Int[Array, ' B']) -> Int[Array, 'B P']:
    """Positions of the prompts' columns; MASKED_POSITION after the prompts' ends."""
    columns = jnp.arange(prompt.k.shape[-2])
    return jnp.where(columns < length[:, None], columns, MASKED_POSITION)


def _own_positions(
    own: KeyValues, start: Int[Array, '*_'], t: Int[Array, '*rows']
) -> Int[Array, '*batch T']:
    """Positions of the columns of completions; MASKED_POSITION from column t on."""
    columns = jnp.arange(own.k.shape[-2])
    filled = columns < (t[..., None] if t.ndim else t)
    return jnp.where(filled, start[..., None] + columns, MASKED_POSITION)


def init_params(model: Transformer, key: Key[Array, '']) -> Params:
    """Random parameters: matrices of scale 1 / sqrt(fan_in), smaller at the outputs of layers."""
    tokens, length = jnp.zeros((1, 2), jnp.int32), jnp.full(1, 2)
    return model.init(key, tokens, length, method='prefill')['params']


def apply(model: Transformer, params: Params, *args: Any, method: str) -> Any:
    """Calls a method with plain parameters: `apply(model, params, hidden, method='logits')`."""
    return model.apply({'params': params}, *args, method=method)
