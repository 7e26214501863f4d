"""The advantages of a batch from its rewards: by baseline and scale, by name, or by your function.

An estimator is a function of the arrays of one group (`ARRAYS`) and of coefficients of `Algorithm`.
It gets those that its signature names, and returns f32[G] or f32[G, T]:
`Algorithm(advantage_estimator='opo')`, or `Algorithm(advantage_estimator=my_estimator)`.
"""

import math
from collections.abc import Callable
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float, Int

from grpo_jax.algorithm.advantages import (
    OF_BATCH,
    check_group_options,
    group_advantages,
    process_advantages,
)
from grpo_jax.algorithm.binding import bind
from grpo_jax.algorithm.moments import standard_deviation, unit_of
from grpo_jax.types import (
    Array,
    BaselinedRewards,
    FunctionRewards,
    Rewards,
    Rollout,
    Scalar,
    StepRewards,
)

if TYPE_CHECKING:
    from grpo_jax.algorithm.config import Algorithm

REWARD_AGGREGATIONS = ('sum_then_normalize', 'normalize_then_sum')
ARRAYS = ('rewards', 'mask', 'lengths', 'scored', 'function_rewards', 'function_weights')


# Estimators by name


def opo(
    rewards: Float[Array, ' G'], lengths: Int[Array, ' G'], scored: Bool[Array, ' G']
) -> Float[Array, ' G']:
    """r_i - sum_j(l_j r_j) / sum_j(l_j), with l the length of a completion in tokens.

    On-policy RL with optimal reward baseline (OPO, arXiv 2505.23585, eq. 9): the baseline that
    minimizes the variance of the gradient, if the squared norms of the gradients of completions
    grow with their lengths. Not divided by a deviation.

    Args:
      rewards: f32[G].
      lengths: i32[G], tokens of each completion.
      scored: bool[G], completions that have a reward.
    """
    rewards = jnp.where(scored, rewards, 0.0)
    unit = unit_of(rewards)
    share = jnp.where(scored, lengths, 0) / jnp.maximum(jnp.where(scored, lengths, 0).sum(), 1)
    baseline = (share * (rewards / unit)).sum()
    return jnp.where(_all_equal(rewards, scored), 0.0, (rewards / unit - baseline) * unit)


def best_minus_second(rewards: Float[Array, ' G'], scored: Bool[Array, ' G']) -> Float[Array, ' G']:
    """The best completion gets its lead over the second best, the others get 0.

    Tang et al., arXiv 2503.19595: the maximum over the group is the objective (pass@G), and the
    baseline of a completion is the maximum over the others. Two equally good ones have no lead.

    Args:
      rewards: f32[G], G > 1.
      scored: bool[G], completions that have a reward.
    """
    ranked = jnp.sort(jnp.where(scored, rewards, -jnp.inf))
    lead = jnp.where(scored.sum() > 1, ranked[-1] - ranked[-2], 0.0)
    return jnp.where(scored & (rewards == ranked[-1]), lead, 0.0)


def pass_at_k(
    rewards: Float[Array, ' G'], scored: Bool[Array, ' G'], *, pass_k: int, advantage_eps: Scalar
) -> Float[Array, ' G']:
    """Advantages for the best reward among k completions, exact over all subsets of size k.

    Pass@k training (Chen et al., arXiv 2508.10751, section 2.4): the reward of a subset is the
    largest in it, its advantage is (reward - mean) / std over all C(G, k) subsets, and a
    completion's advantage is the mean over the subsets that it is in. For rewards of 0 and 1 that
    is the paper's closed form (eq. 14 and 15); this one holds for any rewards. k = 1 is
    `group_advantages` with the population standard deviation. 0 for fewer than k rewards.

    Args:
      rewards: f32[G].
      scored: bool[G], completions that have a reward.
      pass_k: k, at most G.
      advantage_eps: added to the standard deviation.
    """
    tables = _subsets(len(rewards), pass_k)
    wins, wins_with, wins_against = (table[scored.sum()] for table in tables)
    order = jnp.argsort(jnp.where(scored, rewards, jnp.inf))  # NaN last, with those without reward
    unit = unit_of(jnp.where(scored, rewards, 0.0))
    ranked = jnp.where(scored, rewards, 0.0)[order] / unit
    mean = (wins * ranked).sum()
    std = jnp.sqrt((wins * jnp.square(ranked - mean)).sum())
    better = wins_against * ranked
    later = better.sum() - jnp.cumsum(better)
    advantages = (wins_with * ranked + later - mean) / (std + advantage_eps / unit)
    advantages = jnp.zeros_like(ranked).at[order].set(advantages)
    usable = scored & (scored.sum() >= pass_k)
    return jnp.where(usable & ~_all_equal(rewards, scored), advantages, 0.0)


