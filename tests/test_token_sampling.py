"""Drawing tokens: frequencies, edge cases, and which settings are rejected."""

import jax
import numpy as np
import oracle
import pytest
import tiny
from scipy import stats

from grpo_jax.engine.token_sampling import (
    check_record,
    check_sampling,
    completion_keys,
    draw,
    without_inactive,
)
from grpo_jax.types import Sampling

drawing = jax.jit(lambda *args: draw(*args)[:2])


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
    """All tokens but one are impossible, at any place among the blocks."""
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


def test_filters_without_effect_are_left_out():
    assert without_inactive(Sampling(0.7)) == Sampling(0.7, None, None, None)
    assert without_inactive(Sampling(0.7, 5, 1.0, 0.1)) == Sampling(0.7, 5, None, 0.1)
    left_out = Sampling(0.0, None, 0.9, None)
    assert without_inactive(left_out) == left_out
    check_sampling(left_out, greedy=True)
    check_record(('support',), left_out, experts=0)
    with pytest.raises(ValueError, match="record='support' has no effect without a filter"):
        check_record(('support',), without_inactive(Sampling()), experts=0)


def keys_of(index, group_size=3):
    keys = jax.jit(completion_keys, static_argnums=3)(5, 7, np.int32(index), group_size)
    return np.asarray(jax.random.key_data(keys)).reshape(len(index), group_size, -1)


def key_by_hand(prompt, completion):
    key = jax.random.fold_in(jax.random.key(5), 7)
    return jax.random.key_data(jax.random.fold_in(jax.random.fold_in(key, prompt), completion))


def test_copies_of_a_prompt_have_keys_of_their_own():
    """The n-th copy goes on counting completions; prompts that occur once are as if alone."""
    keys = keys_of([4, 9, 4, 4, 2])
    assert len({key.tobytes() for key in keys.reshape(15, -1)}) == 15
    for place, prompt, copy in ((0, 4, 0), (1, 9, 0), (2, 4, 1), (3, 4, 2), (4, 2, 0)):
        for g in range(3):
            np.testing.assert_array_equal(keys[place, g], key_by_hand(prompt, 3 * copy + g))
    np.testing.assert_array_equal(keys_of([2, 9]), keys[[4, 1]])
