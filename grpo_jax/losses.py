"""One group's log-probs to a loss per token, and estimators of the KL to the reference.

A loss is a function `(logprobs, group, objective) -> f32[G, T]` and is chosen by its name. `group`
is a `Batch` without its B axis whose `old_logprobs` are always present: where the policy has not
moved since sampling they are the current ones behind a stop_gradient, which gives a ratio of 1 and
its gradient.
"""

import jax
import jax.numpy as jnp

from grpo_jax.preferences import PAIRWISE, dpo, hinge, ipo
from grpo_jax.types import Array, Batch, Objective


def per_token(
    logprobs: jax.Array,
    group: Batch,
    objective: Objective,
    entropy: jax.Array | None = None,
    *,
    loss: str = 'clipped',
    ratio: str = 'token',
    importance: str = 'none',
    kl: str = 'none',
    kl_place: str = 'loss',
) -> tuple[jax.Array, jax.Array | None]:
    """One group's loss per token with all its terms, before weights.

    Args:
      logprobs: f32[G, T] of the policy that is trained.
      group: see above.
      objective: the scalars.
      entropy: f32[G, T], or None: no bonus.
      loss: one of LOSSES.
      ratio: see `at_level`.
      importance: see `importance_weights`; 'none' leaves it out.
      kl: estimator, read where the group has ref_logprobs; 'none' adds no term.
      kl_place: 'loss' adds beta * KL here.

    Returns:
      the loss and the KL per token (None without a reference or estimator), f32[G, T].
    """
    value = FUNCTIONS[loss](at_level(logprobs, group, ratio), group, objective)
    if importance != 'none':
        value *= importance_weights(group, importance, objective.importance_cap)
    divergence = None
    if group.ref_logprobs is not None and kl != 'none':
        divergence = kl_term(logprobs, group.ref_logprobs, kl, objective)
        if kl_place == 'loss':
            value += objective.beta * divergence
    if entropy is not None:
        value -= objective.entropy_bonus * entropy
    return value, divergence


def gradient_coefficient(
    logprobs: jax.Array, group: Batch, objective: Objective, **options: str
) -> jax.Array:
    """What multiplies each token's grad log pi in the direction of ascent, by autodiff.

    DeepSeekMath's unified view of SFT, RFT, DPO, PPO and GRPO (arXiv 2402.03300, eq. 5), with unit
    weights: minus the derivative of the sum of the group's `per_token` losses, or of the one loss
    that a pair's tokens share. For DPO it is beta * sigmoid(-beta * m) at every token of the
    preferred completion and its negative at the other's (table 10).

    Args:
      logprobs: f32[G, T].
      group: see `per_token`; without old_logprobs the policy is the one that sampled.
      objective: the scalars.
      **options: of `per_token`.

    Returns:
      f32[G, T], 0 behind the mask.
    """
    if group.old_logprobs is None:
        group = group._replace(old_logprobs=jax.lax.stop_gradient(logprobs))

    def total(x):
        value, _ = per_token(x, group, objective, None, **options)
        if options.get('loss') in PAIRWISE:
            return value.mean()  # of equal values
        return jnp.where(group.rollout.mask, value, 0.0).sum()

    return -jax.grad(total)(logprobs)


def nll(logprobs: jax.Array, group: Batch, objective: Objective) -> jax.Array:
    """-A * logp: maximum likelihood where A is 1 (SFT) or 1 if correct (RFT, online RFT).

    DeepSeekMath (arXiv 2402.03300), table 10: the gradient coefficient is the advantage itself.
    """
    del objective
    return -group.advantages * logprobs


