"""Losses per token that depend on the ratios of the whole completion: VESPO and GMPO.

GSPO and LUSPO need no loss of their own: they are 'clipped' with ratio='sequence', see
`off_policy.sequence_level`.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Bool, Float

from grpo_jax.algorithm.off_policy import mean_of_completion
from grpo_jax.types import Array, Scalar

PerToken = Float[Array, '*G T']

# Bounds of log-ratios in `vespo`, those of the authors' and TRL's code: phi is 0 far beyond them.
_LOWEST_LOG, _HIGHEST_LOG = -18.420680743952367, 20.0  # log(1e-8)


def vespo(
    logprobs: PerToken,
    old_logprobs: PerToken,
    advantages: PerToken,
    mask: Bool[Array, '*G T'],
    importance_weights: PerToken | None = None,
    *,
    vespo_k_positive: Scalar,
    vespo_k_negative: Scalar,
    vespo_lambda_positive: Scalar,
    vespo_lambda_negative: Scalar,
) -> PerToken:
    """-sg(phi(w)) * A * logp, phi(w) = w^k exp(lambda (1 - w)), w the completion's ratio.

    Variational sequence-level soft policy optimization (arXiv 2602.10693, section 3.4). phi(1) is
    1, and phi falls to 0 for completions whose probability has changed much in either direction.

    Args:
      logprobs: f32[G, T] of the policy that is trained.
      old_logprobs: f32[G, T] of the policy before the inner updates.
      advantages: f32[G, T].
      mask: bool[G, T], the completion tokens.
      importance_weights: f32[G, T], old / sampled probability of each token, bounded; their product
        is a factor of w. None: 1.
      vespo_k_positive: f32[], k where A >= 0.
      vespo_k_negative: f32[], k where A < 0.
      vespo_lambda_positive: f32[], lambda where A >= 0.
      vespo_lambda_negative: f32[], lambda where A < 0.

    Returns:
      f32[G, T].
    """
    log_ratio = jnp.clip(logprobs - old_logprobs, -_HIGHEST_LOG, _HIGHEST_LOG)
    if importance_weights is not None:
        log_ratio += jnp.clip(jnp.log(importance_weights), _LOWEST_LOG, _HIGHEST_LOG)
    log_w = jnp.where(mask, log_ratio, 0.0).sum(-1, keepdims=True)
    log_w = jnp.clip(log_w, _LOWEST_LOG, _HIGHEST_LOG)
    good = advantages >= 0
    k = jnp.where(good, vespo_k_positive, vespo_k_negative)
    decay = jnp.where(good, vespo_lambda_positive, vespo_lambda_negative)
    phi = jnp.exp(k * log_w + decay * (1 - jnp.exp(log_w)))
    return -jax.lax.stop_gradient(phi) * advantages * logprobs


def gmpo(
    logprobs: PerToken,
    old_logprobs: PerToken,
    advantages: PerToken,
    mask: Bool[Array, '*G T'],
    *,
    clip_low: Scalar,
    clip_high: Scalar,
) -> PerToken:
    """-A * exp(mean_t clipped log-ratio_t): the geometric mean of a completion's clipped ratios.

    Geometric-mean policy optimization (arXiv 2507.20673, eq. 4). Each token's log-ratio is clipped
    to [-clip_low, clip_high] on the side that its advantage pushes to, before the mean is taken;
    GSPO clips after it.

    Args:
      logprobs: f32[G, T] of the policy that is trained.
      old_logprobs: f32[G, T] of the policy before the inner updates.
      advantages: f32[G, T].
      mask: bool[G, T], the completion tokens.
      clip_low: f32[], in nats; the paper uses 0.4.
      clip_high: f32[], in nats.

    Returns:
      f32[G, T], the same at all tokens of a completion whose advantages are equal.
    """
    log_ratio = logprobs - old_logprobs
    upper = jnp.where(log_ratio > clip_high, clip_high, log_ratio)
    lower = jnp.where(log_ratio < -clip_low, -clip_low, log_ratio)
    clipped = jnp.where(advantages > 0, upper, lower)
    return -advantages * jnp.exp(mean_of_completion(clipped, mask))
