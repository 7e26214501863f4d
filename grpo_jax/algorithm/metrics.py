"""Metrics of a training step. Those that TRL reports too are defined as in TRL."""

from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
from jaxtyping import Bool, Float

from grpo_jax.algorithm import critic, losses
from grpo_jax.algorithm.preferences import margin
from grpo_jax.types import Array, Batch, Rollout, StepRewards

if TYPE_CHECKING:
    from grpo_jax.algorithm.config import Algorithm

Terms = dict[str, jax.Array]


def rollout_metrics(rollout: Rollout, rewards: Float[Array, 'B G'] | StepRewards) -> Terms:
    """Scalars about completions and rewards.

    `reward_std` is the sample standard deviation of all rewards of the step, as in TRL;
    `reward_std_in_group` is the mean over groups of the population standard deviation. Completions
    that ended by themselves are "terminated"; those cut off at T are "clipped".

    Args:
      rollout: [B, G, T] arrays.
      rewards: of completions; or of steps, which are summed to the rewards of completions.
    """
    optional = {}
    if isinstance(rewards, StepRewards):
        optional['completions/mean_steps'] = rewards.ends.sum(-1).mean()
        rewards = jnp.where(rewards.ends, rewards.values, 0.0).sum(-1)
    if rollout.kept is not None:
        optional['completions/kept_ratio'] = rollout.kept.mean()
    length, ended = rollout.mask.sum(-1), rollout.ended
    terminated = jnp.where(ended, length, 0)
    shortest = jnp.where(ended, length, rollout.mask.shape[-1]).min()
    return optional | {
        'reward': rewards.mean(),
        'reward_std': jnp.std(rewards, ddof=1) if rewards.size > 1 else jnp.float32(0),
        'reward_std_in_group': jnp.std(rewards, axis=1).mean(),
        'frac_reward_zero_std': (rewards.max(1) == rewards.min(1)).mean(),
        'num_tokens': rollout.prompts.length.sum() + length.sum(),
        'completions/mean_length': length.mean(),
        'completions/min_length': length.min(),
        'completions/max_length': length.max(),
        'completions/mean_terminated_length': terminated.sum() / jnp.maximum(ended.sum(), 1),
        'completions/min_terminated_length': jnp.where(ended.any(), shortest, 0),
        'completions/max_terminated_length': terminated.max(),
        'completions/clipped_ratio': 1 - ended.mean(),
    }


def policy_terms(
    algorithm: 'Algorithm',
    logprobs: Float[Array, 'B G T'],
    entropy: Float[Array, 'B G T'] | None,
    batch: Batch,
) -> Terms:
    """Sums and extremes over each group's tokens, [B]; `reduce_terms` makes metrics of them."""

    def of_group(logprobs: Array, entropy: Array | None, group: Batch) -> Terms:
        return _group_terms(algorithm, logprobs, entropy, group)

    return jax.vmap(of_group)(logprobs, entropy, batch)


def _group_terms(
    a: 'Algorithm', logprobs: Float[Array, 'G T'], entropy: Array | None, group: Batch
) -> Terms:
    mask = group.rollout.mask
    loss, kl = losses.policy_loss(a, logprobs, group, entropy)
    arrays = losses.arrays_of(logprobs, group, entropy)
    old = arrays['old_logprobs']
    count = mask.sum()
    mismatch = jnp.where(mask, old - group.rollout.logprobs, 0.0)
    ratio = jnp.where(mask, jnp.exp(mismatch), 1.0)
    inside = mask | (count == 0)  # a group without tokens counts as ratio 1
    terms = {
        'loss': jnp.where(mask, group.weights * loss, 0.0).sum(),
        'count': count,
        'difference_sum': jnp.abs(mismatch).sum(),
        'difference_max': jnp.abs(mismatch).max(),
        'ratio_min': jnp.where(inside, ratio, jnp.inf).min(),
        'ratio_sum': jnp.where(mask, ratio, 0.0).sum(),
        'ratio_max': jnp.where(inside, ratio, -jnp.inf).max(),
    }
    if a.has_clip_bounds:
        level = losses.sequence_level(logprobs, old, mask, a.ratio)
        for name, clipped in zip(
            ('clip_low', 'clip_high'), _clip_masks(a, level, old, group.advantages), strict=True
        ):
            terms[name] = (clipped & mask).sum()
    if kl is not None:
        terms['kl_sum'] = jnp.where(mask, kl, 0.0).sum()
    if entropy is not None:
        terms['entropy_sum'] = jnp.where(mask, entropy, 0.0).sum()
    if a.pairwise:
        assert group.ref_logprobs is not None
        scaled = a.beta * margin(logprobs, group.ref_logprobs, group.advantages, mask)
        preference = group.advantages[0, 0] != group.advantages[1, 0]
        terms |= {
            'pairs': preference.astype(jnp.float32),
            'margin': jnp.where(preference, scaled, 0.0),
            'preferred': (preference & (scaled > 0)).astype(jnp.float32),
        }
    return terms


