"""pass@k, maj@k, rm@k and bootstrap intervals against enumeration of every subset and resample."""

import collections
import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from grpo_jax.run import statistics
from grpo_jax.run.statistics import interval, maj_at_k, pass_at_k, rm_at_k, with_intervals


def test_pass_at_k_is_the_mean_over_all_subsets():
    for samples in range(1, 7):
        for correct in range(samples + 1):
            right = [True] * correct + [False] * (samples - correct)
            for k in range(1, samples + 1):
                drawn = [any(subset) for subset in itertools.combinations(right, k)]
                assert pass_at_k(samples, correct, k) == pytest.approx(np.mean(drawn))


@pytest.mark.parametrize(
    ('answers', 'right', 'k', 'expected'),
    [
        ('abb', 'b', 3, 1),
        ('abb', 'b', 1, 2 / 3),
        ('abb', 'a', 2, 2 / 3),  # ab, ab, bb: a tie goes to the first seen
        ('abb', 'b', 2, 1 / 3),
        ('abba', 'a', 4, 1),
        ('baab', 'a', 4, 0),
        ('aabbb', 'b', 4, 2 / 5),  # aabb three times, abbb twice
        ('--a', 'a', 3, 1),  # no answer, no vote
        ('--a', 'a', 2, 2 / 3),
        ('---', '-', 3, 0),
    ],
)
def test_maj_at_k_by_hand(answers, right, k, expected):
    votes = [None if answer == '-' else ord(answer) for answer in answers]
    estimate = maj_at_k(votes, [answer == right for answer in answers], k)
    assert estimate == pytest.approx(expected)


def majority(votes, correct, k):
    """Whether the winner of every subset is right, one after another."""
    for subset in itertools.combinations(range(len(votes)), k):
        counts = collections.Counter(votes[i] for i in subset if votes[i] is not None)
        if not counts:
            yield False
            continue
        winner, _ = counts.most_common(1)[0]
        yield correct[next(i for i in subset if votes[i] == winner)]


samples = st.integers(1, 8).flatmap(
    lambda n: st.tuples(
        st.lists(st.none() | st.integers(0, 3), min_size=n, max_size=n),
        st.lists(st.booleans(), min_size=n, max_size=n),
        st.integers(1, n),
    )
)


@given(samples)
def test_maj_at_k_is_the_mean_over_all_subsets(drawn):
    votes, correct, k = drawn  # of equal votes only some may be right: the first counts
    assert maj_at_k(votes, correct, k) == pytest.approx(np.mean([*majority(votes, correct, k)]))


@settings(deadline=None, max_examples=20)
@given(st.lists(st.none() | st.integers(0, 3), min_size=13, max_size=13), st.integers(4, 9))
def test_maj_at_k_of_many_subsets_draws_some(votes, k):
    correct = [vote in (1, 2) for vote in votes]
    exact = np.mean([*majority(votes, correct, k)])
    error = 5 * np.sqrt(exact * (1 - exact) / statistics.SUBSETS) + 1e-9
    assert maj_at_k(votes, correct, k) == pytest.approx(exact, abs=error)
    assert maj_at_k(votes, correct, k) == maj_at_k(votes, correct, k)


def test_random_subsets_are_subsets_and_depend_on_the_seed():
    first, second = (statistics._subsets(40, 20, seed) for seed in (0, 1))
    assert first.shape == (statistics.SUBSETS, 20)
    assert (np.diff(first) > 0).all()  # no sample twice, in the order of the samples
    assert (first.min(), first.max()) == (0, 39)
    assert (first != second).any()


def best(scores, correct, k):
    """The share of right ones among those with the highest score, for every subset."""
    for subset in itertools.combinations(range(len(scores)), k):
        top = max(scores[i] for i in subset)
        yield np.mean([correct[i] for i in subset if scores[i] == top])


@given(samples)
def test_rm_at_k_is_the_mean_over_all_subsets(drawn):
    scores, correct, k = drawn
    scores = [-0.5 if score is None else score for score in scores]
    assert rm_at_k(scores, correct, k) == pytest.approx(np.mean([*best(scores, correct, k)]))


def test_rm_at_k_by_hand():
    assert rm_at_k([0.1, 0.9, 0.5], [False, True, False], 3) == 1
    assert rm_at_k([0.1, 0.9, 0.5], [False, True, False], 2) == pytest.approx(2 / 3)
    assert rm_at_k([2, 2, 1], [True, False, True], 3) == 0.5  # a draw by lot


