"""Per-token losses and KL estimators against scalar oracles, values and slopes.

The grid holds both signs of the advantage, and ratios below, inside and above the clip bounds, none
of them on a bound, where the slope jumps.
"""

import functools
import itertools
import math

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest

from grpo_jax.algorithm import losses, metrics
from grpo_jax.algorithm.config import Algorithm
from grpo_jax.algorithm.critic import value_loss
from grpo_jax.types import Batch, Rollout

RATIOS = (0.1, 0.75, 0.79, 0.85, 1.01, 1.15, 1.25, 1.31, 4.0)
ADVANTAGES = (-2.0, -0.5, 0.0, 0.3, 1.7)
BOUNDS = ((0.2, 0.2), (0.2, 0.28), (0.1, 0.3))

GRID = np.array(list(itertools.product(RATIOS, ADVANTAGES)), np.float32)
OLD = np.linspace(-4, -0.2, len(GRID), dtype=np.float32)[None]
ADVANTAGE = GRID[None, :, 1]
LOGPROB = OLD + np.log(GRID[None, :, 0])


def value_and_slope(loss, logprob, *args, **coefficients):
    """Per-token values, and the derivative of each by its own log-prob."""

    @jax.jit
    def run(logprob):
        arrays = map(jnp.asarray, args)
        values, pull = jax.vjp(lambda x: loss(x, *arrays, **coefficients), logprob)
        return values, pull(jnp.ones_like(values))[0]

    return run(jnp.asarray(logprob))


def expected(function):
    """Value and slope of a scalar function (logprob, index) at each grid point, in float64."""
    points = [float(x) for x in LOGPROB[0]]
    values = [function(x, i) for i, x in enumerate(points)]
    slopes = [oracle.slope(lambda y, i=i: function(float(y), i), x) for i, x in enumerate(points)]
    return np.array([values]), np.array([slopes])


