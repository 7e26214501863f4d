"""Advantages of whole batches: estimators by name, scales of the batch, rewards of functions."""

import functools

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
import tiny
from hypothesis import given

from grpo_jax.algorithm.advantages import group_advantages, process_advantages
from grpo_jax.algorithm.checks import check_inputs
from grpo_jax.algorithm.config import Algorithm
from grpo_jax.algorithm.estimators import (
    ESTIMATORS,
    best_minus_second,
    check_group_size,
    estimate,
    opo,
    pass_at_k,
    scored_completions,
    total_rewards,
)
from grpo_jax.algorithm.moments import standard_deviation, unit_of
from grpo_jax.types import BaselinedRewards, FunctionRewards, StepRewards, TrainState

ROLLOUT = tiny.make_rollout()  # [4, 3, 5]
MASK, LENGTHS = ROLLOUT.mask, ROLLOUT.mask.sum(-1)
REWARDS = np.float32([[1, 0, 0.5], [0.2, 0.2, 0.2], [3, -1, 1], [0, 0, 1]])
ALL = np.ones(4, bool)
NONE = np.nan

of_batch = jax.jit(estimate)
of_pass_at_k = functools.partial(jax.jit, static_argnames='pass_k')(pass_at_k)


def advantages(rewards, rollout=ROLLOUT, penalty=None, **options):
    """[B, G], of a batch in which the tokens of a completion have the same."""
    ours = np.asarray(of_batch(Algorithm(**options), rewards, rollout, penalty))
    assert ours.shape == MASK.shape
    assert (ours == ours[..., :1]).all()
    return ours[..., 0]


# Estimators by name


def test_opo_by_hand():
    """Lengths 1, 2 and 5: the baseline is (1 + 0 + 5 * 0.5) / 8."""
    ours = opo(jnp.float32([1, 0, 0.5]), jnp.int32([1, 2, 5]), ALL[:3])
    np.testing.assert_allclose(ours, [0.5625, -0.4375, 0.0625], rtol=1e-6)
    equal = opo(jnp.float32([0.1] * 3), jnp.int32([1, 2, 4]), ALL[:3])
    assert (np.asarray(equal) == 0).all()


def test_opo_with_equal_lengths_is_the_mean_as_baseline():
    ours = advantages(REWARDS, ROLLOUT._replace(mask=np.ones_like(MASK)), advantage_estimator='opo')
    np.testing.assert_allclose(ours, REWARDS - REWARDS.mean(1, keepdims=True), atol=1e-6)


@given(
    rewards=st.lists(st.floats(-4, 4, width=32), min_size=5, max_size=5),
    lengths=st.lists(st.integers(1, 9), min_size=5, max_size=5),
)
def test_opo_has_no_mean_weighted_by_length(rewards, lengths):
    ours = opo(jnp.float32(rewards), jnp.int32(lengths), jnp.ones(5, bool))
    np.testing.assert_allclose(ours, oracle.opo(rewards, lengths), atol=1e-5)
    assert abs(float((ours * np.array(lengths)).sum())) < 1e-4


@pytest.mark.parametrize(
    ('rewards', 'expected'),
    [([1, 3, 2], [0, 1, 0]), ([3, 3, 2], [0, 0, 0]), ([-5, -7, -9], [2, 0, 0]), ([1, 1], [0, 0])],
)
def test_best_minus_second_by_hand(rewards, expected):
    ours = best_minus_second(jnp.float32(rewards), jnp.ones(len(rewards), bool))
    np.testing.assert_array_equal(ours, expected)
    assert oracle.best_minus_second(rewards) == expected


def test_pass_at_k_is_the_papers_for_right_and_wrong():
    """Of 5 completions 2 are right, k = 3: a subset is wrong with probability 1/10.

    Equations 14 and 15: sigma = sqrt(0.9 * 0.1) = 0.3, a right one has (1 - 0.9) / 0.3, a wrong one
    (1 - 0.9 - C(2, 2) / C(4, 2)) / 0.3.
    """
    rewards, everyone = jnp.float32([1, 0, 0, 1, 0]), jnp.ones(5, bool)
    ours = of_pass_at_k(rewards, everyone, pass_k=3, advantage_eps=0.0)
    right, wrong = 0.1 / 0.3, (0.1 - 1 / 6) / 0.3
    np.testing.assert_allclose(ours, [right, wrong, wrong, right, wrong], rtol=1e-5)


