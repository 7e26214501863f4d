"""One group's log-probs -> a loss per token, and estimators of the KL to the reference.

A loss is a function of arrays and keyword coefficients, such as
`clipped(logprobs, old_logprobs, advantages, *, clip_low, clip_high)`. The update passes the
arguments that its signature names: arrays of one group (`ARRAYS`) and coefficients of `Algorithm`.
So a loss of your own needs no registration: `Algorithm(loss=my_loss)`.

`old_logprobs` are those of the policy before the inner updates. In the first inner update they
equal the current ones: the ratio is 1, but its gradient is not 0.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from jaxtyping import Float

from grpo_jax.algorithm import covariance
from grpo_jax.algorithm.binding import bind, names_of
from grpo_jax.algorithm.off_policy import importance_weights, off_policy_mask, sequence_level
from grpo_jax.algorithm.preferences import dpo, hinge, ipo
from grpo_jax.algorithm.sequence_losses import gmpo, vespo
from grpo_jax.types import Array, Batch, Scalar

if TYPE_CHECKING:
    from grpo_jax.algorithm.config import Algorithm

PerToken = Float[Array, '*G T']  # the tokens of a group, or any tokens

KL_ESTIMATORS = ('k1', 'k2', 'k3')
ARRAYS = (
    'logprobs', 'old_logprobs', 'ref_logprobs', 'sampled_logprobs', 'advantages', 'mask', 'entropy',
    'importance_weights',
)  # fmt: skip


# Losses


def nll(logprobs: PerToken, advantages: PerToken) -> PerToken:
    """-A * logp: maximum likelihood where A is 1 (SFT) or 1 if correct (RFT, online RFT).

    DeepSeekMath (arXiv 2402.03300), table 10: the gradient coefficient is the advantage itself.
    """
    return -advantages * logprobs


def clipped(
    logprobs: PerToken,
    old_logprobs: PerToken,
    advantages: PerToken,
    *,
    clip_low: Scalar,
    clip_high: Scalar,
    dual_clip: Scalar = 0.0,
) -> PerToken:
    """-min(ratio * A, clip(ratio, 1 - clip_low, 1 + clip_high) * A), ratio = exp(logp - old_logp).

    DeepSeekMath (arXiv 2402.03300), eq. 3; PPO's pessimistic bound (arXiv 1707.06347, eq. 7) with
    the two-sided clip of DAPO (arXiv 2503.14476, eq. 8).

    Args:
      logprobs: f32[G, T] of the policy that is trained.
      old_logprobs: f32[G, T] of the policy before the inner updates.
      advantages: f32[G, T].
      clip_low: f32[], distance of the lower bound from 1.
      clip_high: f32[], distance of the upper bound from 1.
      dual_clip: f32[], c > 0: where A < 0 the loss, which would grow with the ratio without limit,
        is at most c * |A| (Ye et al., arXiv 1912.09729, eq. 5); 0: no such bound.

    Returns:
      f32[G, T].
    """
    ratio = jnp.exp(logprobs - old_logprobs)
    low, high = 1 - clip_low, 1 + clip_high
    # Not jnp.clip, which halves the gradient of a ratio that equals a bound.
    bounded = jnp.where(ratio < low, low, jnp.where(ratio > high, high, ratio))
    loss = -jnp.minimum(ratio * advantages, bounded * advantages)
    most = -dual_clip * advantages
    dual = (jnp.asarray(dual_clip) > 0) & (advantages < 0)
    return jnp.where(dual, jnp.minimum(loss, most), loss)


def surrogate(logprobs: PerToken, old_logprobs: PerToken, advantages: PerToken) -> PerToken:
    """-ratio * A without a clip, for a trust-region step, which bounds the KL instead.

    Trust region policy optimization (arXiv 1502.05477), eq. 14. Arrays and result are f32[G, T].
    """
    return -jnp.exp(logprobs - old_logprobs) * advantages


def cispo(
    logprobs: PerToken,
    old_logprobs: PerToken,
    advantages: PerToken,
    *,
    clip_low: Scalar,
    clip_high: Scalar,
) -> PerToken:
    """-sg(clip(ratio, 1 - clip_low, 1 + clip_high)) * A * logp.

    MiniMax-M1 (arXiv 2506.13585), eq. 4. The bounds limit a token's weight and never remove its
    gradient. Arguments and result as in `clipped`.
    """
    ratio = jnp.exp(logprobs - old_logprobs)
    bounded = jnp.clip(ratio, 1 - clip_low, 1 + clip_high)
    return -jax.lax.stop_gradient(bounded) * advantages * logprobs


def sapo(
    logprobs: PerToken,
    old_logprobs: PerToken,
    advantages: PerToken,
    *,
    tau_positive: Scalar,
    tau_negative: Scalar,
) -> PerToken:
    """-A * sigmoid(tau * (ratio - 1)) * 4 / tau, a smooth gate instead of a clip.

    Soft adaptive policy optimization (arXiv 2511.20347). The slope is 1 at ratio 1; tau depends on
    the sign of A. Arguments and result as in `clipped`.
    """
    ratio = jnp.exp(logprobs - old_logprobs)
    tau = jnp.where(advantages > 0, tau_positive, tau_negative)
    return -advantages * jax.nn.sigmoid(tau * (ratio - 1)) * 4 / tau


LOSSES: dict[str, Callable[..., Array]] = {
    'clipped': clipped, 'nll': nll, 'surrogate': surrogate, 'cispo': cispo, 'sapo': sapo,
    'vespo': vespo, 'gmpo': gmpo, 'dpo': dpo, 'ipo': ipo, 'hinge': hinge,
}  # fmt: skip


# The KL to the reference


def kl_divergence(
    logprobs: PerToken, ref_logprobs: PerToken, estimator: str, kl_clamp: Scalar = 0.0
) -> PerToken:
    """An estimate of each token's KL, clipped to +-kl_clamp unless that is 0 (verl, OpenRLHF: 10).

    'k1' = log(pi / ref) is unbiased and of either sign; as a loss, its expected on-policy gradient
    is 0. 'k2' = log(pi / ref)^2 / 2 is biased, but its on-policy gradient is that of the KL.
    'k3' = ref / pi - log(ref / pi) - 1 is unbiased and never negative (DeepSeekMath, arXiv
    2402.03300, eq. 4).
    """
    log_ratio = ref_logprobs - logprobs
    if estimator == 'k1':
        value = -log_ratio
    elif estimator == 'k2':
        value = 0.5 * jnp.square(log_ratio)
    else:
        value = jnp.exp(log_ratio) - log_ratio - 1
    clamp = jnp.where(jnp.asarray(kl_clamp) > 0, kl_clamp, jnp.inf)
    return jnp.clip(value, -clamp, clamp)


# From an `Algorithm` to the loss of one group


def policy_loss(
    algorithm: 'Algorithm', logprobs: PerToken, group: Batch, entropy: PerToken | None = None
) -> tuple[PerToken, PerToken | None]:
    """The loss per token with all its terms, not yet weighted, and the KL per token.

    Args:
      algorithm: choices and coefficients.
      logprobs: f32[G, T] of the policy that is trained.
      group: a `Batch` without its B axis; old_logprobs is None if they equal `logprobs`.
      entropy: f32[G, T] of the policy, where the algorithm has an entropy bonus.

    Returns:
      f32[G, T] each; the second is None without a KL term.
    """
    a, arrays = algorithm, arrays_of(algorithm, logprobs, group, entropy)
    old, sampled, mask = arrays['old_logprobs'], arrays['sampled_logprobs'], arrays['mask']
    level = sequence_level(logprobs, old, mask, a.ratio)
    loss = bind(a.loss_function, arrays | {'logprobs': level}, a.coefficients)()
    if loss.shape != logprobs.shape:
        raise ValueError(
            f'the loss {a.name_of_loss!r} returned shape {loss.shape}: it has to return '
            f'one number for each token, [G, T] = {logprobs.shape}'
        )
    if a.covariance != 'none':
        assert group.high_covariance is not None
        chosen = group.high_covariance
        loss = covariance.treat(a.covariance, loss, logprobs - old, chosen, cov_kl=a.cov_kl)
    if a.importance != 'none' and 'importance_weights' not in names_of(a.loss_function):
        loss *= arrays['importance_weights']
    if a.masks_off_policy:
        threshold, advantages = a.off_policy_threshold, group.advantages
        counts = off_policy_mask(logprobs, sampled, advantages, mask, threshold=threshold)
        loss = jnp.where(counts, loss, 0.0)
    if group.selected is not None:
        loss = jnp.where(group.selected, loss, 0.0)
    kl = None
    if a.has_kl:
        kl = kl_divergence(logprobs, arrays['ref_logprobs'], a.kl, a.kl_clamp)
        if a.unbiased_kl:  # DeepSeek-V3.2 (arXiv 2512.02556, eq. 7); the ratio has a gradient
            kl *= jnp.exp(level - old)
        if a.kl_place == 'loss':
            loss += a.beta * kl
    if entropy is not None and 'entropy_bonus' in (a.terms or ()):
        counted = entropy if group.selected is None else jnp.where(group.selected, entropy, 0.0)
        loss -= a.entropy_bonus * counted
    return loss, kl


def arrays_of(
    algorithm: 'Algorithm', logprobs: PerToken, group: Batch, entropy: PerToken | None
) -> dict[str, Any]:
    """The arrays of one group that a loss may name in its signature; absent ones are None."""
    a, old, mask = algorithm, group.old_logprobs, group.rollout.policy_mask
    old = jax.lax.stop_gradient(logprobs) if old is None else old
    sampled, weights = group.rollout.logprobs, None
    if a.importance != 'none':
        weights = importance_weights(old, sampled, mask, kind=a.importance, cap=a.importance_cap)
    values = (
        logprobs, old, group.ref_logprobs, sampled, group.advantages, mask, entropy, weights,
    )  # fmt: skip
    return dict(zip(ARRAYS, values, strict=True))


def gradient_coefficient(
    algorithm: 'Algorithm', logprobs: PerToken, group: Batch
) -> Float[Array, 'G T']:
    """The factor of each token's grad log pi in the ascent direction, by automatic differentiation.

    DeepSeekMath's unified view (arXiv 2402.03300, eq. 5) with unit weights: minus the derivative of
    the sum of the group's losses, or of the one loss that a pair's tokens share. For DPO it is
    beta * sigmoid(-beta * m) at every token of the preferred completion and its negative at those
    of the other (table 10). Arguments as in `policy_loss`; the result is 0 outside the mask.
    """

    def total(x: Array) -> Array:
        loss, _ = policy_loss(algorithm, x, group)
        if algorithm.pairwise:
            return loss.mean()  # all its values are equal
        return jnp.where(group.rollout.policy_mask, loss, 0.0).sum()

    return -jax.grad(total)(logprobs)
