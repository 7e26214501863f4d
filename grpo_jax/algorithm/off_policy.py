"""Ratios to the policy before the inner updates, and corrections for the policy that sampled.

Three policies may differ: the one that sampled, the one before the inner updates ("old") and the
one that is trained. `sequence_level` chooses the form of the ratio of the last two,
`importance_weights` corrects for the difference of the first two, and `off_policy_mask` leaves out
bad completions that the last would hardly sample.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Bool, Float

from grpo_jax.types import Array, Scalar

PerToken = Float[Array, '*G T']  # the tokens of a group, or any tokens

RATIOS = ('token', 'sequence', 'sequence_token')
IMPORTANCES = (
    'none', 'token', 'sequence', 'token_mask', 'sequence_mask', 'token_upper_mask',
    'sequence_upper_mask',
)  # fmt: skip


def sequence_level(
    logprobs: PerToken, old_logprobs: PerToken, mask: Bool[Array, '*G T'], ratio: str
) -> PerToken:
    """Log-probs whose ratio to the old ones is per token or per completion, as `ratio` says.

    'token' changes nothing. GSPO (arXiv 2507.18071): with 'sequence' each token has its
    completion's ratio s = exp(mean_t log ratio_t) (eq. 7), with 'sequence_token' the value of s but
    the gradient of the token's own log-prob (eq. 14).

    Returns:
      f32[G, T], to pass to a loss in place of `logprobs`.
    """
    if ratio == 'token':
        return logprobs
    mean = mean_of_completion(logprobs - old_logprobs, mask)
    if ratio == 'sequence':
        return old_logprobs + mean
    return logprobs + jax.lax.stop_gradient(old_logprobs + mean - logprobs)


def importance_weights(
    old_logprobs: PerToken,
    sampled_logprobs: PerToken,
    mask: Bool[Array, '*G T'],
    *,
    kind: str,
    cap: Scalar,
) -> PerToken:
    """Weights that correct for a sampler whose log-probs differ from the trainer's.

    With w = old / sampled probability, truncated importance sampling is min(w, C) (Yao et al.,
    2025); masked importance sampling is w within [1/C, C] and 0 elsewhere (IcePop), or w up to C
    and 0 above it (TRL's default for vLLM, 'sequence_mask' there, with C = 3).

    Args:
      old_logprobs: f32[G, T], computed by the trainer.
      sampled_logprobs: f32[G, T], computed by the sampler.
      mask: bool[G, T], the completion tokens.
      kind: 'token' or 'sequence' (w is the product over the completion), or either with '_mask'
        (0 outside [1/C, C]) or '_upper_mask' (0 above C).
      cap: C.

    Returns:
      f32[G, T], without gradient.
    """
    log_ratio = jnp.where(mask, old_logprobs - sampled_logprobs, 0.0)
    if kind.startswith('sequence'):
        log_ratio = jnp.broadcast_to(log_ratio.sum(-1, keepdims=True), mask.shape)
    weight = jnp.exp(jax.lax.stop_gradient(log_ratio))
    if not kind.endswith('mask'):
        return jnp.minimum(weight, cap)
    inside = weight <= cap
    if not kind.endswith('upper_mask'):
        inside &= weight >= 1 / cap
    return jnp.where(inside, weight, 0.0)


def off_policy_mask(
    logprobs: PerToken,
    sampled_logprobs: PerToken,
    advantages: PerToken,
    mask: Bool[Array, '*G T'],
    *,
    threshold: Scalar,
) -> Bool[Array, '*G T']:
    """False where A < 0 and the completion's mean log(pi_sampled / pi) exceeds the threshold.

    Off-policy sequence masking of DeepSeek-V3.2 (arXiv 2512.02556, eq. 9): a bad completion that
    the policy would hardly sample any more is not worth pushing further down. Good completions
    always count.

    Args:
      logprobs: f32[G, T] of the policy that is trained; without effect on the gradient.
      sampled_logprobs: f32[G, T], computed by the sampler.
      advantages: f32[G, T].
      mask: bool[G, T], the completion tokens.
      threshold: the paper's delta, in nats per token.

    Returns:
      bool[G, T], true at the tokens whose loss counts.
    """
    divergence = mean_of_completion(sampled_logprobs - logprobs, mask)
    return (advantages >= 0) | (divergence <= threshold)


def mean_of_completion(values: PerToken, mask: Bool[Array, '*G T']) -> Float[Array, '*G 1']:
    """The mean over each completion's tokens; 0 for a completion without tokens."""
    total = jnp.where(mask, values, 0.0).sum(-1, keepdims=True)
    return total / jnp.maximum(mask.sum(-1, keepdims=True), 1)