@given(
    rewards=st.lists(st.floats(-4, 4, width=16), min_size=5, max_size=5),
    k=st.integers(1, 5),
    eps=st.floats(1e-3, 1),
)
def test_pass_at_k_over_all_subsets(rewards, k, eps):
    ours = of_pass_at_k(jnp.float32(rewards), jnp.ones(5, bool), pass_k=k, advantage_eps=eps)
    np.testing.assert_allclose(ours, oracle.pass_at_k(rewards, k, eps), atol=2e-3)


def test_pass_at_1_is_group_relative():
    ours = advantages(REWARDS, advantage_estimator='pass_at_k', pass_k=1)
    np.testing.assert_allclose(ours, advantages(REWARDS, scale='population_std'), atol=1e-5)


@pytest.mark.parametrize('name', ESTIMATORS)
@pytest.mark.parametrize('unit', [1e30, 2.0**-120])
def test_rewards_whose_squares_float32_cannot_hold(name, unit):
    """The estimators, at the scale of the rewards."""
    options = {'advantage_estimator': name}
    ours, relative = advantages(REWARDS * np.float32(unit), **options), unit
    usual = advantages(REWARDS, **options)
    if name == 'pass_at_k':
        options = {'pass_k': 2, 'advantage_eps': 0.0, **options}
        ours, usual = (
            advantages(REWARDS * np.float32(unit), **options),
            advantages(REWARDS, **options),
        )
        relative = 1
    np.testing.assert_allclose(ours.astype(float) / relative, usual, rtol=1e-5, atol=1e-6)
    assert np.abs(usual).max() > 0.1


@pytest.mark.parametrize('name', ESTIMATORS)
def test_completions_without_a_reward_are_no_part_of_the_group(name):
    """[1, None, 0.5] is estimated like [1, 0.5]; one that is to be trained is not hidden."""
    k = {'pass_k': 2} if name == 'pass_at_k' else {}
    rewards = np.where([[0, 1, 0]] * 4, NONE, REWARDS).astype(np.float32)
    kept = ~np.isnan(rewards)
    ours = advantages(rewards, ROLLOUT._replace(kept=kept), advantage_estimator=name, **k)
    expected = {
        'opo': lambda b: oracle.opo(REWARDS[b, ::2], LENGTHS[b, ::2]),
        'best_minus_second': lambda b: oracle.best_minus_second(REWARDS[b, ::2]),
        'pass_at_k': lambda b: oracle.pass_at_k(REWARDS[b, ::2], 2, 1e-4),
    }[name]
    np.testing.assert_allclose(ours[:, ::2], [expected(b) for b in range(4)], atol=1e-5)
    assert (ours[:, 1] == 0).all()
    hidden = of_batch(Algorithm(advantage_estimator=name, **k), rewards, ROLLOUT)
    assert name == 'best_minus_second' or np.isnan(hidden).any()


def test_fewer_rewards_than_k_teach_nothing():
    rewards = np.float32([[1, NONE, 0.5]] * 4)
    rollout = ROLLOUT._replace(kept=~np.isnan(rewards))
    ours = advantages(rewards, rollout, advantage_estimator='pass_at_k', pass_k=3)
    assert (ours == 0).all()


def test_a_group_smaller_than_k():
    algorithm = Algorithm(advantage_estimator='pass_at_k', pass_k=4)
    check_group_size(algorithm, 4)
    with pytest.raises(ValueError, match=r'pass_k=4 with group_size=3: .* use pass_k <= 3'):
        check_group_size(algorithm, 3)


# Your own


def test_an_estimator_gets_the_arrays_and_coefficients_that_it_names():
    functions = FunctionRewards(np.stack([REWARDS, 2 * REWARDS], -1), np.float32([[1, 0.5]] * 4))

    def mine(rewards, mask, lengths, scored, function_rewards, function_weights, advantage_eps):
        assert rewards.shape == lengths.shape == scored.shape == (3,)
        assert function_rewards.shape == (3, 2)
        assert function_weights.shape == (2,)
        per_token = jnp.where(mask, (rewards / lengths)[:, None], 0.0)
        return per_token + function_rewards[:, 1:] * function_weights[1] + advantage_eps

    algorithm = Algorithm(advantage_estimator=mine, advantage_eps=0.25)
    assert algorithm.uses_function_rewards
    ours = of_batch(algorithm, functions, ROLLOUT)
    expected = np.where(MASK, (2 * REWARDS / LENGTHS)[..., None], 0) + REWARDS[..., None] + 0.25
    np.testing.assert_allclose(ours, expected, rtol=1e-6)


def test_an_estimator_that_names_what_there_is_not():
    def needs_functions(function_rewards):
        return function_rewards.sum(-1)

    with pytest.raises(ValueError, match=r"'function_rewards', which is absent from this update"):
        estimate(Algorithm(advantage_estimator=needs_functions), REWARDS, ROLLOUT)
    with pytest.raises(ValueError, match=r"advantage_estimator='opa' is unknown: use one of opo, "):
        Algorithm(advantage_estimator='opa')


