"""Reading completions over their prompts: the hidden states of a group, its prompt read once."""

import jax
import jax.numpy as jnp

from grpo_jax.models.block import KeyValues
from grpo_jax.models.transformer import Transformer, apply
from grpo_jax.types import Params


def completion_hidden(
    model: Transformer, params: Params, prompt: jax.Array, length: jax.Array, tokens: jax.Array
) -> jax.Array:
    """Hidden states that predict each completion token, every prompt read once for its group.

    Args:
      model: the decoder.
      params: its parameters.
      prompt: i32[B, P], padded on the right.
      length: i32[B], real prompt tokens.
      tokens: i32[B, G, T].

    Returns:
      [B, G, T, D]; the state at t predicts tokens[:, :, t]. Gradients flow through the prompt, once
      per group.
    """
    keys_values, _ = apply(model, params, prompt, length, method='prefill')
    last = last_tokens(prompt, length)
    return continuation_hidden(model, params, keys_values, last, length, tokens)


def last_tokens(prompt: jax.Array, length: jax.Array) -> jax.Array:
    """i32[B], the last real token of each prompt [B, P]."""
    return jnp.take_along_axis(prompt, length[:, None] - 1, axis=1)[:, 0]


def continuation_hidden(
    model: Transformer,
    params: Params,
    prompt: KeyValues,
    last: jax.Array,
    length: jax.Array,
    tokens: jax.Array,
) -> jax.Array:
    """`completion_hidden` after prompts that were read already.

    The last token of a prompt is read once more in front of each completion. So T columns are read
    and not T - 1, and what prompts make of themselves in the last layer, beyond its keys and
    values, is read by nobody: compilers leave it out where layers are unrolled.

    Args:
      model: the decoder.
      params: its parameters.
      prompt: [L, B, K, P, h] from `prefill`.
      last: i32[B] from `last_tokens`.
      length: i32[B], real prompt tokens.
      tokens: i32[B, G, T].

    Returns:
      [B, G, T, D], as `completion_hidden`.
    """
    first = jnp.broadcast_to(last[:, None, None], (*tokens.shape[:2], 1))
    read = jnp.concatenate([first, tokens[..., :-1]], axis=2)
    return apply(model, params, read, prompt, length - 1, method='extend')


def read_hidden(
    model: Transformer, params: Params, prompt: jax.Array, length: jax.Array, tokens: jax.Array
) -> jax.Array:
    """Hidden states that have read each completion token: what a score is computed from.

    Arguments are those of `completion_hidden`.

    Returns:
      [B, G, T, D]; the state at t has read tokens[:, :, t].
    """
    keys_values, _ = apply(model, params, prompt, length, method='prefill')
    return apply(model, params, tokens, keys_values, length, method='extend')