ESTIMATORS: dict[str, Callable[..., Array]] = {
    'opo': opo, 'best_minus_second': best_minus_second, 'pass_at_k': pass_at_k,
}  # fmt: skip


# From an `Algorithm` to the advantages of a batch


def estimate(
    algorithm: 'Algorithm',
    rewards: Rewards,
    rollout: Rollout,
    penalty: Float[Array, 'B G T'] | None = None,
) -> Float[Array, 'B G T']:
    """Advantages f32[B, G, T] by baseline and scale, or by `Algorithm.advantage_estimator`.

    The scale 'batch' is not applied here, see `advantages.normalize_batch`. The baseline 'greedy'
    is the reward of each prompt's greedy completion (ReMax, arXiv 2310.10505, section 4.1).

    Args:
      algorithm: baseline, scale and advantage_eps, or the estimator.
      rewards: of completions, of their steps, of each function, or with the baseline 'greedy'.
        Completions without a reward (see `scored_completions`) have advantage 0.
      rollout: the completions.
      penalty: beta * KL of each token, if the KL is part of the reward. Its sum is subtracted from
        the completion's reward. Where baseline and scale are not those of the group, advantages are
        per token: r - beta * (sum of KL_i, i >= t), as in REINFORCE++ (arXiv 2501.03262).
    """
    a, mask = algorithm, rollout.policy_mask
    baseline = 'none' if a.baseline == 'greedy' else a.baseline  # it is subtracted here
    options = {'baseline': baseline, 'scale': a.scale, 'eps': a.advantage_eps}
    if isinstance(rewards, StepRewards):
        per_group = jax.vmap(lambda values, ends: process_advantages(values, ends, **options))
        return _scale_by_batch(a, per_group(*rewards), rewards.values, rewards.ends)
    if isinstance(rewards, BaselinedRewards):
        rewards = rewards.values - rewards.baseline[:, None]
    scored, of_functions = scored_completions(rewards, rollout), None
    if isinstance(rewards, FunctionRewards):
        of_functions = rewards
        rewards = total_rewards(_normalized(a, rewards))
    to_go = jnp.float32(0.0)
    if penalty is not None and baseline == 'none' and a.scale in ('none', *OF_BATCH):
        to_go = jnp.cumsum(penalty[..., ::-1], -1)[..., ::-1]
    elif penalty is not None:
        rewards = rewards - penalty.sum(-1)

    def of_group(arrays: dict[str, Array]) -> Array:
        if a.estimator_function is None:
            return group_advantages(arrays['rewards'], arrays['scored'], **options)
        constants = a.coefficients | {'pass_k': a.pass_k}
        return bind(a.estimator_function, dict.fromkeys(ARRAYS) | arrays, constants)()

    arrays = {'rewards': rewards, 'mask': mask, 'lengths': mask.sum(-1), 'scored': scored}
    if of_functions is not None:
        arrays |= {
            'function_rewards': of_functions.values, 'function_weights': of_functions.weights,
        }  # fmt: skip
    advantages = jax.vmap(of_group)(arrays)
    if advantages.ndim == 2:
        advantages = advantages[..., None]
    advantages = jnp.where(scored[..., None], advantages, 0.0)
    return _scale_by_batch(a, jnp.broadcast_to(advantages, mask.shape) - to_go, rewards, scored)


