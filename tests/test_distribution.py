"""The distribution that is drawn from: filters, draws, and which settings are refused."""

import jax
import numpy as np
import oracle
import pytest
import tiny
from scipy import stats

from grpo_jax.distribution import check_sampling, draw, filter_logits, filter_with_peak
from grpo_jax.types import Sampling

filters = jax.jit(filter_logits)
drawing = jax.jit(draw)


@pytest.mark.parametrize('name', tiny.FILTERS)
def test_filters_equal_the_oracle(name):
    """The order matters: top-p cuts what top-k left, renormalised."""
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
def test_positions_are_filtered_alone(positions):
    logits = np.random.default_rng(0).standard_normal((2, 3, positions, 9)).astype(np.float32)
    sampling = Sampling(top_k=6, top_p=0.8)
    rows = [filters(row, sampling) for row in logits.reshape(-1, 9)]
    np.testing.assert_array_equal(filters(logits, sampling).reshape(-1, 9), rows)


@pytest.mark.parametrize('sampling', [Sampling(), Sampling(min_p=0.1), Sampling(top_k=2)])
def test_no_filter_hides_a_nan(sampling):
    """Not even that of a token which nobody has drawn."""
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


@pytest.mark.parametrize('name', tiny.FILTERS)
def test_draws_follow_the_distribution(name):
    """Chi-square over 20,000 draws from one row of logits, at tokens of both blocks."""
    logits = np.random.default_rng(1).standard_normal(tiny.VOCAB).astype(np.float32)
    logits[[5, 65]] += 3  # one in each block
    count = 20_000
    keys = jax.random.split(jax.random.key(0), count)
    rows = np.broadcast_to(logits, (count, tiny.VOCAB))
    tokens, logprobs = drawing(keys, rows, tiny.FILTERS[name])
    expected = oracle.distribution(logits, *tiny.FILTERS[name])
    observed = np.bincount(tokens, minlength=tiny.VOCAB)
    assert (observed[expected == 0] == 0).all()
    inside = expected > 0
    if inside.sum() > 1:
        p = stats.chisquare(observed[inside], count * expected[inside]).pvalue
        assert p > 1e-3
    np.testing.assert_allclose(logprobs, np.log(expected[np.asarray(tokens)]), atol=1e-5)


@pytest.mark.parametrize('size', [1, 63, 64, 65, 129])
def test_draws_at_the_edges_of_the_vocabulary(size):
    """All tokens impossible but one, wherever it stands among the blocks."""
    places = sorted({0, size // 2, size - 1})
    logits = np.full((len(places), size), -np.inf, np.float32)
    logits[range(len(places)), places] = -3.0
    keys = jax.random.split(jax.random.key(0), len(places))
    tokens, logprobs = drawing(keys, logits, Sampling())
    assert tokens.tolist() == places
    np.testing.assert_allclose(logprobs, 0, atol=1e-6)


def test_draws_survive_extreme_logits():
    logits = np.float32([[1e4, 0, -1e4], [-1e4, -1e4, -1e4], [1e30, 0, 0]])
    keys = jax.random.split(jax.random.key(0), 3)
    tokens, logprobs = drawing(keys, logits, Sampling())
    assert tokens[0] == tokens[2] == 0
    np.testing.assert_allclose(logprobs, [0, np.log(1 / 3), 0], atol=1e-5)


def test_temperature_zero_takes_the_largest():
    logits = np.random.default_rng(0).standard_normal((500, tiny.VOCAB)).astype(np.float32)
    keys = jax.random.split(jax.random.key(0), len(logits))
    tokens, logprobs = drawing(keys, logits, Sampling(temperature=0.0))
    np.testing.assert_array_equal(tokens, logits.argmax(-1))
    np.testing.assert_allclose(logprobs, jax.nn.log_softmax(logits).max(-1), atol=1e-5)


@pytest.mark.parametrize(
    ('options', 'message'),
    [
        ({'temperature': 0.0}, r'sampling temperature=0.0: make it above 0'),
        ({'temperature': -1.0}, r'sampling temperature=-1.0: make it above 0'),
        ({'top_k': -1}, r'sampling top_k=-1: make it at least 0'),
        ({'top_p': 0.0}, r'sampling top_p=0.0: make it above 0'),
        ({'top_p': 1.5}, r'sampling top_p=1.5: make it above 0 and at most 1'),
        ({'min_p': -0.1}, r'sampling min_p=-0.1: make it at least 0'),
        ({'min_p': 1.0}, r'sampling min_p=1.0: make it at least 0 and below 1'),
    ],
)
def test_bad_sampling(options, message):
    with pytest.raises(ValueError, match=message):
        check_sampling(Sampling(**options))


def test_good_sampling():
    for sampling in tiny.FILTERS.values():
        check_sampling(sampling)
    check_sampling(Sampling(temperature=0.0), greedy=True)
    with pytest.raises(ValueError, match=r'temperature=-1.0: make it at least 0$'):
        check_sampling(Sampling(temperature=-1.0), greedy=True)
