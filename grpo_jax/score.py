"""Turns a rollout and its rewards into a `Batch`: log-probs, advantages and weights.

Everything here is part of the one jitted update program.
"""

import functools

import jax
import jax.numpy as jnp

from grpo_jax.models import Transformer, apply, completion_hidden
from grpo_jax.sample import filter_logits
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
    prompts, tokens = rollout.prompts, rollout.tokens
    hidden = completion_hidden(model, params, prompts.tokens, prompts.length, tokens)
    length = tokens.shape[-1]
    chunk = min(chunk, length)
    pieces = -(-length // chunk)

    def cut(x):
        """[B, G, T, ...] -> [pieces, B, G, chunk, ...]."""
        x = jnp.pad(x, [(0, 0)] * 2 + [(0, pieces * chunk - length)] + [(0, 0)] * (x.ndim - 3))
        return jnp.moveaxis(x.reshape(*x.shape[:2], pieces, chunk, *x.shape[3:]), 2, 0)

    @functools.partial(jax.checkpoint, prevent_cse=False)
    def piece(_, xs):
        states, targets = xs
        logits = apply(model, params, states, method='logits')
        logits = filter_logits(logits, sampling, keep=targets)
        norm = jax.nn.logsumexp(logits, axis=-1)
        hit = jnp.arange(logits.shape[-1]) == targets[..., None]
        logprob = jnp.where(hit, logits, 0.0).sum(-1) - norm
        if not entropy:
            return None, (logprob, None)
        inside = logits > -jnp.inf
        logp = jnp.where(inside, logits, 0.0) - norm[..., None]
        return None, (logprob, -jnp.where(inside, jnp.exp(logp) * logp, 0.0).sum(-1))

    _, out = jax.lax.scan(piece, None, (cut(hidden), cut(tokens)))
    return jax.tree.map(
        lambda x: jnp.moveaxis(x, 0, 2).reshape(*x.shape[1:3], -1)[..., :length], out
    )


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
