"""The update program's metrics, under the names that TRL's users look for."""

import jax
import jax.numpy as jnp

from grpo_jax import losses
from grpo_jax.losses import Objective
from grpo_jax.types import Batch, Rollout


def rollout_metrics(rollout: Rollout, rewards: jax.Array) -> dict[str, jax.Array]:
    """Scalars about completions and rewards under TRL's metric names.

    Terminated completions are those that ended by themselves; the others are counted as clipped.

    Args:
      rollout: [B, G, T] arrays.
      rewards: f32[B, G].
    """
    length, ended = rollout.mask.sum(-1), rollout.ended
    terminated = jnp.where(ended, length, 0)
    shortest = jnp.where(ended, length, rollout.mask.shape[-1]).min()
    return {
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


def group_terms(logprobs, group: Batch, objective: Objective, kl, entropy) -> dict[str, jax.Array]:
    """Sums and extremes over one group's tokens, from which `reduce_terms` makes the metrics."""
    mask = group.rollout.mask
    count = mask.sum()
    low, high = losses.clip_masks(logprobs, group, objective)
    mismatch = jnp.where(mask, group.old_logprobs - group.rollout.logprobs, 0.0)
    ratio = jnp.where(mask, jnp.exp(mismatch), 1.0)
    inside = mask | (count == 0)  # a group without tokens counts as ratio 1
    terms = {
        'count': count,
        'clip_low': (low & mask).sum() / jnp.maximum(count, 1),
        'clip_high': (high & mask).sum() / jnp.maximum(count, 1),
        'difference_sum': jnp.abs(mismatch).sum(),
        'difference_max': jnp.abs(mismatch).max(),
        'ratio_min': jnp.where(inside, ratio, jnp.inf).min(),
        'ratio_sum': jnp.where(mask, ratio, 0.0).sum(),
        'ratio_max': jnp.where(inside, ratio, -jnp.inf).max(),
    }
    if kl is not None:
        terms['kl_sum'] = jnp.where(mask, kl, 0.0).sum()
    if entropy is not None:
        terms['entropy_sum'] = jnp.where(mask, entropy, 0.0).sum()
    return terms


def reduce_terms(terms: dict[str, jax.Array]) -> dict[str, jax.Array]:
    """Metrics from terms [inner updates, microbatches, m]: means over tokens, groups or updates."""
    per_update = terms['loss'].shape[0]
    tokens = jnp.maximum(terms['count'].sum(), 1)
    low, high = terms['clip_low'], terms['clip_high']
    metrics = {
        'loss': terms['loss'].sum() / per_update,
        'grad_norm': terms['grad_norm'].mean(),
        'skipped_updates': terms['skipped_updates'][-1],
        'clip_ratio/low_mean': low.mean(),
        'clip_ratio/low_min': low.min(),
        'clip_ratio/high_mean': high.mean(),
        'clip_ratio/high_max': high.max(),
        'clip_ratio/region_mean': (low + high).mean(),
        'sampling/sampling_logp_difference/mean': terms['difference_sum'].sum() / tokens,
        'sampling/sampling_logp_difference/max': terms['difference_max'].max(),
        'sampling/importance_sampling_ratio/min': terms['ratio_min'].min(),
        'sampling/importance_sampling_ratio/mean': terms['ratio_sum'].sum() / tokens,
        'sampling/importance_sampling_ratio/max': terms['ratio_max'].max(),
    }
    for name in ('kl', 'entropy'):
        if f'{name}_sum' in terms:
            metrics[name] = terms[f'{name}_sum'].sum() / tokens
    return metrics