def _clip_masks(
    a: 'Algorithm',
    logprobs: Float[Array, 'G T'],
    old_logprobs: Float[Array, 'G T'],
    advantages: Float[Array, 'G T'],
) -> tuple[Bool[Array, 'G T'], Bool[Array, 'G T']]:
    """Where the lower and where the upper clip bound takes effect.

    `losses.clipped` has no gradient there. `losses.cispo` bounds its weights regardless of the
    advantage's sign.
    """
    ratio = jnp.exp(logprobs - old_logprobs)
    low, high = ratio < 1 - a.clip_low, ratio > 1 + a.clip_high
    if a.loss == 'cispo':
        return low, high
    return low & (advantages < 0), high & (advantages > 0)


def critic_terms(algorithm: 'Algorithm', values: Float[Array, 'B G T'], batch: Batch) -> Terms:
    """Sums over each group's tokens, [B], of the critic's values and of their targets."""

    def of_group(values: Array, group: Batch) -> Terms:
        assert group.returns is not None
        mask = group.rollout.mask
        returns = jnp.where(mask, group.returns, 0.0)
        residual = jnp.where(mask, group.returns - values, 0.0)
        return {
            'critic_loss': critic.group_loss(algorithm, values, group),
            'value_sum': jnp.where(mask, values, 0.0).sum(),
            'return_sum': returns.sum(),
            'return_square': jnp.square(returns).sum(),
            'residual_sum': residual.sum(),
            'residual_square': jnp.square(residual).sum(),
        }

    return jax.vmap(of_group)(values, batch)


def reduce_terms(terms: Terms) -> Terms:
    """Metrics from terms [inner updates, B] or [inner updates]: means, minima and maxima."""
    updates = terms['loss'].shape[0]
    tokens = jnp.maximum(terms['count'].sum(), 1)
    metrics = {
        'loss': terms['loss'].sum() / updates,
        'skipped_updates': terms['skipped_updates'][-1],
        'sampling/sampling_logp_difference/mean': terms['difference_sum'].sum() / tokens,
        'sampling/sampling_logp_difference/max': terms['difference_max'].max(),
        'sampling/importance_sampling_ratio/min': terms['ratio_min'].min(),
        'sampling/importance_sampling_ratio/mean': terms['ratio_sum'].sum() / tokens,
        'sampling/importance_sampling_ratio/max': terms['ratio_max'].max(),
    }
    for name, values in terms.items():  # one value per update
        if name == 'grad_norm' or name.startswith(('trust_region/', 'critic/')):
            metrics[name] = values.mean()
    for name in ('kl', 'entropy'):
        if f'{name}_sum' in terms:
            metrics[name] = terms[f'{name}_sum'].sum() / tokens
    if 'clip_low' in terms:
        metrics |= _clip_metrics(terms['clip_low'], terms['clip_high'], terms['count'])
    if 'pairs' in terms:
        pairs = jnp.maximum(terms['pairs'].sum(), 1)
        metrics['rewards/margins'] = terms['margin'].sum() / pairs
        metrics['rewards/accuracies'] = terms['preferred'].sum() / pairs
    if 'critic_loss' in terms:
        metrics |= _critic_metrics(terms, tokens, updates)
    return metrics


def _clip_metrics(low: Array, high: Array, count: Array) -> Terms:
    """Fractions of clipped tokens [inner updates, B]: means over tokens, extremes over groups."""
    tokens, in_group = jnp.maximum(count.sum(), 1), jnp.maximum(count, 1)
    return {
        'clip_ratio/low_mean': low.sum() / tokens,
        'clip_ratio/low_min': (low / in_group).min(),
        'clip_ratio/high_mean': high.sum() / tokens,
        'clip_ratio/high_max': (high / in_group).max(),
        'clip_ratio/region_mean': (low + high).sum() / tokens,
    }


def _critic_metrics(terms: Terms, tokens: Array, updates: int) -> Terms:
    """Means over tokens; the explained variance is 1 - var(returns - values) / var(returns)."""

    def variance(name: str) -> Array:
        mean = terms[f'{name}_sum'].sum() / tokens
        return terms[f'{name}_square'].sum() / tokens - mean**2

    unexplained = variance('residual') / jnp.maximum(variance('return'), 1e-8)
    return {
        'critic/loss': terms['critic_loss'].sum() / updates,
        'critic/values_mean': terms['value_sum'].sum() / tokens,
        'critic/returns_mean': terms['return_sum'].sum() / tokens,
        'critic/explained_variance': 1 - unexplained,
    }
