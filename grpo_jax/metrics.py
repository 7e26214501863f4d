"""The update program's metrics, under the names that TRL's users look for."""

import jax
import jax.numpy as jnp

from grpo_jax.preferences import margin
from grpo_jax.types import Batch, Objective, Rollout, StepRewards


def rollout_metrics(rollout: Rollout, rewards: jax.Array | StepRewards) -> dict[str, jax.Array]:
    """Scalars about completions and rewards under TRL's metric names.

    Terminated completions are those that ended by themselves; the others are counted as clipped.

    Args:
      rollout: [B, G, T] arrays.
      rewards: f32[B, G], or those of the steps, which are then added up.
    """
    steps = {}
    if isinstance(rewards, StepRewards):
        steps['completions/mean_steps'] = rewards.ends.sum(-1).mean()
        rewards = jnp.where(rewards.ends, rewards.values, 0.0).sum(-1)
    if rollout.kept is not None:
        steps['completions/kept_ratio'] = rollout.kept.mean()
    length, ended = rollout.mask.sum(-1), rollout.ended
    terminated = jnp.where(ended, length, 0)
    shortest = jnp.where(ended, length, rollout.mask.shape[-1]).min()
    return steps | {
        'reward': rewards.mean(),
        'reward_std': jnp.std(rewards, axis=1).mean(),
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


def group_terms(group: Batch, clipped, kl, entropy) -> dict[str, jax.Array]:
    """Sums and extremes over one group's tokens, from which `reduce_terms` makes the metrics.

    clipped: the two masks of `losses.clip_masks`, or None; kl and entropy f32[G, T], or None.
    """
    mask = group.rollout.mask
    count = mask.sum()
    mismatch = jnp.where(mask, group.old_logprobs - group.rollout.logprobs, 0.0)
    ratio = jnp.where(mask, jnp.exp(mismatch), 1.0)
    inside = mask | (count == 0)  # a group without tokens counts as ratio 1
    terms = {
        'count': count,
        'difference_sum': jnp.abs(mismatch).sum(),
        'difference_max': jnp.abs(mismatch).max(),
        'ratio_min': jnp.where(inside, ratio, jnp.inf).min(),
        'ratio_sum': jnp.where(mask, ratio, 0.0).sum(),
        'ratio_max': jnp.where(inside, ratio, -jnp.inf).max(),
    }
    if clipped is not None:
        for name, cut in zip(('clip_low', 'clip_high'), clipped, strict=True):
            terms[name] = (cut & mask).sum() / jnp.maximum(count, 1)
    if kl is not None:
        terms['kl_sum'] = jnp.where(mask, kl, 0.0).sum()
    if entropy is not None:
        terms['entropy_sum'] = jnp.where(mask, entropy, 0.0).sum()
    return terms


def pair_terms(logprobs, group: Batch, objective: Objective) -> dict[str, jax.Array]:
    """What TRL reports of a preference loss: beta * margin, and whether it is above 0.

    A pair without a preference counts for neither.
    """
    scaled = objective.beta * margin(logprobs, group)
    told = group.advantages[0, 0] != group.advantages[1, 0]
    return {
        'pairs': told.astype(jnp.float32),
        'margin': jnp.where(told, scaled, 0.0),
        'preferred': (told & (scaled > 0)).astype(jnp.float32),
    }


def critic_terms(values, group: Batch) -> dict[str, jax.Array]:
    """Sums over one group's tokens of values f32[G, T] and of what they should have been."""
    mask = group.rollout.mask
    returns = jnp.where(mask, group.returns, 0.0)
    residual = jnp.where(mask, group.returns - values, 0.0)
    return {
        'value_sum': jnp.where(mask, values, 0.0).sum(),
        'return_sum': returns.sum(),
        'return_square': jnp.square(returns).sum(),
        'residual_sum': residual.sum(),
        'residual_square': jnp.square(residual).sum(),
    }


def reduce_terms(terms: dict[str, jax.Array]) -> dict[str, jax.Array]:
    """Metrics from terms [inner updates, B]: means over tokens, groups or updates."""
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
    for name, values in terms.items():  # those of a whole update
        if name == 'grad_norm' or name.startswith(('trust_region/', 'critic/')):
            metrics[name] = values.mean()
    for name in ('kl', 'entropy'):
        if f'{name}_sum' in terms:
            metrics[name] = terms[f'{name}_sum'].sum() / tokens
    if 'clip_low' in terms:
        metrics |= _clip_metrics(terms['clip_low'], terms['clip_high'])
    if 'pairs' in terms:
        pairs = jnp.maximum(terms['pairs'].sum(), 1)
        metrics['rewards/margins'] = terms['margin'].sum() / pairs
        metrics['rewards/accuracies'] = terms['preferred'].sum() / pairs
    if 'critic_loss' in terms:
        metrics |= _critic_metrics(terms, tokens, updates)
    return metrics


def _clip_metrics(low: jax.Array, high: jax.Array) -> dict[str, jax.Array]:
    return {
        'clip_ratio/low_mean': low.mean(),
        'clip_ratio/low_min': low.min(),
        'clip_ratio/high_mean': high.mean(),
        'clip_ratio/high_max': high.max(),
        'clip_ratio/region_mean': (low + high).mean(),
    }


def _critic_metrics(terms, tokens, updates: int) -> dict[str, jax.Array]:
    """Among them the share of the returns' variance that the values explain: 1 is perfect."""

    def variance(name: str) -> jax.Array:
        mean = terms[f'{name}_sum'].sum() / tokens
        return terms[f'{name}_square'].sum() / tokens - mean**2

    unexplained = variance('residual') / jnp.maximum(variance('return'), 1e-8)
    return {
        'critic/loss': terms['critic_loss'].sum() / updates,
        'critic/values_mean': terms['value_sum'].sum() / tokens,
        'critic/returns_mean': terms['return_sum'].sum() / tokens,
        'critic/explained_variance': 1 - unexplained,
    }
