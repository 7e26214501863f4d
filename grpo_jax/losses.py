"""One group's log-probs to a loss per token, and estimators of the KL to the reference.

A loss is a function `(logprobs, group, objective) -> f32[G, T]` and is chosen by its name. `group`
is a `Batch` without its B axis whose `old_logprobs` are always present: where the policy has not
moved since sampling they are the current ones behind a stop_gradient, which gives a ratio of 1 and
its gradient.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from grpo_jax.types import Array, Batch


class Objective(NamedTuple):
    """Scalars of the loss, traced by jit: changing one never recompiles."""

    clip_low: Array | float = 0.2  # the ratio's lower bound is 1 - clip_low
    clip_high: Array | float = 0.2  # its upper bound 1 + clip_high
    beta: Array | float = 0.0  # weight of the KL term to the reference


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

    Returns:
      f32[G, T].
    """
    ratio = jnp.exp(logprobs - group.old_logprobs)
    bounded = jnp.clip(ratio, 1 - objective.clip_low, 1 + objective.clip_high)
    return -jnp.minimum(ratio * group.advantages, bounded * group.advantages)


def clip_masks(
    logprobs: jax.Array, group: Batch, objective: Objective
) -> tuple[jax.Array, jax.Array]:
    """bool[G, T] each: where the lower and where the upper bound cut `clipped`s gradient."""
    ratio = jnp.exp(logprobs - group.old_logprobs)
    low = (ratio < 1 - objective.clip_low) & (group.advantages < 0)
    high = (ratio > 1 + objective.clip_high) & (group.advantages > 0)
    return low, high


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
