"""Metrics by hand, with TRL's definitions under TRL's names."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from grpo_jax.algorithm.config import Algorithm
from grpo_jax.algorithm.metrics import policy_terms, reduce_terms, rollout_metrics
from grpo_jax.types import Batch, FunctionRewards, Prompts, Rollout, StepRewards

PROMPTS = Prompts(np.zeros((2, 4), np.int32), np.array([4, 2], np.int32), np.arange(2))
ENDED = np.array([[True, True], [False, True]])
MASK = np.arange(5) < np.array([[2, 4], [5, 1]])[..., None]
ROLLOUT = Rollout(PROMPTS, np.zeros((2, 2, 5), np.int32), MASK, np.zeros((2, 2, 5)), ENDED)
REWARDS = jnp.array([[1.0, 0.0], [0.5, 0.5]])
NONE = np.nan

of_rollout = jax.jit(rollout_metrics)


def values(metrics, expected):
    return {name: float(metrics[name]) for name in expected}


# Completions and rewards


def test_rollout_metrics_by_hand():
    expected = {
        'reward': 0.5,
        'reward_std': (0.5 / 3) ** 0.5,  # of all four, as a sample
        'reward_std_in_group': 0.25,  # of [1, 0] it is 0.5, of [0.5, 0.5] nothing
        'frac_reward_zero_std': 0.5,
        'step_tokens': 4 + 2 + 2 + 4 + 5 + 1,
        'completions/mean_length': 3,
        'completions/min_length': 1,
        'completions/max_length': 5,
        'completions/mean_terminated_length': 7 / 3,
        'completions/min_terminated_length': 1,
        'completions/max_terminated_length': 4,
        'completions/clipped_ratio': 0.25,
    }
    assert values(of_rollout(ROLLOUT, REWARDS), expected) == pytest.approx(expected)

    none = of_rollout(ROLLOUT._replace(ended=np.zeros((2, 2), bool)), REWARDS)
    for name in ('mean', 'min', 'max'):
        assert none[f'completions/{name}_terminated_length'] == 0
    assert none['completions/clipped_ratio'] == 1


def test_lengths_of_completions_that_are_not_trained():
    """They count, as in TRL with mask_truncated_completions."""
    dropped = of_rollout(ROLLOUT._replace(kept=ENDED), REWARDS)
    whole = of_rollout(ROLLOUT, REWARDS)
    assert dropped.pop('completions/kept_ratio') == 0.75
    assert dropped == whole


@pytest.mark.parametrize(
    ('rewards', 'expected'),
    [
        # nanmean and nanstd of 1, 2, 2; the first group has nothing to compare
        ([[1, NONE], [2, 2]], (5 / 3, (1 / 3) ** 0.5, 0.0, 0.5)),
        ([[1, NONE], [NONE, NONE]], (1, 0, 0, 0)),
        ([[NONE, NONE], [NONE, NONE]], (0, 0, 0, 0)),
    ],
)
def test_completions_without_a_reward(rewards, expected):
    rewards = np.float32(rewards)
    metrics = of_rollout(ROLLOUT._replace(kept=~np.isnan(rewards)), rewards)
    names = ('reward', 'reward_std', 'reward_std_in_group', 'frac_reward_zero_std')
    assert [float(metrics[name]) for name in names] == pytest.approx(expected)
    assert np.isnan(of_rollout(ROLLOUT, rewards)['reward'])  # a NaN that is trained on


def test_rewards_of_functions_and_of_steps_are_summed():
    functions = FunctionRewards(
        np.float32([[[1, 2], [NONE, 2]], [[1, NONE], [0, 1]]]), np.float32([[1, 0.5]] * 2)
    )
    assert float(of_rollout(ROLLOUT, functions)['reward']) == (2 + 1 + 1 + 0.5) / 4
    ends = MASK & (np.arange(5) == 0)
    metrics = of_rollout(ROLLOUT, StepRewards(np.where(ends, np.float32(2), NONE), ends))
    assert (metrics['reward'], metrics['completions/mean_steps']) == (2, 1)


@pytest.mark.parametrize('unit', [1e30, 3e38, 2.0**-120])
def test_rewards_whose_squares_float32_cannot_hold(unit):
    rewards = jnp.float32([[1, 1], [0, 1]]) * unit
    metrics = of_rollout(ROLLOUT, rewards)
    for name, expected in (('reward', 0.75), ('reward_std', 0.5), ('reward_std_in_group', 0.25)):
        assert float(metrics[name]) / unit == pytest.approx(expected)


# The update

T = 4
# Log ratios to the old policy and to the sampler; the last completion of group 1 has no token that
# is trained. Ratios are exp(0.5) = 1.65, exp(-0.5) = 0.61 and 1.
LOG_RATIO = 0.5 * np.float32([
    [[1, -1, 0, 9], [1, 1, 9, 9]],
    [[-1, -1, -1, -1], [9, 9, 9, 9]],
])  # fmt: skip
LENGTHS = np.array([[3, 2], [4, 3]])
TOKENS = np.arange(T) < LENGTHS[..., None]
KEPT = np.array([[True, True], [True, False]])
ADVANTAGES = np.float32([[1, -1], [-1, 1]])[..., None] * np.ones(T, np.float32)
COUNT = 3 + 2 + 4


def metrics_of(algorithm, log_ratios=(LOG_RATIO,), kept=KEPT, sampler=0.0, entropy=None):
    """The metrics of inner updates, whose log-probs are `log_ratio` above the old ones."""
    old = np.full(TOKENS.shape, -1, np.float32)
    rollout = Rollout(PROMPTS, np.zeros(TOKENS.shape, np.int32), TOKENS, old - sampler, ENDED, kept)
    weights = np.where(TOKENS, np.float32(0.1), 0)
    batch = Batch(rollout, ADVANTAGES, weights, ref_logprobs=old - 1, old_logprobs=old)
    batch = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32) if x.dtype == float else x, batch)
    terms = [policy_terms(algorithm, old + x, entropy, batch) for x in log_ratios]
    stacked = {name: jnp.stack([term[name] for term in terms]) for name in terms[0]}
    return reduce_terms(stacked | {'skipped_updates': jnp.zeros(len(terms), int)})


def test_clip_ratios_are_shares_of_tokens_and_extremes_of_completions():
    """High: the first token of the first completion. Low: all four of the third."""
    expected = {
        'clip_ratio/high_mean': 1 / COUNT,
        'clip_ratio/low_mean': 4 / COUNT,
        'clip_ratio/region_mean': 5 / COUNT,
        'clip_ratio/high_max': 1 / 3,
        'clip_ratio/low_min': 0,
    }
    assert values(metrics_of(Algorithm()), expected) == pytest.approx(expected)


def test_the_smallest_share_is_that_of_a_completion_with_tokens():
    low = np.full_like(LOG_RATIO, -0.5)
    everywhere = np.array([[False, True], [True, False]])  # the bad ones, all clipped
    metrics = metrics_of(Algorithm(), (low,), kept=everywhere)
    assert (metrics['clip_ratio/low_min'], metrics['clip_ratio/low_mean']) == (1, 1)
    nothing = metrics_of(Algorithm(), (low,), kept=np.zeros((2, 2), bool))
    for name in ('low_min', 'low_mean', 'high_max', 'high_mean', 'region_mean'):
        assert nothing[f'clip_ratio/{name}'] == 0
    for name in ('min', 'mean', 'max'):
        assert nothing[f'sampling/importance_sampling_ratio/{name}'] == 0


def test_clip_ratios_of_sequences_are_shares_of_completions():
    """Mean log ratios 0, 0.5, -0.5: only the third has a clipped ratio; the fourth counts, too."""
    metrics = metrics_of(Algorithm(ratio='sequence'))
    expected = {
        'clip_ratio/high_mean': 0,
        'clip_ratio/low_mean': 1 / 4,
        'clip_ratio/region_mean': 1 / 4,
        'clip_ratio/high_max': 0,
        'clip_ratio/low_min': 0,
    }
    assert values(metrics, expected) == pytest.approx(expected)


def test_inner_updates_are_averaged():
    metrics = metrics_of(Algorithm(inner_updates=2), (np.zeros_like(LOG_RATIO), LOG_RATIO))
    expected = {
        'clip_ratio/high_mean': 1 / COUNT / 2,
        'clip_ratio/low_mean': 4 / COUNT / 2,
        'clip_ratio/high_max': 1 / 3 / 2,
    }
    assert values(metrics, expected) == pytest.approx(expected)


def test_cispo_reports_its_upper_bound_where_the_advantage_is_positive():
    algorithm = Algorithm(loss='cispo', clip_low=1.0, clip_high=0.2)
    metrics = metrics_of(algorithm)
    assert float(metrics['cispo_clip_ratio']) == pytest.approx(1 / COUNT)
    assert not any(name.startswith('clip_ratio') for name in metrics)


def test_kl_and_entropy_are_means_over_the_tokens_that_are_trained():
    entropy = np.where(TOKENS, np.arange(T, dtype=np.float32), 99) + np.zeros_like(LOG_RATIO)
    metrics = metrics_of(Algorithm(beta=0.1, entropy=True), entropy=jnp.asarray(entropy))
    # 0 + 1 + 2, 0 + 1, 0 + 1 + 2 + 3 of the three completions that are trained
    assert float(metrics['entropy']) == pytest.approx(10 / COUNT)
    gaps = -1 - LOG_RATIO[TOKENS & KEPT[..., None]].astype(float)  # log(ref / pi)
    assert float(metrics['kl']) == pytest.approx((np.exp(gaps) - gaps - 1).mean(), rel=1e-5)


SAMPLER = np.log(np.float32([
    [[2, 0.5, 1, 50], [4, 1, 50, 50]],
    [[0.25, 1, 1, 1], [50, 50, 50, 50]],
]))  # fmt: skip


@pytest.mark.parametrize(
    ('options', 'expected'),
    [
        ({'importance': 'none'}, (0.25, 11.75 / COUNT, 4)),
        ({'importance': 'token', 'importance_cap': 3.0}, (0.25, 10.75 / COUNT, 3)),
        # 0.25 and 4 are outside of [1/2, 2]
        ({'importance': 'token_mask', 'importance_cap': 2.0}, (0, 7.5 / COUNT, 2)),
        ({'importance': 'token_upper_mask', 'importance_cap': 2.0}, (0, 7.75 / COUNT, 2)),
        # of the completions: products 1, 4, 0.25, and 1 for the one that is not trained
        ({'importance': 'sequence', 'importance_cap': 3.0}, (0.25, 5.25 / 4, 3)),
        ({'importance': 'sequence_mask', 'importance_cap': 3.0}, (0, 2 / 4, 1)),
        ({'importance': 'sequence_upper_mask', 'importance_cap': 3.0}, (0, 2.25 / 4, 1)),
    ],
)
def test_weights_of_the_sampler(options, expected):
    """As they are applied: bounded or masked, of tokens or of completions."""
    metrics = metrics_of(Algorithm(**options), sampler=SAMPLER)
    names = ('min', 'mean', 'max')
    ours = [float(metrics[f'sampling/importance_sampling_ratio/{name}']) for name in names]
    assert ours == pytest.approx(expected, rel=1e-5)
    difference = np.abs(SAMPLER[TOKENS & KEPT[..., None]])
    assert float(metrics['sampling/sampling_logp_difference/max']) == pytest.approx(np.log(4))
    mean = float(metrics['sampling/sampling_logp_difference/mean'])
    assert mean == pytest.approx(difference.mean(), rel=1e-5)
