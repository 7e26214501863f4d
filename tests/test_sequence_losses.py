"""VESPO and GMPO by hand; tests/test_variants.py has their oracles."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from grpo_jax.algorithm.sequence_losses import gmpo, vespo

PAPER = {
    'vespo_k_positive': 2.0,
    'vespo_lambda_positive': 3.0,
    'vespo_k_negative': 3.0,
    'vespo_lambda_negative': 2.0,
}
OLD = jnp.log(jnp.float32([[0.5, 0.2, 0.7]]))
MASK = jnp.array([[True, True, False]])


def group(ratios, advantage):
    logprobs = OLD + jnp.log(jnp.float32([ratios]))
    return logprobs, OLD, jnp.full(OLD.shape, advantage, jnp.float32), MASK


@pytest.mark.parametrize(
    ('ratios', 'advantage', 'phi'),
    [
        ([1.0, 1.0, 9.0], 2.0, 1.0),
        ([2.0, 0.5, 9.0], 2.0, 1.0),  # the ratio of the completion is 1
        ([2.0, 1.0, 9.0], 2.0, 2**2 * np.exp(-3)),
        ([2.0, 1.0, 9.0], -2.0, 2**3 * np.exp(-2)),
        ([0.5, 1.0, 9.0], 2.0, 0.5**2 * np.exp(1.5)),
        ([0.5, 1.0, 9.0], -2.0, 0.5**3 * np.exp(1.0)),
        ([1e9, 1e9, 9.0], 2.0, 0.0),
        ([1e-9, 1e-9, 9.0], -2.0, 0.0),
    ],
)
def test_vespo_by_hand(ratios, advantage, phi):
    logprobs, *rest = group(ratios, advantage)
    ours, pull = jax.vjp(lambda x: vespo(x, *rest, **PAPER), logprobs)
    np.testing.assert_allclose(ours, -phi * advantage * logprobs, rtol=1e-4, atol=1e-6)
    slopes = pull(jnp.ones_like(ours))[0]
    np.testing.assert_allclose(slopes, np.full((1, 3), -phi * advantage), rtol=1e-4, atol=1e-6)


def test_vespo_multiplies_the_weights_of_a_completion():
    """Ratios 2 and 1, weights 1/2 and 3: w = 3. A token whose weight is 0 leaves all out."""
    arguments = group([2.0, 1.0, 9.0], 1.0)
    ours = vespo(*arguments, jnp.float32([[0.5, 3.0, 7.0]]), **PAPER)
    np.testing.assert_allclose(ours, -(3**2) * np.exp(-6.0) * arguments[0], rtol=1e-4)
    ours = vespo(*arguments, jnp.float32([[0.0, 3.0, 7.0]]), **PAPER)
    np.testing.assert_allclose(ours, 0, atol=1e-6)


@pytest.mark.parametrize(
    ('ratios', 'advantage', 'mean', 'inside'),
    [
        # bounds exp(-log 2) = 1/2 and exp(log 2) = 2
        ([1.0, 1.0, 9.0], 3.0, 1.0, [1, 1]),
        ([1.5, 1.5, 9.0], 3.0, 1.5, [1, 1]),
        ([8.0, 0.5, 9.0], 3.0, 1.0, [0, 1]),  # 8 is clipped to 2: sqrt(2 * 0.5)
        ([8.0, 0.5, 9.0], -3.0, 2.0, [1, 1]),  # not where the token is pushed down
        ([2.0, 0.125, 9.0], -3.0, 1.0, [1, 0]),
        ([2.0 - 1e-3, 0.125, 9.0], 3.0, 0.5, [1, 1]),
    ],
)
def test_gmpo_by_hand(ratios, advantage, mean, inside):
    logprobs, *rest = group(ratios, advantage)
    bound = float(np.log(2))
    ours, pull = jax.vjp(lambda x: gmpo(x, *rest, clip_low=bound, clip_high=bound), logprobs)
    np.testing.assert_allclose(ours, np.full((1, 3), -advantage * mean), rtol=1e-3)
    slopes = pull(jnp.float32([[1.0, 1.0, 0.0]]))[0]
    np.testing.assert_allclose(slopes[0, :2], -advantage * mean * np.array(inside), rtol=1e-3)
    assert slopes[0, 2] == 0