def test_a_coefficient_of_an_estimator_is_no_option_without_effect():
    """It was refused, as if baseline and scale alone had coefficients."""

    def shifted(rewards, *, gamma):
        return rewards - gamma

    assert Algorithm(advantage_estimator=shifted, gamma=0.5).gamma == 0.5
    with pytest.raises(ValueError, match=r'^lam=0.5 has no effect'):
        Algorithm(advantage_estimator=shifted, lam=0.5)


# Scales of the batch


def test_batch_std_by_hand():
    """TRL's scale_rewards='batch': the deviation of all rewards, as a sample."""
    ours = advantages(REWARDS, scale='batch_std', advantage_eps=0.25)
    expected = (REWARDS - REWARDS.mean(1, keepdims=True)) / (REWARDS.std(ddof=1) + 0.25)
    np.testing.assert_allclose(ours, expected, rtol=1e-5, atol=1e-7)


def test_batch_std_of_steps():
    ends = MASK & (np.arange(5) % 2 == 0)
    values = np.random.default_rng(0).normal(size=MASK.shape).astype(np.float32)
    algorithm = Algorithm(scale='batch_std', supervision='process', advantage_eps=0.25)
    ours = of_batch(algorithm, StepRewards(np.where(ends, values, NONE), ends), ROLLOUT)
    std = values[ends].astype(float).std(ddof=1)
    for b in range(4):
        expected = oracle.process_advantages(values[b], ends[b], 'mean', 'none') / (std + 0.25)
        np.testing.assert_allclose(ours[b], expected, atol=1e-5)


def test_informative_by_hand():
    """Three of four groups have differences."""
    ours = advantages(REWARDS, scale='informative')
    np.testing.assert_allclose(ours, (REWARDS - REWARDS.mean(1, keepdims=True)) * 4 / 3, atol=1e-6)
    assert (advantages(np.ones_like(REWARDS), scale='informative') == 0).all()


@pytest.mark.parametrize('scale', ['batch_std', 'informative'])
def test_scales_of_the_batch_without_some_rewards(scale):
    rewards = np.where([[0, 1, 0]] * 4, NONE, REWARDS).astype(np.float32)
    ours = advantages(rewards, ROLLOUT._replace(kept=~np.isnan(rewards)), scale=scale)
    two = REWARDS[:, ::2]
    unit = two.std(ddof=1) + 1e-4 if scale == 'batch_std' else 3 / 4
    np.testing.assert_allclose(ours[:, ::2], (two - two.mean(1, keepdims=True)) / unit, rtol=1e-4)
    assert (ours[:, 1] == 0).all()


def test_a_kl_in_the_reward_is_part_of_the_deviation():
    penalty = np.random.default_rng(0).uniform(0, 1, MASK.shape).astype(np.float32) * MASK
    ours = advantages(REWARDS, penalty=penalty, scale='batch_std')
    np.testing.assert_allclose(
        ours, advantages(REWARDS - penalty.sum(-1), scale='batch_std'), rtol=1e-5
    )


# The reward of a greedy completion as baseline


GREEDY = np.float32([1, 0.2, -1, NONE])
REMAX = {'baseline': 'greedy', 'scale': 'none'}


def test_greedy_baseline_by_hand():
    """ReMax: r - r of the greedy completion, also where all of a group are alike."""
    rewards = BaselinedRewards(np.float32([[1, 0, 0.5], [1, 1, 1], [0, 0, 0], [2, 2, 2]]),
                               np.float32([1, 0, 0, 4]))  # fmt: skip
    ours = advantages(rewards, **REMAX)
    np.testing.assert_array_equal(ours, [[0, -1, -0.5], [1, 1, 1], [0, 0, 0], [-2, -2, -2]])
    np.testing.assert_array_equal(total_rewards(rewards), rewards.values)