def clipped(logprobs: jax.Array, group: Batch, objective: Objective) -> jax.Array:
    """-min(ratio * A, clip(ratio, 1 - clip_low, 1 + clip_high) * A), ratio = exp(logp - old_logp).

    DeepSeekMath (arXiv 2402.03300), eq. 3; PPO's pessimistic bound (arXiv 1707.06347, eq. 7) with
    the two-sided clip of DAPO (arXiv 2503.14476, eq. 8).

    Args:
      logprobs: f32[G, T] of the policy that is trained.
      group: old_logprobs and advantages, f32[G, T].
      objective: clip_low and clip_high.

    Where A < 0 the loss grows with the ratio without end; `dual_clip` = c bounds it by c * |A| (Ye
    et al., arXiv 1912.09729, eq. 5).

    Returns:
      f32[G, T].
    """
    ratio = jnp.exp(logprobs - group.old_logprobs)
    low, high = 1 - objective.clip_low, 1 + objective.clip_high
    # Not jnp.clip, which halves the gradient of a ratio that equals a bound.
    bounded = jnp.where(ratio < low, low, jnp.where(ratio > high, high, ratio))
    loss = -jnp.minimum(ratio * group.advantages, bounded * group.advantages)
    most = -objective.dual_clip * group.advantages
    dual = (jnp.asarray(objective.dual_clip) > 0) & (group.advantages < 0)
    return jnp.where(dual, jnp.minimum(loss, most), loss)


def surrogate(logprobs: jax.Array, group: Batch, objective: Objective) -> jax.Array:
    """-ratio * A, without a clip: a bound on the KL has to hold the policy back (TRPO).

    Trust region policy optimization (arXiv 1502.05477), eq. 14. Arguments and result are those of
    `clipped`.
    """
    del objective
    return -jnp.exp(logprobs - group.old_logprobs) * group.advantages


def cispo(logprobs: jax.Array, group: Batch, objective: Objective) -> jax.Array:
    """-sg(clip(ratio, 1 - clip_low, 1 + clip_high)) * A * logp.

    MiniMax-M1 (arXiv 2506.13585), eq. 4. The bounds weigh a token and never silence it. Arguments
    and result are those of `clipped`.
    """
    ratio = jnp.exp(logprobs - group.old_logprobs)
    bounded = jnp.clip(ratio, 1 - objective.clip_low, 1 + objective.clip_high)
    return -jax.lax.stop_gradient(bounded) * group.advantages * logprobs


def sapo(logprobs: jax.Array, group: Batch, objective: Objective) -> jax.Array:
    """-A * sigmoid(tau * (ratio - 1)) * 4 / tau (Soft adaptive policy optimization, 2511.20347).

    A gate that closes smoothly in the place of a clip, its slope 1 at ratio 1; tau depends on the
    sign of A. Arguments and result are those of `clipped`.
    """
    ratio = jnp.exp(logprobs - group.old_logprobs)
    tau = jnp.where(group.advantages > 0, objective.tau_positive, objective.tau_negative)
    return -group.advantages * jax.nn.sigmoid(tau * (ratio - 1)) * 4 / tau


def value_loss(values: jax.Array, group: Batch, objective: Objective) -> jax.Array:
    """max((v - R)^2, (clip(v, old - value_clip, old + value_clip) - R)^2) / 2, a critic's loss.

    PPO as OpenAI's baselines have it: a value that moved further than value_clip towards its return
    is not pushed on. value_clip = 0 is the plain square.

    Args:
      values: f32[G, T] of the critic that is trained.
      group: old_values, and returns R, f32[G, T].
      objective: value_clip.

    Returns:
      f32[G, T].
    """
    clip = jnp.asarray(objective.value_clip)
    near = group.old_values + jnp.clip(values - group.old_values, -clip, clip)
    near = jnp.where(clip > 0, near, values)
    return 0.5 * jnp.maximum(jnp.square(values - group.returns), jnp.square(near - group.returns))


