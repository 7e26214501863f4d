"""Turns a rollout and its rewards into a `Batch`: log-probs, advantages and weights.

Everything here is part of the one jitted update program.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from grpo_jax.distribution import filter_logits, filter_with_peak
from grpo_jax.models import Transformer, apply, completion_hidden
from grpo_jax.types import Params, Rollout, Sampling

AGGREGATIONS = ('sequence_mean', 'token_mean', 'microbatch_token_mean', 'constant')


def completion_logprobs(
    model: Transformer,
    params: Params,
    rollout: Rollout,
    sampling: Sampling,
    *,
    chunk: int,
    entropy: bool = False,
) -> tuple[jax.Array, jax.Array | None]:
    """Log-probs of a rollout's completion tokens under the distribution that `sampling` describes.

    Logits exist for `chunk` positions of each completion at a time and are computed again in the
    backward pass, so no [B, G, T, V] array is ever made.

    Args:
      model: the decoder.
      params: its parameters.
      rollout: prompts and completions [B, G, T].
      sampling: temperature and filters, as in sampling. A sampled token always counts as inside the
        filters' support, so its log-prob is finite however far the policy has moved.
      chunk: completion positions per piece.
      entropy: also return the entropy of each token's distribution.

    Returns:
      log-probs f32[B, G, T], and entropies f32[B, G, T] in nats or None. Values behind the mask
      are finite and mean nothing.
    """
    prompts = rollout.prompts
    hidden = completion_hidden(model, params, prompts.tokens, prompts.length, rollout.tokens)
    return hidden_logprobs(
        model, params, hidden, rollout.tokens, sampling, chunk=chunk, entropy=entropy
    )


def hidden_logprobs(
    model: Transformer,
    params: Params,
    hidden: jax.Array,
    tokens: jax.Array,
    sampling: Sampling,
    *,
    chunk: int,
    entropy: bool = False,
) -> tuple[jax.Array, jax.Array | None]:
    """`completion_logprobs` from hidden states [B, G, T, D] that predict tokens [B, G, T]."""

    def piece(states, targets):
        logits = apply(model, params, states, method='logits')
        return token_logprobs(logits, targets, sampling, entropy=entropy)

    return _by_chunks(piece, (hidden, tokens), chunk)


def token_logprobs(
    logits: jax.Array, targets: jax.Array, sampling: Sampling, *, entropy: bool = False
) -> tuple[jax.Array, jax.Array | None]:
    """`completion_logprobs` from logits f32[..., V] of the targets i32[...]."""
    logits, peak = filter_with_peak(logits, sampling, keep=targets)
    rows, peak = logits.reshape(-1, logits.shape[-1]), peak.reshape(-1)  # see `filter_logits`
    if jax.default_backend() != 'gpu':
        # A pass of its own, for which others write these over the product: a chunk less in memory.
        peak = jax.lax.stop_gradient(rows).max(-1)
    norm = peak + jnp.log(jnp.exp(rows - peak[:, None]).sum(-1))
    logprob = (_at(rows, targets.reshape(-1)) - norm).reshape(targets.shape)
    if not entropy:
        return logprob, None
    inside = rows > -jnp.inf
    logp = jnp.where(inside, rows, 0.0) - norm[:, None]
    entropies = -jnp.where(inside, jnp.exp(logp) * logp, 0.0).sum(-1)
    return logprob, entropies.reshape(targets.shape)


@jax.custom_jvp
def _at(logits: jax.Array, targets: jax.Array) -> jax.Array:
    """f32[...], each position's logit of its target; going backward nothing is scattered."""
    return jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]


@_at.defjvp
def _at_jvp(primals, tangents):
    logits, targets = primals
    hit = jnp.arange(logits.shape[-1]) == targets[..., None]
    return _at(logits, targets), jnp.where(hit, tangents[0], 0.0).sum(-1)


def completion_kl(
    model: Transformer,
    old_params: Params,
    params: Params,
    rollout: Rollout,
    sampling: Sampling,
    *,
    chunk: int,
) -> jax.Array:
    """KL(old || new) of each completion token's distribution, summed over the vocabulary.

    Both distributions are those that `sampling` describes. Where a filter gives the two policies
    different supports the KL is infinite as soon as the new one drops a token of the old one, so
    such a token counts as inside the new support, as the sampled token does on both sides; one
    outside the old support adds nothing to the sum, only what mass it has in the new distribution
    is missing from the others. Supports are the same at `params = old_params`.

    Logits exist for `chunk` positions at a time, as in `completion_logprobs`.

    Args:
      model: the decoder.
      old_params: the policy that the KL's mean is taken under; no gradient flows to them.
      params: the other policy's; twice differentiable, by jvp of grad too.
      rollout: prompts and completions [B, G, T].
      sampling: temperature and filters.
      chunk: completion positions per piece.

    Returns:
      f32[B, G, T] in nats, at least 0 up to rounding. Values behind the mask are finite and mean
      nothing.
    """
    prompts, tokens = rollout.prompts, rollout.tokens
    old_params = jax.lax.stop_gradient(old_params)
    old_hidden, hidden = (
        completion_hidden(model, p, prompts.tokens, prompts.length, tokens)
        for p in (old_params, params)
    )

    def piece(old_states, states, targets):
        old = apply(model, old_params, old_states, method='logits')
        old = filter_logits(old, sampling, keep=targets)
        inside = old > -jnp.inf
        logits = apply(model, params, states, method='logits')
        whole = filter_logits(logits, Sampling(temperature=sampling.temperature))
        new = jnp.where(inside, whole, filter_logits(logits, sampling))
        old_norm, norm = (jax.nn.logsumexp(x, axis=-1) for x in (old, new))
        probability = jnp.exp(old - old_norm[..., None])
        return (probability * jnp.where(inside, old - new, 0.0)).sum(-1) + norm - old_norm

    return _by_chunks(piece, (old_hidden, hidden, tokens), chunk)


