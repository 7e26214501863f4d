"""Hidden states of whole groups, each prompt processed once for all completions of its group."""

import jax.numpy as jnp
from jaxtyping import Float, Int, UInt

from grpo_jax.models.block import KeyValues
from grpo_jax.models.routing import apply_routed
from grpo_jax.models.transformer import Transformer, apply
from grpo_jax.types import Array, Params


def completion_hidden(
    model: Transformer,
    params: Params,
    prompt: Int[Array, 'B P'],
    length: Int[Array, ' B'],
    tokens: Int[Array, 'B G T'],
    *,
    routing: tuple[UInt[Array, 'B P L k'] | None, UInt[Array, 'B G T L k'] | None] = (None, None),
) -> Float[Array, 'B G T D']:
    """Hidden states that predict each completion token.

    Args:
      model: the decoder.
      params: its parameters.
      prompt: prompt tokens, padded on the right.
      length: real prompt tokens.
      tokens: completions.
      routing: recorded of prompts and completions; None: the routers choose.

    Returns:
      The state at t predicts tokens[:, :, t]. Gradients flow through the prompt, once per group.
    """
    of_prompts, of_completions = routing
    keys_values, _ = apply_routed(model, params, of_prompts, prompt, length, method='prefill')
    last = last_tokens(prompt, length)
    return hidden_after_prompt(
        model, params, keys_values, last, length, tokens, routing=of_completions
    )


def last_tokens(prompt: Int[Array, 'B P'], length: Int[Array, ' B']) -> Int[Array, ' B']:
    """The last real token of each prompt."""
    return jnp.take_along_axis(prompt, length[:, None] - 1, axis=1)[:, 0]


def hidden_after_prompt(
    model: Transformer,
    params: Params,
    prompt: KeyValues,
    last: Int[Array, ' B'],
    length: Int[Array, ' B'],
    tokens: Int[Array, 'B G T'],
    *,
    routing: UInt[Array, 'B G T L k'] | None = None,
) -> Float[Array, 'B G T D']:
    """`completion_hidden` for prompts that are already in a cache.

    The last token of a prompt is processed once more before each completion. That makes T columns
    instead of T - 1, but then the prompt's hidden states in the last layer are not used, and where
    layers are unrolled compilers leave them out.

    Args:
      model: the decoder.
      params: its parameters.
      prompt: [L, B, K, P, h] from `prefill`.
      last: from `last_tokens`.
      length: real prompt tokens.
      tokens: completions.
      routing: see `types.Rollout`.

    Returns:
      As `completion_hidden`.
    """
    first = jnp.broadcast_to(last[:, None, None], (*tokens.shape[:2], 1))
    inputs = jnp.concatenate([first, tokens[..., :-1]], axis=2)
    return apply_routed(model, params, routing, inputs, prompt, length - 1, method='extend')


def hidden_at_tokens(
    model: Transformer,
    params: Params,
    prompt: Int[Array, 'B P'],
    length: Int[Array, ' B'],
    tokens: Int[Array, 'B G T'],
) -> Float[Array, 'B G T D']:
    """Hidden states that have read each completion token, from which scores are computed.

    Arguments are those of `completion_hidden`.

    Returns:
      The state at t has read tokens[:, :, t].
    """
    keys_values, _ = apply(model, params, prompt, length, method='prefill')
    return apply(model, params, tokens, keys_values, length, method='extend')