def at_level(logprobs: jax.Array, group: Batch, level: str) -> jax.Array:
    """Log-probs whose ratio to the old ones is that of a token or of its whole sequence.

    GSPO (arXiv 2507.18071): 'sequence' gives each token the ratio s = exp(mean_t log ratio_t) of
    its completion (eq. 7), 'sequence_token' its value sg(s) with the token's own gradient (eq. 14).

    Args:
      logprobs: f32[G, T].
      group: old_logprobs f32[G, T] and the rollout's mask.
      level: 'token', 'sequence' or 'sequence_token'.

    Returns:
      f32[G, T], to be given to a loss in the place of `logprobs`.
    """
    if level == 'token':
        return logprobs
    mask = group.rollout.mask
    difference = jnp.where(mask, logprobs - group.old_logprobs, 0.0)
    mean = difference.sum(-1, keepdims=True) / jnp.maximum(mask.sum(-1, keepdims=True), 1)
    if level == 'sequence':
        return group.old_logprobs + mean
    fixed = jax.lax.stop_gradient(group.old_logprobs + mean - logprobs)
    return logprobs + fixed


def importance_weights(group: Batch, kind: str, cap: Array) -> jax.Array:
    """Weights f32[G, T] that correct for a sampler whose log-probs are not quite the trainer's.

    With w = old / sampled probability, truncated importance sampling is min(w, C) (Yao et al.,
    2025); masking is w where it lies within [1/C, C] and else 0 (IcePop; also of whole sequences).

    Args:
      group: old_logprobs, and the rollout's logprobs as sampled, f32[G, T].
      kind: 'token' or 'sequence' (w is then the product over the completion), or one of these with
        '_mask'.
      cap: C.
    """
    mask = group.rollout.mask
    log_ratio = jnp.where(mask, group.old_logprobs - group.rollout.logprobs, 0.0)
    if kind.startswith('sequence'):
        log_ratio = jnp.broadcast_to(log_ratio.sum(-1, keepdims=True), mask.shape)
    weight = jnp.exp(jax.lax.stop_gradient(log_ratio))
    if kind.endswith('mask'):
        return jnp.where((weight >= 1 / cap) & (weight <= cap), weight, 0.0)
    return jnp.minimum(weight, cap)


def clip_masks(
    logprobs: jax.Array, group: Batch, objective: Objective, loss: str = 'clipped'
) -> tuple[jax.Array, jax.Array]:
    """bool[G, T] each: where the lower and where the upper bound of a loss come into effect.

    `clipped` has no gradient there. `cispo` bounds its weights whatever the advantage's sign.
    """
    ratio = jnp.exp(logprobs - group.old_logprobs)
    low, high = ratio < 1 - objective.clip_low, ratio > 1 + objective.clip_high
    if loss == 'cispo':
        return low, high
    return low & (group.advantages < 0), high & (group.advantages > 0)


def kl_term(
    logprobs: jax.Array, ref_logprobs: jax.Array, name: str, objective: Objective
) -> jax.Array:
    """The estimator `name`, within +- kl_clamp where that is not 0 (verl and OpenRLHF use 10)."""
    value = {'k1': k1, 'k2': k2, 'k3': k3}[name](logprobs, ref_logprobs)
    clamp = jnp.where(jnp.asarray(objective.kl_clamp) > 0, objective.kl_clamp, jnp.inf)
    return jnp.clip(value, -clamp, clamp)


def k1(logprobs: jax.Array, ref_logprobs: jax.Array) -> jax.Array:
    """log(pi / ref): unbiased, either sign. As a loss its expected on-policy gradient is zero."""
    return logprobs - ref_logprobs


def k2(logprobs: jax.Array, ref_logprobs: jax.Array) -> jax.Array:
    """log(pi / ref)^2 / 2: biased, low variance; its on-policy gradient is that of the KL."""
    return 0.5 * jnp.square(logprobs - ref_logprobs)


def k3(logprobs: jax.Array, ref_logprobs: jax.Array) -> jax.Array:
    """ref/pi - log(ref/pi) - 1: unbiased, never negative (DeepSeekMath, 2402.03300, eq. 4)."""
    log_ratio = ref_logprobs - logprobs
    return jnp.exp(log_ratio) - log_ratio - 1


FUNCTIONS = {
    'clipped': clipped,
    'nll': nll,
    'surrogate': surrogate,
    'cispo': cispo,
    'sapo': sapo,
    'dpo': dpo,
    'ipo': ipo,
    'hinge': hinge,
}
LOSSES = tuple(FUNCTIONS)