@given(seed=st.integers(0, 10**6), whiten=st.booleans())
def test_greedy_baseline_against_float64(seed, whiten):
    """A group whose greedy completion has no reward is not trained; KL in the reward from t on."""
    rng = np.random.default_rng(seed)
    values, baseline = rng.normal(size=(4, 3)), rng.normal(size=4)
    kept = np.repeat(np.arange(4) != 3, 3).reshape(4, 3)
    rewards = BaselinedRewards(
        np.where(kept, values, NONE).astype(np.float32), np.where(kept[:, 0], baseline, NONE)
    )
    penalty = (rng.uniform(0, 1, MASK.shape) * MASK).astype(np.float32)
    options = REMAX | ({'scale': 'batch'} if whiten else {})
    rollout = ROLLOUT._replace(kept=kept)
    ours = of_batch(Algorithm(**options), jax.tree.map(np.float32, rewards), rollout, penalty)
    expected = [
        [[values[b, g] - baseline[b] - penalty[b, g, t:].sum() for t in range(5)] for g in range(3)]
        for b in range(3)
    ]
    np.testing.assert_allclose(ours[:3], expected, atol=1e-5)
    np.testing.assert_allclose(ours[3], -penalty[3, :, ::-1].cumsum(-1)[:, ::-1], atol=1e-5)


def test_a_missing_baseline_of_a_trained_group_is_not_hidden():
    ours = of_batch(Algorithm(**REMAX), BaselinedRewards(REWARDS, GREEDY), ROLLOUT)
    assert np.isnan(ours[3]).all()
    assert np.isfinite(ours[:3]).all()


@pytest.mark.parametrize(
    ('options', 'message'),
    [
        ({'scale': 'std'}, r"^scale='std' with baseline='greedy', .*: use scale='none' or 'batch'"),
        ({'supervision': 'process'}, r"^baseline='greedy' with supervision='process' is not def"),
        (
            {'reward_aggregation': 'normalize_then_sum'},
            r"^reward_aggregation='normalize_then_sum' with baseline='greedy', which is the sum",
        ),
        ({'advantage_estimator': 'opo'}, r"^baseline='greedy' has no effect with an advantage_est"),
        (
            {'loss': 'dpo', 'kl': 'none', 'beta': 0.1, 'scale': 'none'},
            r"^baseline='greedy' with l",
        ),
    ],
)
def test_what_a_greedy_baseline_does_not_go_with(options, message):
    with pytest.raises(ValueError, match=message):
        Algorithm(**REMAX | options)


def test_a_group_of_one_with_a_greedy_baseline():
    check_group_size(Algorithm(**REMAX), 1)
    with pytest.raises(ValueError, match=r"baseline='greedy' is not one of the rewards: subtract"):
        group_advantages(jnp.ones(1), **REMAX)
    steps = jnp.ones((1, 2)), jnp.ones((1, 2), bool)
    with pytest.raises(ValueError, match=r"'greedy' .*process supervision does not define it; use"):
        process_advantages(*steps, **REMAX)


# Rewards of functions


def functions(seed, missing):
    rng = np.random.default_rng(seed)
    values = rng.choice([0, 0.5, 1, 3], (4, 3, 2)).astype(np.float32)
    values[rng.random(values.shape) < missing] = NONE
    return FunctionRewards(values, np.float32([[1, 0.25]] * 4))


@given(seed=st.integers(0, 10**6), missing=st.sampled_from([0, 0.2, 0.6]))
def test_gdpo_against_the_oracle(seed, missing):
    """TRL's multi_objective_aggregation='normalize_then_sum', None included."""
    rewards = functions(seed, missing)
    scored = ~np.isnan(rewards.values).all(-1)
    if scored.sum() < 2:
        return
    ours = advantages(
        rewards, ROLLOUT._replace(kept=scored),
        reward_aggregation='normalize_then_sum', scale='batch_std',
    )  # fmt: skip
    np.testing.assert_allclose(ours, oracle.gdpo(*rewards), atol=2e-4)


def test_gdpo_gives_the_rare_reward_its_weight():
    """By hand: a function worth 100 and one worth 1 count the same, where the sum hears one."""
    values = np.float32([[[100, 0], [0, 1], [100, 1]]] * 4)
    rewards = FunctionRewards(values, np.ones((4, 2), np.float32))
    options = {'reward_aggregation': 'normalize_then_sum', 'scale': 'none'}
    ours = advantages(rewards, **options)
    third = 1 / np.sqrt(3)  # (1 - 2/3) / std, and std = 1 / sqrt(3)
    np.testing.assert_allclose(ours, [[-third, -third, 2 * third]] * 4, rtol=1e-3)
    total = advantages(total_rewards(rewards), scale='std')
    assert abs(total[0, 1] / total[0, 2]) > 1.9


def test_sums_of_functions():
    rewards = FunctionRewards(
        np.float32([[[1, 2], [NONE, 2], [1, NONE], [NONE, NONE]]]), np.float32([[1, 0.5]])
    )
    np.testing.assert_array_equal(total_rewards(rewards), [[2, 1, 1, NONE]])
    steps = StepRewards(np.float32([[[1, 5, 2]]]), np.array([[[1, 0, 1]]], bool))
    np.testing.assert_array_equal(total_rewards(steps), [[3]])