@given(samples)
def test_one_sample_is_as_right_as_the_mean(drawn):
    votes, correct, _ = drawn
    mean = np.mean(correct)
    assert pass_at_k(len(correct), sum(correct), 1) == pytest.approx(mean)
    assert rm_at_k(range(len(correct)), correct, 1) == pytest.approx(mean)
    voted = [right and vote is not None for vote, right in zip(votes, correct, strict=True)]
    assert maj_at_k(votes, correct, 1) == pytest.approx(np.mean(voted))


@pytest.mark.parametrize('k', [0, 4])
def test_k_is_at_most_the_number_of_samples(k):
    three = [True, False, False]
    for name, estimate in (
        ('pass', lambda: pass_at_k(3, 1, k)),
        ('maj', lambda: maj_at_k([1, 2, 3], three, k)),
        ('rm', lambda: rm_at_k([1, 2, 3], three, k)),
    ):
        with pytest.raises(ValueError, match=rf'{name}@{k} cannot be .* 3 samples: k is 1 to 3'):
            estimate()


# Intervals

problems = st.lists(st.tuples(st.integers(-8, 8), st.integers(1, 4)), min_size=1, max_size=4).map(
    lambda pairs: np.array(pairs, float).T
)


@settings(deadline=None, max_examples=40)
@given(problems)
def test_interval_cuts_the_tails_of_the_bootstrap_distribution(drawn):
    values, weights = drawn
    n = len(values)
    means = np.array(
        [
            (weights[[*index]] @ values[[*index]]) / weights[[*index]].sum()
            for index in itertools.product(range(n), repeat=n)
        ]
    )
    low, high = interval(values, weights, level=0.8, resamples=5000)
    for tail in (means - low, high - means):  # of probability 0.1 up to the noise of the draws
        assert (tail < -1e-9).mean() < 0.1 + 0.03
        assert (tail < 1e-9).mean() > 0.1 - 0.03


def test_interval_of_many_problems_is_the_normal_one():
    values = np.arange(4000) % 4 == 0
    low, high = interval(values)
    error = 1.96 * np.sqrt(0.25 * 0.75 / 4000)
    assert (low, high) == pytest.approx((0.25 - error, 0.25 + error), abs=0.07 * error)
    narrow = interval(values, level=0.5)
    assert low < narrow[0] < narrow[1] < high
    twice = interval(np.repeat(values, 4))
    assert twice[1] - twice[0] == pytest.approx((high - low) / 2, rel=0.1)


def test_interval_of_paired_differences():
    rng = np.random.default_rng(0)
    before = rng.random(400) < 0.5
    after = before | (rng.random(400) < 0.1)  # five in a hundred are new
    low, high = interval(after.astype(float) - before)
    assert 0 < low < high < 0.1
    apart = interval(np.stack([before, after], 1))  # each of them is far less certain
    assert apart[1, 0] > apart[0, 1]


def test_columns_see_the_same_resamples():
    rng = np.random.default_rng(0)
    values, weights = rng.random((30, 3)), rng.random((30, 3))
    both = interval(values, weights)
    assert both.shape == (2, 3)
    for i in range(3):
        assert both[:, i] == pytest.approx(interval(values[:, i], weights[:, i]))
    assert interval(values, seed=1) != pytest.approx(interval(values, seed=2))


def test_interval_goes_through_its_draws_in_parts():
    low, high = interval(np.arange(300_000) % 2, resamples=50)  # three at a time
    assert 0.495 < low < 0.5 < high < 0.505


def test_interval_needs_problems():
    with pytest.raises(ValueError, match='at least one problem, and there are none'):
        interval(np.zeros(0))


def test_with_intervals():
    found = with_intervals({'a': [1.0, 0.0], 'b': [1.0, 0.0], 'c': [3, 3]}, {'b': [3, 1]})
    assert found == {
        'a': 0.5, 'a/low': 0.0, 'a/high': 1.0,
        'b': 0.75, 'b/low': 0.0, 'b/high': 1.0,
        'c': 3.0, 'c/low': 3.0, 'c/high': 3.0,
    }  # fmt: skip
    assert all(type(value) is float for value in found.values())
