"""Importance weights, ratios and the off-policy mask, by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from grpo_jax.algorithm import off_policy
from grpo_jax.algorithm.config import Algorithm

# Two completions, of three and of one token; what is outside of the mask counts for nothing.
MASK = jnp.array([[True, True, True], [True, False, False]])
OLD = jnp.log(jnp.float32([[0.8, 0.1, 0.3], [0.6, 0.9, 0.9]]))
SAMPLED = jnp.log(jnp.float32([[0.2, 0.4, 0.3], [0.1, 0.01, 0.01]]))
# w = 4, 1/4, 1 with product 1, and 6


@pytest.mark.parametrize(
    ('kind', 'expected'),
    [
        ('token', [[3.0, 0.25, 1.0], [3.0]]),
        ('sequence', [[1.0, 1.0, 1.0], [3.0]]),
        ('token_mask', [[0.0, 0.0, 1.0], [0.0]]),
        ('sequence_mask', [[1.0, 1.0, 1.0], [0.0]]),
        ('token_upper_mask', [[0.0, 0.25, 1.0], [0.0]]),
        ('sequence_upper_mask', [[1.0, 1.0, 1.0], [0.0]]),
    ],
)
def test_importance_weights_by_hand(kind, expected):
    ours = off_policy.importance_weights(OLD, SAMPLED, MASK, kind=kind, cap=3.0)
    np.testing.assert_allclose(ours[0], expected[0], rtol=1e-5)
    np.testing.assert_allclose(ours[1, 0], expected[1][0], rtol=1e-5)


def test_every_kind_of_weights_is_tested():
    assert len(off_policy.IMPORTANCES) == 7


def test_weights_have_no_gradient():
    for kind in off_policy.IMPORTANCES[1:]:
        gradient = jax.grad(
            lambda x, kind=kind: off_policy.importance_weights(
                x, SAMPLED, MASK, kind=kind, cap=3.0
            ).sum()
        )(OLD)
        assert not np.asarray(gradient).any()


@pytest.mark.parametrize(
    ('advantage', 'threshold', 'expected'),
    [
        (-1.0, 0.4, False),  # mean log(sampled / pi) of the first is log(8) / 3 = 0.693
        (-1.0, 0.7, True),
        (-1e-9, 0.4, False),
        (0.0, 0.4, True),
        (1.0, 0.4, True),  # a good completion always counts
    ],
)
def test_off_policy_mask_by_hand(advantage, threshold, expected):
    logprobs = SAMPLED - jnp.log(jnp.float32([[4.0, 1.0, 2.0], [1.0, 1e-9, 1e9]]))
    advantages = jnp.full(MASK.shape, advantage, jnp.float32)
    ours = off_policy.off_policy_mask(logprobs, SAMPLED, advantages, MASK, threshold=threshold)
    assert np.asarray(ours[0] == expected).all()
    assert np.asarray(ours[1]).all()  # of divergence 0


def test_a_policy_that_likes_a_bad_completion_more_is_not_masked():
    """The divergence has a sign: only what the policy has moved away from is left out."""
    advantages = -jnp.ones(MASK.shape)
    ours = off_policy.off_policy_mask(SAMPLED + 5, SAMPLED, advantages, MASK, threshold=0.1)
    assert np.asarray(ours).all()


def test_completions_without_tokens():
    """Of mean 0, so neither masked nor a NaN."""
    values, mask = jnp.full((1, 3), jnp.nan), jnp.zeros((1, 3), bool)
    np.testing.assert_array_equal(off_policy.mean_of_completion(values, mask), [[0.0]])


@pytest.mark.parametrize(
    ('options', 'tokenwise'),
    [
        ({}, True),
        ({'importance': 'token_upper_mask'}, True),
        ({'unbiased_kl': True, 'beta': 0.1}, True),
        ({'covariance': 'clip'}, True),
        ({'importance': 'sequence_upper_mask'}, False),
        ({'ratio': 'sequence'}, False),
        ({'off_policy_threshold': 0.5}, False),
        ({'loss': 'vespo'}, False),
        ({'loss': 'gmpo'}, False),
        ({'loss': lambda logprobs: logprobs}, False),
    ],
)
def test_what_needs_whole_completions(options, tokenwise):
    assert Algorithm(**options).tokenwise == tokenwise