def _by_chunks(piece: Callable[..., Any], arrays: tuple[jax.Array, ...], chunk: int) -> Any:
    """`piece(*arrays)` for `chunk` positions at a time, several computed again going backward.

    Args:
      piece: from arrays [B, G, chunk, ...] to a tree of [B, G, chunk].
      arrays: [B, G, T, ...] each.
      chunk: positions per piece; the last one is filled up with zeros.

    Returns:
      A tree of [B, G, T].
    """
    length = arrays[0].shape[2]
    if length <= chunk:  # the piece's logits are at hand in the backward pass that follows
        return piece(*arrays)

    @functools.partial(jax.checkpoint, prevent_cse=False)
    def body(_, xs):
        return None, piece(*xs)

    _, out = jax.lax.scan(body, None, tuple(cut_columns(x, chunk) for x in arrays))
    return jax.tree.map(lambda x: join_columns(x, length), out)


def cut_columns(x: jax.Array, chunk: int) -> jax.Array:
    """[B, G, T, ...] -> [pieces, B, G, chunk, ...], zeros behind the end."""
    pieces = -(-x.shape[2] // chunk)
    behind = [(0, 0)] * 2 + [(0, pieces * chunk - x.shape[2])] + [(0, 0)] * (x.ndim - 3)
    x = jnp.pad(x, behind)
    return jnp.moveaxis(x.reshape(*x.shape[:2], pieces, chunk, *x.shape[3:]), 2, 0)


def join_columns(x: jax.Array, length: int) -> jax.Array:
    """[pieces, B, G, chunk, ...] -> [B, G, length, ...], undoing `cut_columns`."""
    return jnp.moveaxis(x, 0, 2).reshape(*x.shape[1:3], -1, *x.shape[4:])[:, :, :length]


def token_weights(mask: jax.Array, *, aggregation: str, microbatch: int = 1) -> jax.Array:
    """Weights that turn a sum over tokens into the chosen mean; each sums to at most 1.

    They are computed over the whole batch before it is cut into microbatches or spread over
    devices, so neither changes the loss.

    Args:
      mask: bool[B, G, T], the completion tokens.
      aggregation: 'sequence_mean', 1 / (B G |o_i|): GRPO (DeepSeekMath, arXiv 2402.03300, eq. 3);
        'token_mean', 1 / tokens in the batch: DAPO (arXiv 2503.14476, eq. 8);
        'microbatch_token_mean', the mean over microbatches of their token means: BNPO as TRL has
        it, the only one that depends on how the batch is cut;
        'constant', 1 / (B G T): Dr. GRPO (arXiv 2503.20783).
      microbatch: groups that are computed at a time, read by 'microbatch_token_mean' alone.

    Returns:
      f32[B, G, T], 0 outside the mask.

    Raises:
      ValueError: unknown aggregation.
    """
    b, g, t = mask.shape
    if aggregation == 'sequence_mean':
        scale = 1 / (b * g * jnp.maximum(mask.sum(-1, keepdims=True), 1))
    elif aggregation == 'token_mean':
        scale = 1 / jnp.maximum(mask.sum(), 1)
    elif aggregation == 'microbatch_token_mean':
        pieces = b // microbatch  # group i belongs to piece i modulo their number, see `update`
        tokens = mask.sum((1, 2)).reshape(microbatch, pieces).sum(0)
        scale = 1 / (pieces * jnp.maximum(jnp.tile(tokens, microbatch), 1))[:, None, None]
    elif aggregation == 'constant':
        scale = jnp.float32(1 / (b * g * t))
    else:
        known = ', '.join(AGGREGATIONS)
        raise ValueError(f'aggregation={aggregation!r} is unknown: use one of {known}')
    return jnp.where(mask, scale, 0.0)


def least_certain(entropy: jax.Array, mask: jax.Array, share: jax.Array) -> jax.Array:
    """Which completion tokens are among the `share` of largest entropy in the whole batch.

    Wang et al., arXiv 2506.01939, eq. 6: the tokens where the policy decides.

    Args:
      entropy: f32[B, G, T].
      mask: bool[B, G, T].
      share: f32[], 0 to 1.

    Returns:
      bool[B, G, T].
    """
    ordered = jnp.sort(jnp.where(mask, entropy, -jnp.inf).reshape(-1))[::-1]
    count = jnp.clip(jnp.ceil(share * mask.sum()).astype(jnp.int32), 1, ordered.size)
    return mask & (entropy >= ordered[count - 1])