def check_group_size(algorithm: 'Algorithm', group_size: int) -> None:
    """Checks that a group has enough completions for the advantages.

    Raises:
      ValueError: it is too small.
    """
    a = algorithm
    check_group_options(group_size, baseline=a.baseline, scale=a.scale)
    if 'pass_k' in a.estimator_arguments and a.pass_k > group_size:
        raise ValueError(
            f'pass_k={a.pass_k} with group_size={group_size}: a group has no subset of that size; '
            f'use pass_k <= {group_size}'
        )


def scored_completions(rewards: Rewards, rollout: Rollout) -> Bool[Array, 'B G']:
    """Which completions have a reward: all, but those with a NaN that are not trained on.

    A NaN of a completion that is to be trained on is not hidden, and makes its group's NaN.
    """
    if rollout.kept is None or isinstance(rewards, StepRewards):
        return jnp.ones(rollout.mask.shape[:2], bool)
    return jnp.asarray(rollout.kept) | ~jnp.isnan(total_rewards(rewards))


def total_rewards(rewards: Rewards) -> Float[Array, 'B G']:
    """The reward of each completion: the sum over its steps, or the weighted sum over functions.

    A baseline is not subtracted.

    Functions that do not apply (NaN) are left out of the sum; if none applies, it is NaN.
    """
    if isinstance(rewards, StepRewards):
        return jnp.where(rewards.ends, rewards.values, 0.0).sum(-1)
    if isinstance(rewards, FunctionRewards):
        absent = jnp.isnan(rewards.values)
        parts = jnp.where(absent, 0.0, rewards.values * rewards.weights[:, None])
        return jnp.where(absent.all(-1), jnp.nan, parts.sum(-1))
    if isinstance(rewards, BaselinedRewards):
        rewards = rewards.values
    return jnp.asarray(rewards)


def _normalized(a: 'Algorithm', rewards: FunctionRewards) -> FunctionRewards:
    """GDPO (arXiv 2601.05242, eq. 4): each function's rewards, normalized within each group."""
    if a.reward_aggregation == 'sum_then_normalize':
        return rewards

    def normalize(values: Array) -> Array:
        return group_advantages(values, ~jnp.isnan(values), eps=a.advantage_eps)

    values = jax.vmap(jax.vmap(normalize, -1, -1))(rewards.values)
    return rewards._replace(values=jnp.where(jnp.isnan(rewards.values), jnp.nan, values))


def _scale_by_batch(
    a: 'Algorithm', advantages: Array, rewards: Array, counted: Array
) -> Float[Array, 'B G T']:
    """Applies the scales that need the rewards of all groups.

    'batch_std' divides by the sample standard deviation of all rewards (TRL's
    scale_rewards='batch'; Lite PPO, arXiv 2508.08221). 'informative' divides by the share of groups
    whose rewards differ (GPG, arXiv 2504.02546, eq. 6), so that it does not shrink the gradient.
    """
    if a.scale == 'batch_std':
        return advantages / (standard_deviation(rewards, counted, ddof=1) + a.advantage_eps)
    if a.scale == 'informative':
        informative = ~jax.vmap(_all_equal)(rewards, counted)
        return advantages / jnp.maximum(informative.mean(), 1 / len(informative))
    return advantages


def _all_equal(values: Array, counted: Array) -> jax.Array:
    most = jnp.where(counted, values, -jnp.inf).max()
    return most <= jnp.where(counted, values, jnp.inf).min()


def _subsets(size: int, k: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Probabilities f32[n, rank] for n = 0..G ranked completions, of which subsets have size k.

    That a rank is the best of a random subset; that it is the best of one that it is known to be
    in; and that it is the best of one that a lower rank is known to be in.
    """
    tables = np.zeros((3, size + 1, size))
    for n in range(k, size + 1):
        for rank in range(n):
            tables[0, n, rank] = math.comb(rank, k - 1) / math.comb(n, k)
            tables[1, n, rank] = math.comb(rank, k - 1) / math.comb(n - 1, k - 1)
            if k > 1 and rank:
                tables[2, n, rank] = math.comb(rank - 1, k - 2) / math.comb(n - 1, k - 1)
    wins, wins_with, wins_against = jnp.asarray(tables, jnp.float32)
    return wins, wins_with, wins_against