def test_only_what_is_not_trained_may_have_no_reward():
    rewards = np.where([[0, 1, 0]] * 4, NONE, REWARDS).astype(np.float32)
    assert scored_completions(rewards, ROLLOUT).all()
    kept = np.array([[True, False, False]] * 4)
    scored = scored_completions(rewards, ROLLOUT._replace(kept=kept))
    np.testing.assert_array_equal(scored, [[True, False, True]] * 4)


@pytest.mark.parametrize(
    ('options', 'message'),
    [
        (
            {'baseline': 'critic', 'scale': 'none'},
            r"='normalize_then_sum' has no effect with .*cri",
        ),
        ({'supervision': 'process'}, r"='normalize_then_sum' has no effect with .*'process'"),
        (
            {'loss': 'dpo', 'scale': 'none', 'kl': 'none', 'beta': 1.0},
            r"='normalize_then_sum' with loss='dpo'",
        ),
    ],
)
def test_aggregations_without_effect(options, message):
    with pytest.raises(ValueError, match=r'^reward_aggregation' + message):
        Algorithm(reward_aggregation='normalize_then_sum', **options)


# Moments


@pytest.mark.parametrize('unit', [1.0, 1e30, 3e38, 2.0**-120])
def test_standard_deviation_by_hand(unit):
    values = jnp.float32([1, -1, 0.5, 9]) * unit
    counted = jnp.array([True, True, True, False])
    ours = [float(standard_deviation(values, counted, ddof=d)) / unit for d in (0, 1)]
    np.testing.assert_allclose(ours, [np.std([1, -1, 0.5], ddof=d) for d in (0, 1)], rtol=1e-6)


def test_standard_deviation_of_few():
    values = jnp.float32([0.1] * 7)
    assert float(standard_deviation(values)) == 0
    assert float(standard_deviation(values, jnp.arange(7) < 1, ddof=1)) == 0
    assert float(standard_deviation(values, jnp.zeros(7, bool))) == 0


@given(value=st.floats(2.0**-126, 2.0**127, width=32))
def test_units_are_powers_of_two_near_the_largest_value(value):
    unit = float(unit_of(jnp.float32([value, -value / 2])))
    assert np.frexp(unit)[0] == 0.5
    assert 1 <= value / unit < 4


# Checks of a training step


@pytest.mark.parametrize(
    ('options', 'rewards', 'message'),
    [
        (
            {},
            FunctionRewards(np.zeros((4, 3, 2)), np.zeros((4, 2))),
            r'their sum is needed; pass one',
        ),
        (
            {'reward_aggregation': 'normalize_then_sum'},
            REWARDS,
            r"='normalize_then_sum' .*: rewards of each function are needed; pass FunctionRewards",
        ),
        (
            {'reward_aggregation': 'normalize_then_sum'},
            FunctionRewards(np.zeros((4, 2, 2)), np.zeros((4, 2))),
            r'rewards have shape \(4, 2\): the rollout needs .* \[B, G\] = \(4, 3\)',
        ),
        ({'advantage_estimator': 'pass_at_k', 'pass_k': 4}, REWARDS, r'pass_k=4 with group_size=3'),
        (REMAX, REWARDS, r"^baseline='greedy' without the reward .*: pass BaselinedRewards$"),
        (
            REMAX,
            FunctionRewards(np.zeros((4, 3, 2)), np.zeros((4, 2))),
            r"^baseline='greedy' without the reward .*: pass BaselinedRewards$",
        ),
        (
            {},
            BaselinedRewards(REWARDS, GREEDY),
            r"^the baseline of BaselinedRewards has no effect with baseline='mean': pass their val",
        ),
        (
            {'supervision': 'process'},
            BaselinedRewards(REWARDS, GREEDY),
            r"^the baseline of BaselinedRewards has no effect with baseline='mean'",
        ),
        (
            REMAX,
            BaselinedRewards(REWARDS[:, :2], GREEDY),
            r'rewards have shape \(4, 2\): the rollout needs',
        ),
        (
            REMAX,
            BaselinedRewards(REWARDS, GREEDY[:1]),
            r'the baseline has shape \(1,\): the rollout needs one for each prompt, \[B\] = \(4,\)',
        ),
    ],
)
def test_rewards_that_do_not_fit_the_algorithm(options, rewards, message):
    state = TrainState(jnp.int32(0), None, None, jnp.int32(0))
    with pytest.raises(ValueError, match=message):
        check_inputs(Algorithm(**options), state, None, ROLLOUT, rewards, tiny.Bigram())