@pytest.mark.parametrize(('low', 'high'), BOUNDS)
def test_clipped(low, high):
    values, slopes = value_and_slope(
        losses.clipped, LOGPROB, OLD, ADVANTAGE, clip_low=low, clip_high=high
    )
    old, advantage = OLD[0].astype(float), ADVANTAGE[0].astype(float)
    want, want_slopes = expected(lambda x, i: oracle.clipped(x, old[i], advantage[i], low, high))
    np.testing.assert_allclose(values, want, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(slopes, want_slopes, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ('ratio', 'advantage', 'value', 'slope'),
    [
        (1.5, 2.0, -2.4, 0.0),  # a good token beyond the upper bound: -2 * 1.2, and no more push
        (1.5, -2.0, 3.0, 3.0),  # a bad token that grew: not clipped, pushed down by ratio * |A|
        (0.5, 2.0, -1.0, -1.0),  # a good token that shrank: not clipped
        (0.5, -2.0, 1.6, 0.0),  # a bad token beyond the lower bound: 2 * 0.8
        (1.0, 2.0, -2.0, -2.0),  # on the policy that sampled: the slope is -A
        (1.0, -2.0, 2.0, 2.0),
    ],
)
def test_clipped_by_hand(ratio, advantage, value, slope):
    only = np.float32([[-1.0]]), np.float32([[advantage]])
    logprob = np.float32([[-1 + math.log(ratio)]])
    values, slopes = value_and_slope(losses.clipped, logprob, *only, clip_low=0.2, clip_high=0.2)
    np.testing.assert_allclose(values[0, 0], value, rtol=1e-6)
    np.testing.assert_allclose(slopes[0, 0], slope, rtol=1e-6)


def test_nll():
    values, slopes = value_and_slope(losses.nll, LOGPROB, ADVANTAGE)
    np.testing.assert_allclose(values, -ADVANTAGE * LOGPROB, rtol=1e-6)
    np.testing.assert_allclose(slopes, -ADVANTAGE, rtol=1e-6)


def test_surrogate():
    """The ratio times A whatever the ratio, and so is its slope."""
    values, slopes = value_and_slope(losses.surrogate, LOGPROB, OLD, ADVANTAGE)
    want = -GRID[None, :, 0] * ADVANTAGE
    np.testing.assert_allclose(values, want, rtol=1e-5)
    np.testing.assert_allclose(slopes, want, rtol=1e-5)


def clip_counts(loss, low, high):
    """What the metrics count at each point of the grid, as a completion of one token."""
    algorithm = Algorithm(loss=loss, clip_low=low, clip_high=high)

    def of_token(log_ratio, advantage):
        one = jnp.ones((1, 1))
        return metrics._clip_terms(algorithm, log_ratio * one, advantage * one, one > 0)

    return jax.vmap(of_token)(jnp.asarray(LOGPROB - OLD)[0], jnp.asarray(ADVANTAGE)[0])


@pytest.mark.parametrize(('low', 'high'), BOUNDS)
def test_clip_counts_say_where_the_gradient_is_cut(low, high):
    counts = clip_counts('clipped', low, high)
    _, slopes = value_and_slope(
        losses.clipped, LOGPROB, OLD, ADVANTAGE, clip_low=low, clip_high=high
    )
    cut = (np.asarray(slopes) == 0) & (ADVANTAGE != 0)
    np.testing.assert_array_equal(counts['clip_low'], (cut & (LOGPROB < OLD))[0])
    np.testing.assert_array_equal(counts['clip_high'], (cut & (LOGPROB > OLD))[0])
    assert counts['clip_low'].any()
    assert counts['clip_high'].any()


@pytest.mark.parametrize(('low', 'high'), BOUNDS)
def test_clip_counts_say_where_a_weight_is_bounded(low, high):
    """CISPO's slope is A times the ratio but there; as in TRL, counted above and where A > 0."""
    counts = clip_counts('cispo', low, high)
    _, slopes = value_and_slope(losses.cispo, LOGPROB, OLD, ADVANTAGE, clip_low=low, clip_high=high)
    bounded = ~np.isclose(slopes, -ADVANTAGE * np.exp(LOGPROB - OLD), rtol=1e-5)
    for side in (LOGPROB > OLD, LOGPROB < OLD):
        for sign in (1, -1):
            assert (bounded & side & (sign * ADVANTAGE > 0)).any()
    expected = bounded & (LOGPROB > OLD) & (ADVANTAGE > 0)
    np.testing.assert_array_equal(counts['clip_high'], expected[0])
    assert 'clip_low' not in counts


@pytest.mark.parametrize('name', ['k1', 'k2', 'k3'])
def test_kl_estimators(name):
    """The grid's old log-probs stand for the reference's."""
    values, slopes = value_and_slope(losses.kl_divergence, LOGPROB, OLD, estimator=name)
    ref = OLD[0].astype(float)
    want, want_slopes = expected(lambda x, i: oracle.kl(name, x, ref[i]))
    np.testing.assert_allclose(values, want, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(slopes, want_slopes, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(losses.kl_divergence(*2 * [jnp.asarray(OLD)], name), 0, atol=1e-7)


def test_kl_estimators_in_expectation():
    """Over the policy's own distribution k1 and k3 average to the KL, and k2 has its gradient."""
    rng = np.random.default_rng(0)
    logits, ref = rng.normal(size=(2, 9))
    ref = jax.nn.log_softmax(jnp.float32(ref))

    def mean(name, logits):
        logp = jax.nn.log_softmax(logits)
        fixed = jax.lax.stop_gradient(jnp.exp(logp))  # on-policy: samples, not differentiated
        return (fixed * losses.kl_divergence(logp, ref, name)).sum()

    logits = jnp.float32(logits)

    def exact(x):
        return (jax.nn.softmax(x) * (jax.nn.log_softmax(x) - ref)).sum()

    np.testing.assert_allclose(mean('k1', logits), exact(logits), rtol=1e-5)
    np.testing.assert_allclose(mean('k3', logits), exact(logits), rtol=1e-5)
    slopes = {n: jax.grad(functools.partial(mean, n))(logits) for n in ('k1', 'k2')}
    np.testing.assert_allclose(slopes['k2'], jax.grad(exact)(logits), atol=1e-6)
    np.testing.assert_allclose(slopes['k1'], 0, atol=1e-6)


def test_slope_of_the_on_policy_objective():
    """-(A + beta * (ref / pi - 1)), as in DeepSeekMath (2402.03300), appendix A.1.6."""
    rng = np.random.default_rng(1)
    logprob, ref, advantage = rng.normal(-2, 1, (3, 2, 8)).astype(np.float32)

    def loss(x):  # the policy is the one that sampled: ratio 1
        clipped = losses.clipped(
            x, jnp.asarray(logprob), jnp.asarray(advantage), clip_low=0.2, clip_high=0.28
        )
        return clipped + 0.04 * losses.kl_divergence(x, jnp.asarray(ref), 'k3')

    _, slopes = value_and_slope(loss, logprob)
    np.testing.assert_allclose(slopes, -(advantage + 0.04 * (np.exp(ref - logprob) - 1)), rtol=2e-5)


def test_gradient_coefficients_of_the_papers_table():
    """SFT and RFT: the advantage; GRPO: A + beta * (ref / pi - 1), and 0 outside the mask."""
    rng = np.random.default_rng(2)
    logprob, ref, advantage = jnp.asarray(rng.normal(-2, 1, (3, 2, 8)).astype(np.float32))
    mask = np.arange(8) < np.array([[8], [5]])
    rollout = Rollout(None, None, jnp.asarray(mask), None, None)
    batch = Batch(rollout, jnp.asarray(advantage), None)
    coefficient = losses.gradient_coefficient(Algorithm(loss='nll'), logprob, batch)
    np.testing.assert_allclose(coefficient, np.where(mask, advantage, 0), rtol=1e-6)
    batch = batch._replace(ref_logprobs=jnp.asarray(ref))
    coefficient = losses.gradient_coefficient(Algorithm(beta=0.04), logprob, batch)
    expected = np.where(mask, advantage + 0.04 * (np.exp(ref - logprob) - 1), 0)
    np.testing.assert_allclose(coefficient, expected, rtol=2e-5, atol=1e-6)


def critic(value, old, target):
    """Arguments of `value_loss` for a group of one token."""
    return [jnp.float32([[x]]) for x in (value, old, target)]


@pytest.mark.parametrize(
    ('value', 'clip', 'loss', 'slope'),
    [
        # the value was 1 and its return is 2
        (1.25, 0.5, 0.28125, -0.75),  # within the clip: (1.25 - 2)^2 / 2
        (1.75, 0.5, 0.125, 0.0),  # it moved too far toward the return: (1.5 - 2)^2 / 2
        (0.25, 0.5, 1.53125, -1.75),  # too far away from it: not clipped, pulled back
        (3.0, 0.5, 0.5, 1.0),  # beyond it: (3 - 2)^2 = 1 exceeds the clipped 0.25
        (1.75, 0.0, 0.03125, -0.25),  # 0 does not clip
        (1.0, 0.5, 0.5, -1.0),  # not moved: the plain slope v - R, once
    ],
)
def test_value_loss_by_hand(value, clip, loss, slope):
    ours, slopes = value_and_slope(value_loss, *critic(value, 1.0, 2.0), value_clip=clip)
    np.testing.assert_allclose([ours[0, 0], slopes[0, 0]], [loss, slope], rtol=1e-6)


@functools.cache
def value_program():
    def total(values, old, target, weights, clip):
        return (weights * value_loss(values, old, target, value_clip=clip)).sum()

    return jax.jit(jax.value_and_grad(total))


def check_value_loss(seed, clip):
    rng = np.random.default_rng(seed)
    old, target, weights = rng.standard_normal((3, 3, 5))
    values = old + rng.choice([0.05, 0.3, 1.0]) * rng.standard_normal((3, 5))

    def total(x):
        out = 0
        for i in np.ndindex(x.shape):
            near = complex(np.clip(x[i].real, old[i] - clip, old[i] + clip))
            inside = not clip or abs(x[i].real - old[i]) < clip
            errors = x[i] - target[i], (x[i] if inside else near) - target[i]
            out += weights[i] * max((e * e / 2 for e in errors), key=lambda z: z.real)
        return out

    with jax.enable_x64(True):
        value, gradient = value_program()(values, old, target, weights, clip)
        ours = float(value), np.asarray(gradient)
    oracle.assert_same(ours, oracle.complex_step(total, values, np.ones((3, 5), bool)))


@pytest.mark.parametrize('clip', [0.0, 0.2])
def test_value_loss_and_gradient(clip):
    for seed in range(30):
        check_value_loss(seed, clip)


@pytest.mark.slow
@pytest.mark.parametrize('clip', [0.0, 0.2])
@hypothesis.settings(max_examples=300, deadline=None)
@hypothesis.given(seed=st.integers(0, 10**6))
def test_value_loss_and_gradient_of_many_batches(clip, seed):
    check_value_loss(seed, clip)
