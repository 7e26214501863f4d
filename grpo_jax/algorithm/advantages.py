"""One group's rewards -> advantages. Callers `vmap` over groups.

One reward per completion: `group_advantages`; one per step: `process_advantages`; other estimators
and your own: `estimators`; a critic (PPO): `critic.gae`.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Bool, Float

from grpo_jax.algorithm.moments import unit_of
from grpo_jax.types import Array, Scalar

OF_GROUP = ('mean', 'leave_one_out')  # baselines that are computed from the group's rewards
BASELINES = (*OF_GROUP, 'none', 'greedy', 'critic')
OF_BATCH = ('batch', 'batch_std', 'informative')  # scales that are computed over the whole batch
SCALES = ('std', 'population_std', *OF_BATCH, 'none')


def group_advantages(
    rewards: Float[Array, ' G'],
    scored: Bool[Array, ' G'] | None = None,
    *,
    baseline: str = 'mean',
    scale: str = 'std',
    eps: Scalar = 1e-4,
) -> Float[Array, ' G']:
    """Advantages of one group's completions relative to each other.

    `(r - mean(r)) / (std(r) + eps)` is outcome supervision (DeepSeekMath, arXiv 2402.03300,
    section 4.1.2); `scale='none'` is Dr. GRPO (arXiv 2503.20783); `baseline='leave_one_out'` is
    RLOO (arXiv 2402.14740), the mean of the other G - 1 rewards. Without baseline and scale the
    advantage is the reward (SFT, RFT and online RFT in the paper's table 10: 1 if correct, else 0).

    By default std is the sample standard deviation (divisor G - 1) and eps is 1e-4, as in TRL; verl
    uses eps=1e-6, and open-instruct 'population_std' with 1e-8. Equal rewards give advantages of
    exactly 0, and rewards of any magnitude that float32 holds are centered and scaled without
    overflow. The scales in `OF_BATCH` scale nothing here: they need the other groups.

    Args:
      rewards: f32[G].
      scored: bool[G], completions that have a reward; the others have advantage 0 and do not count
        in the mean and the deviation. None: all.
      baseline: 'mean', 'leave_one_out' or 'none'.
      scale: one of `SCALES`.
      eps: added to the standard deviation.

    Returns:
      f32[G].

    Raises:
      ValueError: an unknown option, G < 2 with a baseline or scale that needs other completions, or
        a baseline that is not in `rewards`: 'critic' or 'greedy'.
    """
    size = rewards.shape[0]
    check_group_options(size, baseline=baseline, scale=scale)
    if baseline in ('critic', 'greedy'):
        use = {'critic': 'use grpo_jax.gae', 'greedy': "subtract it, and use baseline='none'"}
        raise ValueError(f'baseline={baseline!r} is not one of the rewards: {use[baseline]}')
    counted = jnp.ones(size, bool) if scored is None else scored
    advantages = _relative(rewards, counted, center=baseline != 'none', scale=scale, eps=eps)
    if baseline != 'leave_one_out':
        return advantages
    count = size if scored is None else jnp.maximum(scored.sum(), 2)
    return advantages * (count / (count - 1))


def process_advantages(
    rewards: Float[Array, 'G T'],
    ends: Bool[Array, 'G T'],
    *,
    baseline: str = 'mean',
    scale: str = 'std',
    eps: Scalar = 1e-4,
) -> Float[Array, 'G T']:
    """Advantages of one group's tokens from a reward for each step of its completions.

    Process supervision (DeepSeekMath, arXiv 2402.03300, section 4.1.3): the rewards of all steps of
    all G completions are normalized together, and a token's advantage is the sum of the
    normalized rewards of the steps that end at or after it. With a single step, at the end of each
    completion, the result equals that of `group_advantages`. A single step in the whole group has
    nothing to be compared with, so its advantage is 0.

    Args:
      rewards: f32[G, T], used at the last token of each step.
      ends: bool[G, T], true at the last token of each step.
      baseline: 'mean' or 'none'.
      scale: one of `SCALES`.
      eps: added to the standard deviation.

    Returns:
      f32[G, T], 0 after a completion's last step.

    Raises:
      ValueError: an unknown option, or a baseline that process supervision does not define.
    """
    _check_known(baseline, scale)
    if baseline not in ('mean', 'none'):
        by_critic = 'its advantages are computed by grpo_jax.gae'
        reason = by_critic if baseline == 'critic' else 'process supervision does not define it'
        raise ValueError(
            f"baseline={baseline!r} with a reward for each step: {reason}; use 'mean' or 'none'"
        )
    steps = _relative(rewards, ends, center=baseline == 'mean', scale=scale, eps=eps)
    return jax.lax.cumsum(steps, axis=1, reverse=True)


def normalize_batch(
    advantages: Float[Array, 'B G T'], mask: Bool[Array, 'B G T'], *, eps: Scalar
) -> Float[Array, 'B G T']:
    """Shifts and scales the advantages of all tokens in the mask to mean 0 and std 1.

    REINFORCE++ (Hu, arXiv 2501.03262, eq. 7), with the population standard deviation. The
    result is 0 outside the mask, and everywhere if all advantages are equal.

    Args:
      advantages: f32[B, G, T].
      mask: bool[B, G, T], the completion tokens.
      eps: added to the standard deviation.

    Returns:
      f32[B, G, T].
    """
    count = jnp.maximum(mask.sum(), 1)
    masked = jnp.where(mask, advantages, 0.0)
    unit = unit_of(masked)
    mean = (masked / unit).sum() / count
    centered = jnp.where(mask, masked / unit - mean, 0.0)
    std = jnp.sqrt(jnp.square(centered).sum() / count)
    most = jnp.where(mask, advantages, -jnp.inf).max()
    least = jnp.where(mask, advantages, jnp.inf).min()
    return jnp.where(most == least, 0.0, centered / (std + eps / unit))


def check_group_options(group_size: int, *, baseline: str, scale: str) -> None:
    """Checks options that need more than one completion.

    Raises:
      ValueError: unknown or conflicting options, or a group too small for them.
    """
    _check_known(baseline, scale)
    alone = baseline in ('critic', 'greedy')
    if alone and scale not in ('none', 'batch'):
        raise ValueError(
            f'scale={scale!r} with baseline={baseline!r}, whose advantages are not of a group: '
            "use scale='none' or 'batch'"
        )
    needs_group = not alone and (baseline != 'none' or scale in ('std', 'population_std'))
    if group_size < 2 and needs_group:
        raise ValueError(
            f'group_size={group_size} with baseline={baseline!r}, scale={scale!r}: a group of '
            'one is its own mean and has no spread; use group_size >= 2, or '
            "baseline='none' and scale='none'"
        )


def _check_known(baseline: str, scale: str) -> None:
    for name, value, known in (('baseline', baseline, BASELINES), ('scale', scale, SCALES)):
        if value not in known:
            raise ValueError(f'{name}={value!r} is unknown: use one of {", ".join(known)}')


def _relative(
    rewards: Array, counted: Array, *, center: bool, scale: str, eps: Scalar
) -> jax.Array:
    """Rewards where `counted`, centered and scaled together; 0 elsewhere.

    Exact zeros where all rewards are equal, unless the reward itself is the advantage.
    """
    in_group = scale in ('std', 'population_std')
    rewards = jnp.where(counted, rewards, 0.0)
    if not center and not in_group:
        return rewards
    count, unit = counted.sum(), unit_of(rewards)
    scaled = rewards / unit
    # Sum rows first, so that [G, 1] is summed in the same order as [G].
    mean = scaled.sum(-1).sum() / jnp.maximum(count, 1)
    centered = jnp.where(counted, scaled - mean, 0.0)
    relative = centered if center else scaled
    if in_group:
        freedom = jnp.maximum(count - int(scale == 'std'), 1)
        std = jnp.sqrt(jnp.square(centered).sum(-1).sum() / freedom)
        relative = relative / (std + eps / unit)
    else:
        relative = relative * unit
    least = jnp.where(counted, rewards, jnp.inf).min()
    most = jnp.where(counted, rewards, -jnp.inf).max()
    # Exact zeros, since r - mean(r) and std(r) of equal rewards may differ from 0 by rounding.
    return jnp.where(most <= least, 0.0, relative)
