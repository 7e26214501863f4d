"""One group's rewards to advantages. Callers `vmap` over groups."""

import jax
import jax.numpy as jnp

BASELINES = ('mean', 'leave_one_out', 'none')
SCALES = ('std', 'none')


def group_advantages(
    rewards: jax.Array, *, baseline: str = 'mean', scale: str = 'std', eps: float = 1e-4
) -> jax.Array:
    """Advantages of one group's completions relative to each other.

    `(r - mean(r)) / (std(r) + eps)` is outcome supervision (DeepSeekMath, arXiv 2402.03300,
    section 4.1.2); `scale='none'` is Dr. GRPO (arXiv 2503.20783); `baseline='leave_one_out'` is
    RLOO (arXiv 2402.14740), the mean of the other G - 1 rewards; with neither, the reward itself
    (SFT, RFT and online RFT in the paper's unified table: 1 for a correct completion, else 0).

    The standard deviation is the sample's (divisor G - 1) and the default eps 1e-4, as in TRL. A
    group whose rewards are all equal gets exact zeros.

    Args:
      rewards: f32[G].
      baseline: 'mean', 'leave_one_out' or 'none'.
      scale: 'std' or 'none'.
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
    if scale == 'std':
        advantages = advantages / (jnp.std(rewards, ddof=1) + eps)
    if baseline != 'none' or scale != 'none':  # r - mean(r) and std(r) round to other than zero
        advantages = jnp.where(rewards.max() == rewards.min(), 0.0, advantages)
    return advantages


def check_group_options(group_size: int, *, baseline: str, scale: str) -> None:
    """Raises ValueError for an unknown option or a group too small to be its own baseline."""
    for name, value, known in (('baseline', baseline, BASELINES), ('scale', scale, SCALES)):
        if value not in known:
            raise ValueError(f'{name}={value!r} is unknown: use one of {", ".join(known)}')
    if group_size < 2 and (baseline, scale) != ('none', 'none'):
        raise ValueError(
            f'group_size={group_size} with baseline={baseline!r}, scale={scale!r}: a group of '
            'one is its own mean and has no spread; use group_size >= 2, or '
            "baseline='none' and scale='none'"
        )
