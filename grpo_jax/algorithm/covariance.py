"""Tokens whose log-prob and advantage covary most: Clip-Cov and KL-Cov.

A policy loses its entropy mainly at tokens that are both likely and better than the average (Cui et
al., arXiv 2505.22617, section 3). Both methods treat a small share of them: Clip-Cov leaves them
out of the loss, KL-Cov holds them back. They are chosen once per rollout, from the whole batch and
the policy before the inner updates, so neither microbatches nor devices change the choice.
"""

from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
from jaxtyping import Bool, Float, Int

from grpo_jax.types import Array, Scalar

if TYPE_CHECKING:
    from grpo_jax.algorithm.config import Algorithm

COVARIANCES = ('none', 'clip', 'kl')

PerToken = Float[Array, '*G T']

_ROUNDING = 1e-5  # of a log-ratio, in float32


def token_covariance(
    logprobs: Float[Array, 'B G T'], advantages: Float[Array, 'B G T'], mask: Bool[Array, 'B G T']
) -> Float[Array, 'B G T']:
    """(logp - mean logp) * (A - mean A), means over all tokens in the mask (section 4).

    Returns:
      f32[B, G, T], 0 outside the mask.
    """
    count = jnp.maximum(mask.sum(), 1)

    def centered(values: jax.Array) -> jax.Array:
        return values - jnp.where(mask, values, 0.0).sum() / count

    return jnp.where(mask, centered(logprobs) * centered(advantages), 0.0)


def choose_tokens(
    algorithm: 'Algorithm',
    logprobs: Float[Array, 'B G T'],
    advantages: Float[Array, 'B G T'],
    mask: Bool[Array, 'B G T'],
    step: Int[Array, ''],
) -> Bool[Array, 'B G T']:
    """The tokens to treat: the fraction `cov_share` of those in the mask, and at least one.

    With covariance='kl' those of the highest covariance (KL-Cov); with 'clip' a random choice of
    those whose covariance lies between `cov_low` and `cov_high`, or all if they are fewer
    (Clip-Cov).

    Args:
      algorithm: covariance, cov_share, cov_low and cov_high.
      logprobs: of the policy before the inner updates.
      advantages: of the completions.
      mask: the tokens that are trained.
      step: of the training state, which seeds the random choice.
    """
    a, eligible = algorithm, mask
    order = token_covariance(logprobs, advantages, mask)
    if a.covariance == 'clip':
        eligible = mask & (order > a.cov_low) & (order < a.cov_high)
        order = jax.random.uniform(jax.random.key(step), mask.shape)
    count = jnp.maximum(jnp.floor(a.cov_share * mask.sum()), 1)
    descending = jnp.argsort(-jnp.where(eligible, order, -jnp.inf).reshape(-1))
    rank = jnp.argsort(descending).reshape(mask.shape)
    return eligible & (rank < count)


def treat(
    kind: str,
    loss: PerToken,
    log_ratio: PerToken,
    chosen: Bool[Array, '*G T'],
    *,
    cov_kl: Scalar,
) -> PerToken:
    """The loss with the chosen tokens treated.

    Args:
      kind: 'clip': their loss is 0; 'kl': `cov_kl * |log_ratio|` is added, an estimate of
        the KL from the policy before the inner updates (as in the authors' code).
      loss: f32[G, T].
      log_ratio: f32[G, T], log(pi / old).
      chosen: bool[G, T], see `choose_tokens`.
      cov_kl: f32[], the weight of the KL.
    """
    if kind == 'clip':
        return jnp.where(chosen, 0.0, loss)
    # Not jnp.abs, whose slope is 1 at 0, and -1 or 1 where the first update's ratio is rounded.
    moved = chosen & (jnp.abs(log_ratio) > _ROUNDING)
    sign = jnp.sign(jax.lax.stop_gradient(log_ratio))
    return loss + jnp.where(moved, cov_kl * sign * log_ratio, 0.0)
