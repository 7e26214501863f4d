"""Group advantages by hand, against the oracle, and what must not happen."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from hypothesis import given
from hypothesis import strategies as st

from grpo_jax.advantages import (
    BASELINES,
    SCALES,
    check_group_options,
    group_advantages,
    normalize_batch,
)

advantages = jax.jit(group_advantages, static_argnames=('baseline', 'scale'))
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


@pytest.mark.parametrize(('baseline', 'scale'), [*itertools.product(BASELINES, SCALES)])
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
@pytest.mark.parametrize(('baseline', 'scale'), [*itertools.product(BASELINES[:2], SCALES)])
def test_equal_rewards_give_exact_zeros(baseline, scale, value):
    """0.1 has a mean that rounds to another number: without care the group would push somewhere."""
    ours = advantages(np.full(7, value, np.float32), baseline=baseline, scale=scale, eps=0.0)
    assert (np.asarray(ours) == 0).all()


def test_equal_rewards_are_kept_where_the_group_is_no_baseline():
    ours = advantages(np.ones(3, np.float32), baseline='none', scale='none')
    np.testing.assert_array_equal(ours, [1, 1, 1])


@pytest.mark.parametrize('scale', ['none', 'batch'])
def test_a_group_of_one_without_baseline(scale):
    ours = advantages(np.float32([0.5]), baseline='none', scale=scale)
    np.testing.assert_array_equal(ours, [0.5])


def test_normalize_batch_looks_at_completion_tokens_only():
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
    ],
)
def test_errors_name_the_thing_the_value_and_the_remedy(size, options, message):
    with pytest.raises(ValueError, match=message):
        check_group_options(size, **options)
    with pytest.raises(ValueError, match=message):
        group_advantages(jnp.ones(size), **options)
