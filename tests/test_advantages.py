"""Advantages of groups, steps and a critic: by hand, against the oracle, and edge cases."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from hypothesis import given
from hypothesis import strategies as st

from grpo_jax.algorithm.advantages import (
    BASELINES,
    OF_BATCH,
    SCALES,
    check_group_options,
    group_advantages,
    normalize_batch,
    process_advantages,
)
from grpo_jax.algorithm.critic import gae

advantages = jax.jit(group_advantages, static_argnames=('baseline', 'scale'))
of_steps = jax.jit(process_advantages, static_argnames=('baseline', 'scale'))
of_a_critic = jax.jit(gae)
OF_A_GROUP = ('mean', 'leave_one_out', 'none')  # baselines
REWARDS = np.float32([1, 0, 0, 1, 3])


@pytest.mark.parametrize(
    ('options', 'expected'),
    [
        ({'baseline': 'mean', 'scale': 'none'}, [0, -1, -1, 0, 2]),
        ({'baseline': 'leave_one_out', 'scale': 'none'}, [0, -1.25, -1.25, 0, 2.5]),
        ({'baseline': 'none', 'scale': 'none'}, [1, 0, 0, 1, 3]),
        # squared deviations 0 + 1 + 1 + 0 + 4 over n - 1 = 4
        ({'eps': 0.0}, np.array([0, -1, -1, 0, 2]) / np.sqrt(1.5)),
        ({'eps': 0.5}, np.array([0, -1, -1, 0, 2]) / (np.sqrt(1.5) + 0.5)),
    ],
)
def test_by_hand(options, expected):
    np.testing.assert_allclose(advantages(REWARDS, **options), expected, atol=1e-6)


def test_defaults_are_the_papers():
    np.testing.assert_allclose(
        advantages(REWARDS), np.array([0, -1, -1, 0, 2]) / (np.sqrt(1.5) + 1e-4), rtol=1e-6
    )


@pytest.mark.parametrize(('baseline', 'scale'), [*itertools.product(OF_A_GROUP, SCALES)])
@given(
    rewards=st.lists(st.floats(-4, 4, width=32), min_size=5, max_size=5).filter(
        lambda r: max(r) - min(r) > 0.1
    ),
    eps=st.floats(1e-6, 1),
)
def test_against_the_oracle(baseline, scale, rewards, eps):
    ours = advantages(np.float32(rewards), baseline=baseline, scale=scale, eps=eps)
    expected = oracle.advantages(rewards, baseline, scale, eps)
    np.testing.assert_allclose(ours, expected, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize('value', [0.0, 1.0, 0.1, -1e6 / 3])
@pytest.mark.parametrize(('baseline', 'scale'), [*itertools.product(OF_A_GROUP[:2], SCALES)])
def test_equal_rewards_give_exact_zeros(baseline, scale, value):
    """The mean of 0.1s rounds to another number: without care advantages would not be zero."""
    ours = advantages(np.full(7, value, np.float32), baseline=baseline, scale=scale, eps=0.0)
    assert (np.asarray(ours) == 0).all()


def test_equal_rewards_are_kept_without_baseline():
    ours = advantages(np.ones(3, np.float32), baseline='none', scale='none')
    np.testing.assert_array_equal(ours, [1, 1, 1])


@pytest.mark.parametrize('scale', ['none', *OF_BATCH])
def test_a_group_of_one_without_baseline(scale):
    check_group_options(1, baseline='none', scale=scale)
    if scale in ('none', 'batch'):
        check_group_options(1, baseline='critic', scale=scale)
    ours = advantages(np.float32([0.5]), baseline='none', scale=scale)
    np.testing.assert_array_equal(ours, [0.5])


HUGE = (1e30, 1e-30, 3e38, 2.0**-120)


@pytest.mark.parametrize('unit', HUGE)
@pytest.mark.parametrize('scale', ['std', 'population_std'])
@pytest.mark.parametrize('baseline', OF_A_GROUP)
def test_rewards_whose_squares_float32_cannot_hold(baseline, scale, unit):
    """Scaling rewards scales nothing: their deviation, about 1e30 or 1e-30, is divided by."""
    rewards = np.float32([1, 0, -1, 0.5]) * np.float32(unit)
    eps = 0.25 * unit
    ours = advantages(rewards, baseline=baseline, scale=scale, eps=eps)
    expected = oracle.advantages([1, 0, -1, 0.5], baseline, scale, 0.25)
    np.testing.assert_allclose(ours, expected, rtol=1e-5)


@pytest.mark.parametrize('unit', HUGE)
def test_sums_and_means_that_float32_cannot_hold(unit):
    rewards = np.float32([1, 1, 0, 1]) * np.float32(unit)  # their sum is above 3.4e38 for 3e38
    centered = np.array([0.25, 0.25, -0.75, 0.25])
    ours = np.asarray(advantages(rewards, scale='none'), np.float64)
    np.testing.assert_allclose(ours / unit, centered, rtol=1e-6)
    ours = np.asarray(advantages(rewards, baseline='leave_one_out', scale='none'), np.float64)
    np.testing.assert_allclose(ours / unit, centered * 4 / 3, rtol=1e-6)
    equal = np.full(4, unit, np.float32)
    assert (np.asarray(advantages(equal, eps=0.0)) == 0).all()


@pytest.mark.parametrize('unit', HUGE)
def test_whitening_of_values_whose_squares_float32_cannot_hold(unit):
    values = np.float32([[[1, 1], [-0.5, 0.25]]]) * np.float32(unit)
    mask = np.array([[[1, 1], [1, 0]]], bool)
    ours = normalize_batch(jnp.asarray(values), mask, eps=0.0)
    np.testing.assert_allclose(ours, [[[1, 1], [-2, 0]]] / np.sqrt(2), rtol=1e-6)


@pytest.mark.parametrize('value', [np.inf, -np.inf, np.nan])
@pytest.mark.parametrize('scale', SCALES)
def test_a_reward_that_is_not_finite_is_not_hidden(scale, value):
    ours = advantages(np.float32([1, value, 0]), scale=scale)
    assert not np.isfinite(ours).all()
    values = jnp.float32([[[1, value, 0]]])
    assert (
        not np.isfinite(normalize_batch(values, values == values, eps=0.0)).all() or value != value
    )


def test_ordinary_rewards_give_the_bits_that_they_gave_without_scaling():
    """Division by a power of two is exact; the formula is the one of a textbook, in float32."""
    rng = np.random.default_rng(0)
    for rewards in (
        rng.normal(size=(50, 8)),
        rng.choice([0, 1], (50, 8)),
        rng.integers(-99, 99, (50, 8)),
    ):
        for r in jnp.asarray(rewards, jnp.float32):
            mean = r.sum() / 8
            std = jnp.sqrt(jnp.square(r - mean).sum() / 7)
            expected = jnp.where(r.max() == r.min(), 0, (r - mean) / (std + 1e-4))
            np.testing.assert_array_equal(group_advantages(r), expected)


@pytest.mark.parametrize(('baseline', 'scale'), [*itertools.product(OF_A_GROUP, SCALES)])
def test_completions_without_a_reward_are_no_part_of_the_group(baseline, scale):
    rewards = np.float32([1, np.nan, 0.5, 3, np.nan])
    scored = np.array([1, 0, 1, 1, 0], bool)
    ours = advantages(rewards, scored, baseline=baseline, scale=scale)
    expected = np.zeros(5)
    expected[scored] = oracle.advantages([1, 0.5, 3], baseline, scale)
    np.testing.assert_allclose(ours, expected, rtol=1e-5)
    for alone in (np.arange(5) == 0, np.zeros(5, bool)):
        if baseline != 'none':
            assert (
                np.asarray(advantages(rewards, alone, baseline=baseline, scale=scale)) == 0
            ).all()


def test_normalize_batch_uses_completion_tokens_only():
    values = jnp.asarray([[[1.0, 1.0], [3.0, 99.0]], [[5.0, 5.0], [3.0, 3.0]]])
    mask = jnp.asarray([[[True, True], [True, False]], [[True, True], [True, True]]])
    ours = normalize_batch(values, mask, eps=0.0)
    spread = np.sqrt(16 / 7)
    expected = np.array([[[-2, -2], [0, 0]], [[2, 2], [0, 0]]]) / spread
    np.testing.assert_allclose(ours, expected, atol=1e-6)
    assert (normalize_batch(jnp.full((1, 2, 2), 0.1), mask[:1], eps=0.0) == 0).all()


def test_a_missing_reward_is_not_hidden():
    assert np.isnan(advantages(np.float32([1, np.nan, 0]))).all()


def test_groups_are_vmapped():
    rewards = np.random.default_rng(0).normal(size=(4, 3)).astype(np.float32)
    rows = np.stack([group_advantages(jnp.asarray(r)) for r in rewards])
    np.testing.assert_allclose(jax.vmap(group_advantages)(rewards), rows, rtol=1e-6)


@pytest.mark.parametrize(
    ('size', 'options', 'message'),
    [
        (
            4,
            {'baseline': 'median', 'scale': 'std'},
            r"baseline='median' is unknown: use one of mean, ",
        ),
        (
            4,
            {'baseline': 'mean', 'scale': 'range'},
            r"scale='range' is unknown: use one of std, population_std, batch",
        ),
        (1, {'baseline': 'mean', 'scale': 'none'}, r'group_size=1 with .*use group_size >= 2'),
        (1, {'baseline': 'leave_one_out', 'scale': 'none'}, r'group_size=1 with .*leave_one_out'),
        (1, {'baseline': 'none', 'scale': 'std'}, r"group_size=1 with .*scale='std'"),
        (4, {'baseline': 'critic', 'scale': 'std'}, r"scale='std' with .*use scale='none' or"),
        (1, {'baseline': 'critic', 'scale': 'population_std'}, r"='population_std' with .*critic"),
        (4, {'baseline': 'critic', 'scale': 'batch_std'}, r"='batch_std' with .*critic"),
    ],
)
def test_errors_name_the_thing_the_value_and_the_remedy(size, options, message):
    with pytest.raises(ValueError, match=message):
        check_group_options(size, **options)
    with pytest.raises(ValueError, match=message):
        group_advantages(jnp.ones(size), **options)


def test_a_critic_has_no_group_advantages():
    assert set(BASELINES) == {*OF_A_GROUP, 'greedy', 'critic'}
    with pytest.raises(ValueError, match=r"baseline='critic' .*use grpo_jax.gae"):
        group_advantages(jnp.ones(3), baseline='critic', scale='none')


# Two completions with the steps 1, 0 and 2: mean 1, squared deviations 0 + 1 + 1. Other values are
# arbitrary.
STEPS = np.float32([[np.nan, 1, np.inf, 0, 7], [9, 9, 2, -9, np.nan]])
ENDS = np.array([[0, 1, 0, 1, 0], [0, 0, 1, 0, 0]], bool)
CENTERED = np.array([[-1, -1, -1, -1, 0], [1, 1, 1, 0, 0]])  # 0 + -1 up to the first end, then -1


@pytest.mark.parametrize(
    ('options', 'expected'),
    [
        ({}, CENTERED / (1 + 1e-4)),  # the sample's deviation is sqrt(2 / 2)
        ({'eps': 0.5}, CENTERED / 1.5),
        ({'scale': 'population_std', 'eps': 0.0}, CENTERED / np.sqrt(2 / 3)),
        ({'scale': 'none'}, CENTERED),
        ({'scale': 'batch'}, CENTERED),
        ({'baseline': 'none', 'scale': 'none'}, [[1, 1, 0, 0, 0], [2, 2, 2, 0, 0]]),
        ({'baseline': 'none', 'eps': 1.0}, np.array([[1, 1, 0, 0, 0], [2, 2, 2, 0, 0]]) / 2),
    ],
)
def test_process_by_hand(options, expected):
    np.testing.assert_allclose(of_steps(STEPS, ENDS, **options), expected, rtol=1e-6)


def test_a_token_sums_the_steps_from_it_on():
    """Rewards 3, 1, 2 of one completion: centered 1, -1, 0, from the right 0, -1, 0."""
    ours = of_steps(np.float32([[0, 3, 1, 2]]), np.array([[0, 1, 1, 1]], bool), scale='none')
    np.testing.assert_allclose(ours, [[0, 0, -1, 0]], atol=1e-6)


@pytest.mark.parametrize(('baseline', 'scale'), [*itertools.product(('mean', 'none'), SCALES)])
@given(seed=st.integers(0, 10**6))
def test_process_against_the_oracle(baseline, scale, seed):
    rng = np.random.default_rng(seed)
    rewards = rng.normal(size=(3, 6)).astype(np.float32)
    ends = rng.random((3, 6)) < rng.choice([0.05, 0.3, 0.9])
    ours = of_steps(rewards, ends, baseline=baseline, scale=scale, eps=0.1)
    expected = oracle.process_advantages(rewards, ends, baseline, scale, 0.1)
    np.testing.assert_allclose(ours, expected, rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize(('baseline', 'scale'), [*itertools.product(('mean', 'none'), SCALES)])
@given(
    rewards=st.lists(st.floats(-4, 4, width=32, allow_subnormal=False), min_size=3, max_size=3),
    places=st.lists(st.integers(0, 4), min_size=3, max_size=3),
)
def test_a_single_step_at_the_end_is_outcome_supervision(baseline, scale, rewards, places):
    """Bit for bit when run operation by operation; a compiler may round divisions differently."""
    options = {'baseline': baseline, 'scale': scale}
    ends = np.arange(5) == np.array(places)[:, None]
    steps = np.where(ends, np.float32(rewards)[:, None], np.nan)
    inside = np.arange(5) <= np.array(places)[:, None]
    outcome = group_advantages(jnp.float32(rewards), **options)
    ours = process_advantages(jnp.asarray(steps), jnp.asarray(ends), **options)
    np.testing.assert_array_equal(ours, np.where(inside, outcome[:, None], 0))
    compiled = of_steps(steps, ends, **options)
    np.testing.assert_allclose(compiled, ours, rtol=1e-5, atol=1e-6)


def test_large_groups_with_a_single_step_are_outcome_supervision():
    """A sum over 64 rows of 100 tokens is rounded like the sum of their 64 rewards."""
    rng = np.random.default_rng(0)
    for _ in range(10):
        rewards = rng.normal(size=(64, 1)).astype(np.float32)
        ends = np.arange(100) == rng.integers(0, 100, (64, 1))
        ours = process_advantages(jnp.where(ends, rewards, jnp.nan), jnp.asarray(ends))
        np.testing.assert_array_equal(ours[:, 0], group_advantages(jnp.asarray(rewards[:, 0])))


@pytest.mark.parametrize('scale', SCALES)
def test_equal_steps_and_fewer_than_two_give_exact_zeros(scale):
    for places in ([1, 3, 6, 9, 13], [4], []):
        ends = np.isin(np.arange(14), places).reshape(2, 7)
        steps = np.where(ends, np.float32(0.1), np.nan)
        assert (of_steps(steps, ends, scale=scale, eps=0.0) == 0).all()
        with jax.debug_nans(True):  # not even in intermediate results
            process_advantages(jnp.ones((2, 7)), jnp.asarray(ends), scale=scale)


def test_a_step_without_a_reward_is_not_hidden():
    ends = np.ones((1, 3), bool)
    assert np.isnan(of_steps(np.float32([[1, np.nan, 0]]), ends)).all()


@pytest.mark.parametrize(
    ('options', 'message'),
    [
        ({'baseline': 'leave_one_out'}, "process supervision does not define it; use 'mean' or"),
        ({'baseline': 'critic'}, "baseline='critic' .* grpo_jax.gae; use 'mean' or 'none'"),
        ({'baseline': 'median'}, "baseline='median' is unknown"),
        ({'scale': 'range'}, "scale='range' is unknown"),
    ],
)
def test_errors_of_process_supervision(options, message):
    with pytest.raises(ValueError, match=message):
        process_advantages(jnp.ones((2, 3)), jnp.ones((2, 3), bool), **options)


# Three tokens and arbitrary values after them; the second completion has one token.
VALUES = np.float32([[0.5, 1, 0.25, np.nan], [2, np.nan, np.inf, 5]])
TOKEN_REWARDS = np.float32([[1, 0, 2, np.nan], [3, 4, np.nan, np.inf]])
TOKENS = np.array([[1, 1, 1, 0], [1, 0, 0, 0]], bool)


@pytest.mark.parametrize(
    ('gamma', 'lam', 'expected'),
    [
        # errors 1 + 0.5 * 1 - 0.5 = 1, 0 + 0.5 * 0.25 - 1 = -0.875, 2 - 0.25 = 1.75;
        # then -0.875 + 0.25 * 1.75 = -0.4375 and 1 + 0.25 * -0.4375 = 0.890625
        (0.5, 0.5, [[0.890625, -0.4375, 1.75, 0], [1, 0, 0, 0]]),
        (0.5, 0.0, [[1, -0.875, 1.75, 0], [1, 0, 0, 0]]),  # the temporal difference
        # the return minus the value: 1 + 0.25 * 2 - 0.5, 0.5 * 2 - 1, 2 - 0.25
        (0.5, 1.0, [[1, 0, 1.75, 0], [1, 0, 0, 0]]),
        (1.0, 1.0, [[2.5, 1, 1.75, 0], [1, 0, 0, 0]]),
        (0.0, 1.0, [[0.5, -1, 1.75, 0], [1, 0, 0, 0]]),
    ],
)
def test_gae_by_hand(gamma, lam, expected):
    ours = of_a_critic(TOKEN_REWARDS, VALUES, TOKENS, gamma=gamma, lam=lam)
    np.testing.assert_allclose(ours, expected, atol=1e-6)


@given(seed=st.integers(0, 10**6), gamma=st.floats(0, 1), lam=st.floats(0, 1))
def test_gae_against_the_oracle(seed, gamma, lam):
    rng = np.random.default_rng(seed)
    rewards, values = rng.normal(size=(2, 3, 6)).astype(np.float32)
    mask = np.arange(6) < rng.integers(0, 7, 3)[:, None]
    ours = of_a_critic(rewards, values, mask, gamma=gamma, lam=lam)
    np.testing.assert_allclose(ours, oracle.gae(rewards, values, mask, gamma, lam), atol=1e-5)
