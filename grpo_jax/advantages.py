"""One group's rewards to advantages. Callers `vmap` over groups.

Of outcomes (`group_advantages`), of steps (`process_advantages`) and of a critic's values (`gae`).
"""

import jax
import jax.numpy as jnp

BASELINES = ('mean', 'leave_one_out', 'none', 'critic')
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
      ValueError: an unknown option, G < 2 where the group is its own baseline or scale, or
        `baseline='critic'`.
    """
    size = rewards.shape[0]
    check_group_options(size, baseline=baseline, scale=scale)
    if baseline == 'critic':
        raise ValueError(
            "baseline='critic': rewards alone have no critic's advantages; call gae with its values"
        )
    advantages = _relative(
        rewards, jnp.ones(size, bool), centre=baseline != 'none', scale=scale, eps=eps
    )
    return advantages * (size / (size - 1)) if baseline == 'leave_one_out' else advantages


def process_advantages(
    rewards: jax.Array,
    ends: jax.Array,
    *,
    baseline: str = 'mean',
    scale: str = 'std',
    eps: float = 1e-4,
) -> jax.Array:
    """Advantages of one group's tokens from a reward for each step of its completions.

    Process supervision (DeepSeekMath, arXiv 2402.03300, section 4.1.3): the rewards of all steps of
    all G completions are normalised together, and a token's advantage is the sum of those of the
    steps that end at it or after it. Options, and what becomes of equal rewards, are as in
    `group_advantages`, of which this is the general case: a single step that ends with each
    completion gives the same. A single step in the whole group has no other to be compared with and
    counts as equal.

    Args:
      rewards: f32[G, T], read at the last token of each step.
      ends: bool[G, T], true there.
      baseline: 'mean' or 'none'.
      scale: 'std', 'population_std', 'batch' or 'none'.
      eps: added to the standard deviation.

    Returns:
      f32[G, T], 0 behind a completion's last step.

    Raises:
      ValueError: an unknown option, or a baseline that steps do not have.
    """
    _check_known(baseline, scale)
    if baseline not in ('mean', 'none'):
        reason = {
            'leave_one_out': 'process supervision has no leave-one-out',
            'critic': "a critic's advantages come from gae",
        }[baseline]
        raise ValueError(
            f"baseline={baseline!r} with a reward for each step: {reason}; use 'mean' or 'none'"
        )
    steps = _relative(rewards, ends, centre=baseline == 'mean', scale=scale, eps=eps)
    return jax.lax.cumsum(steps, axis=1, reverse=True)


def gae(
    rewards: jax.Array, values: jax.Array, mask: jax.Array, *, gamma: jax.Array, lam: jax.Array
) -> jax.Array:
    """Generalized advantage estimation of each completion's tokens, for PPO.

    A_t = sum over l of (gamma * lam)^l * d_{t+l}, d_t = r_t + gamma * V_{t+1} - V_t (Schulman et
    al., arXiv 1506.02438, eq. 16). The value behind the last token is 0. What the critic is trained
    towards is A + V.

    Args:
      rewards: f32[G, T], each token's own.
      values: f32[G, T], V of the state before token t.
      mask: bool[G, T], true up to a completion's last token.
      gamma: f32[], discount per token.
      lam: f32[], 0 trusts the critic one token ahead, 1 not at all.

    Returns:
      f32[G, T], 0 behind the mask.
    """
    values = jnp.where(mask, values, 0.0)
    following = jnp.pad(values[:, 1:], ((0, 0), (0, 1)))
    errors = jnp.where(mask, rewards + gamma * following - values, 0.0)

    def add(later, error):
        advantage = error + gamma * lam * later
        return advantage, advantage

    _, advantages = jax.lax.scan(add, jnp.zeros_like(errors[:, 0]), errors.T, reverse=True)
    return advantages.T


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
    """Raises ValueError for unknown or contrary options, or a group too small to be a baseline."""
    _check_known(baseline, scale)
    if baseline == 'critic' and scale not in ('none', 'batch'):
        raise ValueError(
            f"scale={scale!r} with baseline='critic': a critic's advantages are not those of a "
            "group; use scale='none' or 'batch'"
        )
    alone = baseline in ('none', 'critic') and scale in ('none', 'batch')
    if group_size < 2 and not alone:
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
    rewards: jax.Array, counted: jax.Array, *, centre: bool, scale: str, eps: float
) -> jax.Array:
    """The rewards that are counted, centred and scaled as one set; 0 in the place of the others.

    Exact zeros where the set is used and all in it are equal, as one or none are.
    """
    count = counted.sum()
    rewards = jnp.where(counted, rewards, 0.0)
    # Rows first: a set of one column is added up in the order of a vector.
    mean = rewards.sum(-1).sum() / jnp.maximum(count, 1)
    centred = jnp.where(counted, rewards - mean, 0.0)
    relative = centred if centre else rewards
    in_group = scale in ('std', 'population_std')
    if in_group:
        freedom = jnp.maximum(count - int(scale == 'std'), 1)
        relative = relative / (jnp.sqrt(jnp.square(centred).sum(-1).sum() / freedom) + eps)
    if not centre and not in_group:
        return relative
    least = jnp.where(counted, rewards, jnp.inf).min()
    most = jnp.where(counted, rewards, -jnp.inf).max()
    # r - mean(r) and std(r) round to other than zero
    return jnp.where(most <= least, 0.0, relative)
