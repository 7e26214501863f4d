"""Log-probs of completions, and the weights that turn a sum over tokens into a mean."""

import jax.numpy as jnp
from jaxtyping import Bool, Float

from grpo_jax.engine.chunks import map_chunks
from grpo_jax.engine.token_distribution import token_logprobs
from grpo_jax.models import Transformer, apply, completion_hidden
from grpo_jax.types import Array, Params, Rollout, Sampling, Scalar

AGGREGATIONS = ('sequence_mean', 'token_mean', 'microbatch_token_mean', 'constant', 'sequence_sum')


def completion_logprobs(
    model: Transformer,
    params: Params,
    rollout: Rollout,
    sampling: Sampling,
    *,
    chunk: int = 128,
    entropy: bool = False,
) -> tuple[Float[Array, 'B G T'], Float[Array, 'B G T'] | None]:
    """Log-probs of a rollout's completion tokens under the distribution that `sampling` describes.

    Every prompt is processed once for its group. Only the logits of `chunk` positions exist at a
    time, and the backward pass recomputes them, so no [B, G, T, V] array is ever in memory.

    Args:
      model: the decoder.
      params: its parameters.
      rollout: prompts and completions [B, G, T].
      sampling: the temperature and filters that tokens were sampled with. The filters never remove
        a sampled token, so its log-prob is finite however far the policy has moved since.
      chunk: positions whose logits exist at a time.
      entropy: also return the entropy of each token's distribution.

    Returns:
      Log-probs f32[B, G, T], and entropies f32[B, G, T] in nats, or None. Values outside the mask
      are finite but meaningless.
    """
    prompts = rollout.prompts
    routing = prompts.routing, rollout.routing
    hidden = completion_hidden(
        model, params, prompts.tokens, prompts.length, rollout.tokens, routing=routing
    )

    def piece(states: Array, targets: Array, support: Array | None) -> tuple[Array, Array | None]:
        logits = apply(model, params, states, method='logits')
        return token_logprobs(logits, targets, sampling, support=support, entropy=entropy)

    return map_chunks(piece, (hidden, rollout.tokens, rollout.support), chunk)


def token_weights(
    mask: Bool[Array, 'B G T'], *, aggregation: str, microbatch: int = 1
) -> Float[Array, 'B G T']:
    """Weights that turn a sum over the batch's tokens into the chosen mean or sum.

    They are computed before the batch is cut into microbatches or spread over devices, so neither
    changes the loss.

    Args:
      mask: bool[B, G, T], the completion tokens.
      aggregation: 'sequence_mean', 1 / (B G |o_i|): GRPO (DeepSeekMath, arXiv 2402.03300, eq. 3);
        'token_mean', 1 / tokens in the batch: DAPO (arXiv 2503.14476, eq. 8);
        'microbatch_token_mean', the mean over microbatches of their token means: BNPO as in TRL,
        the only one that depends on how the batch is cut;
        'constant', 1 / (B G T): Dr. GRPO (arXiv 2503.20783);
        'sequence_sum', 1 / (B G), T times as large: LUSPO (arXiv 2602.05261).
      microbatch: groups per microbatch, used only by 'microbatch_token_mean'.

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
        pieces = b // microbatch  # group i is in microbatch i % pieces, see `Microbatches`
        tokens = mask.sum((1, 2)).reshape(microbatch, pieces).sum(0)
        scale = 1 / (pieces * jnp.maximum(jnp.tile(tokens, microbatch), 1))[:, None, None]
    elif aggregation == 'constant':
        scale = jnp.float32(1 / (b * g * t))
    elif aggregation == 'sequence_sum':
        scale = jnp.float32(1 / (b * g))
    else:
        known = ', '.join(AGGREGATIONS)
        raise ValueError(f'aggregation={aggregation!r} is unknown: use one of {known}')
    return jnp.where(mask, scale, 0.0)


def highest_entropy(
    entropy: Float[Array, 'B G T'], mask: Bool[Array, 'B G T'], share: Scalar
) -> Bool[Array, 'B G T']:
    """A mask of the fraction `share` (0 to 1) of the batch's tokens with the highest entropy.

    Wang et al., arXiv 2506.01939, eq. 6: the "forking tokens", those that are not below the
    (1 - share) quantile (by linear interpolation, as in TRL). Ties with the last are included.
    """
    ordered = jnp.sort(jnp.where(mask, entropy, -jnp.inf).reshape(-1))[::-1]
    count = jnp.floor(share * (mask.sum() - 1) + 1.0001)  # a product may be rounded down
    count = jnp.clip(count.astype(jnp.int32), 1, ordered.size)
    return mask & (entropy >= ordered[count - 1])
