"""Metrics of a training step. Those that TRL reports too are defined as in TRL."""

import functools
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from jaxtyping import Bool, Float

from grpo_jax.algorithm import critic, losses, off_policy
from grpo_jax.algorithm.estimators import scored_completions, total_rewards
from grpo_jax.algorithm.moments import standard_deviation, unit_of
from grpo_jax.algorithm.preferences import margin
from grpo_jax.types import Array, Batch, Rewards, Rollout, StepRewards

if TYPE_CHECKING:
    from grpo_jax.algorithm.config import Algorithm

Terms = dict[str, jax.Array]


def rollout_metrics(rollout: Rollout, rewards: Rewards) -> Terms:
    """Scalars about completions and rewards.

    `reward_std` is the sample standard deviation of all rewards of the step, as in TRL;
    `reward_std_in_group` is the mean over groups of the population standard deviation. Completions
    without a reward count in neither; a group is one of zero deviation if it has at least two equal
    rewards. Completions that ended by themselves are "terminated"; those cut off at T "clipped".
    Lengths are those of the policy's tokens; `step_tokens` has an environment's too.

    Args:
      rollout: [B, G, T] arrays.
      rewards: of completions; those of steps and of functions are summed first.
    """
    optional = {}
    if isinstance(rewards, StepRewards):
        optional['completions/mean_steps'] = rewards.ends.sum(-1).mean()
    if rollout.kept is not None:
        optional['completions/kept_ratio'] = rollout.kept.mean()
    scored, total = scored_completions(rewards, rollout), total_rewards(rewards)
    total = jnp.where(scored, total, 0.0)
    unit = unit_of(total)
    in_group = jax.vmap(standard_deviation)(total, scored)
    comparable = scored.sum(-1) > 1
    length, ended = rollout.policy_mask.sum(-1), rollout.ended
    tokens = length if rollout.trained is None else rollout.mask.sum(-1)
    terminated = jnp.where(ended, length, 0)
    shortest = jnp.where(ended, length, rollout.mask.shape[-1]).min()
    return optional | {
        'reward': (total / unit).sum() / jnp.maximum(scored.sum(), 1) * unit,
        'reward_std': standard_deviation(total, scored, ddof=1),
        'reward_std_in_group': in_group.mean(),
        'frac_reward_zero_std': (comparable & (in_group == 0)).mean(),
        'step_tokens': rollout.prompts.length.sum() + tokens.sum(),
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
    return jax.vmap(functools.partial(_group_terms, algorithm))(logprobs, entropy, batch)


def _group_terms(
    a: 'Algorithm', logprobs: Float[Array, 'G T'], entropy: Array | None, group: Batch
) -> Terms:
    mask, kept = group.rollout.policy_mask, group.rollout.kept
    trained = mask if kept is None else mask & kept[:, None]
    loss, kl = losses.policy_loss(a, logprobs, group, entropy)
    arrays = losses.arrays_of(a, logprobs, group, entropy)
    old = arrays['old_logprobs']
    mismatch = jnp.abs(jnp.where(trained, old - group.rollout.logprobs, 0.0))
    terms = {
        'loss': jnp.where(mask, group.weights * loss, 0.0).sum(),
        'count': trained.sum(),
        'difference_sum': mismatch.sum(),
        'difference_max': mismatch.max(),
    }
    terms |= _sampler_terms(a, arrays, trained)
    if a.has_clip_bounds:
        level = off_policy.sequence_level(logprobs, old, mask, a.ratio)
        terms |= _clip_terms(a, level - old, group.advantages, trained)
    if a.masks_off_policy:
        counts = off_policy.off_policy_mask(
            logprobs, arrays['sampled_logprobs'], group.advantages, mask,
            threshold=a.off_policy_threshold,
        )  # fmt: skip
        terms['masked'] = (trained & ~counts).sum()
    if kl is not None:
        terms['kl_sum'] = jnp.where(trained, kl, 0.0).sum()
    if entropy is not None:
        terms['entropy_sum'] = jnp.where(trained, entropy, 0.0).sum()
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


def _sampler_terms(a: 'Algorithm', arrays: dict[str, Any], trained: Bool[Array, 'G T']) -> Terms:
    """The weights by which the sampler is corrected for: of tokens, or of whole completions.

    Without a correction the ratios of tokens. A completion that is not trained has weight 1.
    """
    weights = arrays['importance_weights']
    if weights is None:
        weights = jnp.exp(arrays['old_logprobs'] - arrays['sampled_logprobs'])
    counted = trained
    if a.importance.startswith('sequence'):
        weights = jnp.where(trained.any(-1), weights[:, 0], 1.0)
        counted = jnp.ones_like(weights, bool)
    return {
        'ratio_count': counted.sum(),
        'ratio_min': jnp.where(counted, weights, jnp.inf).min(),
        'ratio_sum': jnp.where(counted, weights, 0.0).sum(),
        'ratio_max': jnp.where(counted, weights, -jnp.inf).max(),
    }


def _clip_terms(
    a: 'Algorithm',
    log_ratio: Float[Array, 'G T'],
    advantages: Float[Array, 'G T'],
    trained: Bool[Array, 'G T'],
) -> Terms:
    """Where the bounds take effect: counts, and the extreme shares of a completion's tokens.

    If a completion has one ratio, it counts once. `losses.cispo` bounds its weights regardless of
    the advantage's sign, and only its upper bound is reported where the advantage is positive.
    """
    ratio = jnp.exp(log_ratio)
    low = trained & (ratio < 1 - a.clip_low) & (advantages < 0)
    high = trained & (ratio > 1 + a.clip_high) & (advantages > 0)
    counted = trained
    if a.ratio == 'sequence':
        low, high = (clipped.any(-1, keepdims=True) for clipped in (low, high))
        counted = jnp.ones_like(low)
    terms = {'clip_count': counted.sum(), 'clip_high': high.sum()}
    if a.loss == 'cispo':
        return terms
    length, some = jnp.maximum(counted.sum(-1), 1), counted.any(-1)
    return terms | {
        'clip_low': low.sum(),
        'clip_low_min': jnp.where(some, low.sum(-1) / length, jnp.inf).min(),
        'clip_high_max': (high.sum(-1) / length).max(),
    }


def critic_terms(algorithm: 'Algorithm', values: Float[Array, 'B G T'], batch: Batch) -> Terms:
    """Sums over each group's tokens, [B], of the critic's values and of their targets."""

    def of_group(values: Array, group: Batch) -> Terms:
        assert group.returns is not None
        mask = group.rollout.policy_mask
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
    }
    ratios = terms['ratio_count'].sum()  # without any token: 0, as in TRL
    for name, value in (
        ('min', terms['ratio_min'].min()),
        ('mean', terms['ratio_sum'].sum() / jnp.maximum(ratios, 1)),
        ('max', terms['ratio_max'].max()),
    ):
        metrics[f'sampling/importance_sampling_ratio/{name}'] = jnp.where(ratios > 0, value, 0.0)
    for name, values in terms.items():  # one value per update
        if name in ('grad_norm', 'aux_loss') or name.startswith(('trust_region/', 'critic/')):
            metrics[name] = values.mean()
    for name in ('kl', 'entropy'):
        if f'{name}_sum' in terms:
            metrics[name] = terms[f'{name}_sum'].sum() / tokens
    if 'masked' in terms:
        metrics['sampling/off_policy_masked_ratio'] = terms['masked'].sum() / tokens
    if 'clip_count' in terms:
        metrics |= _clip_metrics(terms)
    if 'pairs' in terms:
        pairs = jnp.maximum(terms['pairs'].sum(), 1)
        metrics['rewards/margins'] = terms['margin'].sum() / pairs
        metrics['rewards/accuracies'] = terms['preferred'].sum() / pairs
    if 'critic_loss' in terms:
        metrics |= _critic_metrics(terms, tokens, updates)
    return metrics


def _clip_metrics(terms: Terms) -> Terms:
    """Shares of what is clipped, from terms [inner updates, B].

    Means over tokens (or completions, if they have one ratio). Extremes over completions, of which
    the inner updates are averaged.
    """
    count = jnp.maximum(terms['clip_count'].sum(), 1)
    high = terms['clip_high'].sum() / count
    if 'clip_low' not in terms:
        return {'cispo_clip_ratio': high}
    low, least = terms['clip_low'].sum() / count, terms['clip_low_min'].min(-1)
    return {
        'clip_ratio/low_mean': low,
        'clip_ratio/low_min': jnp.where(jnp.isinf(least), 0.0, least).mean(),
        'clip_ratio/high_mean': high,
        'clip_ratio/high_max': terms['clip_high_max'].max(-1).mean(),
        'clip_ratio/region_mean': low + high,
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
