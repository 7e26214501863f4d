"""One group's rewards to advantages. Callers `vmap` over groups."""

import jax
import jax.numpy as jnp

BASELINES = ('mean', 'leave_one_out', 'none')
SCALES = ('std', 'population_std', 'batch', 'none')


def group_advantages(
    rewards: jax.Array, *, baseline: str = 'mean', scale: str = 'std', eps: float = 1e-4
) -> jax.Array:
    """Advantages of one group's completions relative to each other.

    `(r - mean(r)) / (std(r) + eps)` is outcome supervision (DeepSeekMath, arXiv 2402.03300,
    section 4.1.2); `scale='none'` is Dr. GRPO (arXiv 2503.20783); `baseline='leave_one_out'` is
    RLOO (arXiv 2402.14740), the mean of the other G - 1 rewards; with neither, the reward itself
    (SFT, RFT and online RFT in the paper's unified table: 1 for a correct completion, else 0).

    The standard deviation is the sample's (divisor G - 1) and the default eps 1e-4, as in TRL
    (verl: 1e-6); open-instruct's is the population's with 1e-8. A group whose rewards are all equal
    gets exact zeros. `scale='batch'` is left to `normalize_batch`.

    Args:
      rewards: f32[G].
      baseline: 'mean', 'leave_one_out' or 'none'.
      scale: 'std', 'population_std', 'batch' or 'none'.
      eps: added to the standard deviation.

    Returns:
      f32[G].

    Raises:
      ValueError: an unknown option, or G < 2 where the group is its own baseline or scale.
    """
    size = rewards.shape[0]
    check_group_options(size, baseline=baseline, scale=scale)
    mean = rewards.mean()
    if baseline == 'mean':
        advantages = rewards - mean
    elif baseline == 'leave_one_out':
        advantages = (rewards - mean) * (size / (size - 1))
    else:
        advantages = rewards
    in_group = scale in ('std', 'population_std')
    if in_group:
        advantages = advantages / (jnp.std(rewards, ddof=int(scale == 'std')) + eps)
    if baseline != 'none' or in_group:  # r - mean(r) and std(r) round to other than zero
        advantages = jnp.where(rewards.max() == rewards.min(), 0.0, advantages)
    return advantages


def normalize_batch(advantages: jax.Array, mask: jax.Array, *, eps: float) -> jax.Array:
    """Advantages of all completion tokens of the batch, shifted and scaled to mean 0 and std 1.

    REINFORCE++ (Hu, arXiv 2501.03262, eq. 7), with the population's standard deviation. Where all
    are equal the result is 0.

    Args:
      advantages: f32[B, G, T].
      mask: bool[B, G, T], the completion tokens.
      eps: added to the standard deviation.

    Returns:
      f32[B, G, T].
    """
    count = jnp.maximum(mask.sum(), 1)
    mean = jnp.where(mask, advantages, 0.0).sum() / count
    centred = jnp.where(mask, advantages - mean, 0.0)
    std = jnp.sqrt(jnp.square(centred).sum() / count)
    equal = jnp.max(jnp.where(mask, advantages, -jnp.inf)) == jnp.min(
        jnp.where(mask, advantages, jnp.inf)
    )
    return jnp.where(equal, 0.0, centred / (std + eps))


def check_group_options(group_size: int, *, baseline: str, scale: str) -> None:
    """Raises ValueError for an unknown option or a group too small to be its own baseline."""
    for name, value, known in (('baseline', baseline, BASELINES), ('scale', scale, SCALES)):
        if value not in known:
            raise ValueError(f'{name}={value!r} is unknown: use one of {", ".join(known)}')
    alone = baseline == 'none' and scale in ('none', 'batch')
    if group_size < 2 and not alone:
        raise ValueError(
            f'group_size={group_size} with baseline={baseline!r}, scale={scale!r}: a group of '
            'one is its own mean and has no spread; use group_size >= 2, or '
            "baseline='none' and scale='none'"
        )
