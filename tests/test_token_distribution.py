"""The distribution that tokens are drawn from: temperature and filters."""

import jax
import numpy as np
import oracle
import pytest
import tiny

from grpo_jax.engine.token_distribution import filter_logits, filter_with_peak
from grpo_jax.types import Sampling

filters = jax.jit(filter_logits)


@pytest.mark.parametrize('name', tiny.FILTERS)
def test_filters_equal_the_oracle(name):
    """The order matters: top-p applies to the renormalized distribution that top-k leaves."""
    logits = 2 * np.random.default_rng(0).standard_normal((6, tiny.VOCAB)).astype(np.float32)
    ours = jax.nn.softmax(filters(logits, tiny.FILTERS[name]))
    expected = np.stack([oracle.distribution(row, *tiny.FILTERS[name]) for row in logits])
    np.testing.assert_array_equal(np.asarray(ours) > 0, expected > 0)
    np.testing.assert_allclose(ours, expected, atol=1e-6)


def test_filters_by_hand():
    logits = np.log(np.float32([0.5, 0.25, 0.125, 0.125]))

    def kept(**options):
        return (np.asarray(filters(logits, Sampling(**options))) > -np.inf).tolist()

    assert kept(top_k=2) == [True, True, False, False]
    assert kept(top_k=3) == [True, True, True, True]  # the fourth is tied with the third
    assert kept(top_p=0.45) == [True, False, False, False]
    assert kept(top_p=0.6) == [True, True, False, False]
    assert kept(top_k=2, top_p=0.7) == [True, True, False, False]  # 0.5 of 0.75 is below 0.7
    assert kept(top_k=2, top_p=0.6) == [True, False, False, False]  # and above 0.6
    assert kept(min_p=0.4) == [True, True, False, False]
    assert kept(temperature=0.5, min_p=0.4) == [True, False, False, False]  # squared: a quarter


@pytest.mark.parametrize('positions', [1, 7, 12, 64])  # in 1, 1, 4 and 32 pieces
def test_positions_are_filtered_independently(positions):
    logits = np.random.default_rng(0).standard_normal((2, 3, positions, 9)).astype(np.float32)
    sampling = Sampling(top_k=6, top_p=0.8)
    rows = [filters(row, sampling) for row in logits.reshape(-1, 9)]
    np.testing.assert_array_equal(filters(logits, sampling).reshape(-1, 9), rows)


@pytest.mark.parametrize('sampling', [Sampling(), Sampling(min_p=0.1), Sampling(top_k=2)])
def test_no_filter_hides_a_nan(sampling):
    """Not even that of a token that was not drawn."""
    logits = np.float32([[0.0, 2.0, np.nan, 1.0]])
    assert np.isnan(filter_logits(logits, sampling)).any()
    assert np.isnan(filter_logits(logits, sampling, keep=np.array([1]))).any()


@pytest.mark.parametrize('name', tiny.FILTERS)
def test_the_largest_logit_is_known_before_the_filters(name):
    logits = np.random.default_rng(0).standard_normal((2, 3, tiny.VOCAB)).astype(np.float32)
    filtered, peak = jax.jit(filter_with_peak)(logits, tiny.FILTERS[name])
    np.testing.assert_array_equal(peak, filtered.max(-1))


def test_a_kept_token_joins_the_support():
    logits = np.random.default_rng(0).standard_normal((5, tiny.VOCAB)).astype(np.float32)
    token = np.argmin(logits, axis=-1)
    ours = jax.nn.softmax(filters(logits, Sampling(top_k=3), keep=token))
    expected = [
        oracle.distribution(row, top_k=3, keep=i) for row, i in zip(logits, token, strict=True)
    ]
    np.testing.assert_allclose(ours, np.stack(expected), atol=1e-6)
