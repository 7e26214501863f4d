"""Losses of pairs: by hand, against a float64 oracle, and what must not happen."""

import functools
import math

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest

from grpo_jax.algorithm import losses
from grpo_jax.algorithm.config import Algorithm
from grpo_jax.algorithm.logprobs import token_weights
from grpo_jax.algorithm.losses import LOSSES
from grpo_jax.algorithm.preferences import PAIRWISE
from grpo_jax.algorithm.presets import preset
from grpo_jax.types import Batch, Rollout

VARIANTS = {
    'dpo': preset('dpo', beta=0.7),
    'dpo, label smoothing': preset('dpo', beta=0.7, label_smoothing=0.1),
    'ipo': preset('ipo', beta=0.3),
    'hinge': preset('dpo_hinge', beta=0.9),
}
SIZE = (5, 2, 4)  # B, G, T


def pair(difference, advantages, mask=None):
    """Log-probs [2, T] that differ from the reference's by `difference`, and their group."""
    ref = jnp.linspace(-3.0, -1.0, difference.size).reshape(difference.shape)
    mask = jnp.ones(difference.shape, bool) if mask is None else jnp.asarray(mask)
    advantages = jnp.broadcast_to(jnp.float32(advantages)[:, None], difference.shape)
    group = Batch(Rollout(None, None, mask, None, None), advantages, None, ref)
    return ref + jnp.float32(difference), group


def make_algorithm(loss, beta=0.5, **options):
    return Algorithm(loss=loss, beta=beta, scale='none', kl='none', **options)


def pair_losses(algorithm, logprobs, group):
    """The loss of each token of a pair."""
    return losses.policy_loss(algorithm, logprobs, group)[0]


# Preferred: 0.5 + 0.25 over two tokens; the other: -0.25 over one. m = 1.
DIFFERENCE = np.float32([[0.5, 0.25, 9.0], [-0.25, 9.0, 9.0]])
MASK = np.array([[True, True, False], [True, False, False]])


@pytest.mark.parametrize(
    ('name', 'coefficients', 'at_zero', 'at_one', 'at_minus_one'),
    [
        ('dpo', {'beta': 0.5}, math.log(2), math.log1p(math.exp(-0.5)), math.log1p(math.exp(0.5))),
        (
            'dpo',
            {'beta': 0.5, 'label_smoothing': 0.2},
            math.log(2),
            0.8 * math.log1p(math.exp(-0.5)) + 0.2 * math.log1p(math.exp(0.5)),
            0.8 * math.log1p(math.exp(0.5)) + 0.2 * math.log1p(math.exp(-0.5)),
        ),
        ('ipo', {'beta': 0.25}, 4.0, 1.0, 9.0),  # (m - 2)^2
        ('hinge', {'beta': 0.5}, 1.0, 0.5, 1.5),
        ('hinge', {'beta': 2.0}, 1.0, 0.0, 3.0),
    ],
)
def test_by_hand(name, coefficients, at_zero, at_one, at_minus_one):
    algorithm = make_algorithm(name, **coefficients)
    function = jax.jit(pair_losses)
    for advantages, scale, want in (
        ((1, -1), 0, at_zero),
        ((1, -1), 1, at_one),
        ((-1, 1), 1, at_minus_one),
        ((3, 2), 1, at_one),  # rewards themselves: the larger is preferred, whatever its sign
        ((-3, -2), 1, at_minus_one),
    ):
        ours = function(algorithm, *pair(scale * DIFFERENCE, advantages, MASK))
        np.testing.assert_allclose(ours, np.full((2, 3), want), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ('name', 'beta', 'at_zero', 'at_one'),
    [
        # DeepSeekMath (2402.03300), table 10: beta * sigmoid(-beta * m)
        ('dpo', 0.5, 0.25, 0.5 / (1 + math.exp(0.5))),
        ('ipo', 0.25, 4.0, 2.0),  # -2 * (m - 2)
        ('hinge', 0.5, 0.5, 0.5),
        ('hinge', 2.0, 2.0, 0.0),
    ],
)
def test_gradient_coefficients(name, beta, at_zero, at_one):
    """Plus at all tokens of the preferred, minus at the other's, 0 outside the mask."""
    run = jax.jit(losses.gradient_coefficient)
    for advantages, scale, want in (((1, -1), 0, at_zero), ((1, -1), 1, at_one)):
        ours = run(make_algorithm(name, beta), *pair(scale * DIFFERENCE, advantages, MASK))
        expected = np.where(MASK, np.float32([[want], [-want]]), 0)
        np.testing.assert_allclose(ours, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize('name', PAIRWISE)
@pytest.mark.parametrize('advantage', [0.0, 1.0, -0.1])
def test_equal_advantages_teach_nothing(name, advantage):
    smoothing = {'label_smoothing': 0.1} if name == 'dpo' else {}
    algorithm = make_algorithm(name, **smoothing)
    logprobs, group = pair(DIFFERENCE, (advantage, advantage), MASK)
    none, _ = pair(0 * DIFFERENCE, (1, -1), MASK)
    np.testing.assert_allclose(
        pair_losses(algorithm, logprobs, group), pair_losses(algorithm, none, group)
    )
    assert (losses.gradient_coefficient(algorithm, logprobs, group) == 0).all()


@pytest.mark.parametrize('name', PAIRWISE)
@pytest.mark.parametrize('m', [-2000.0, 2000.0])
def test_far_margins_stay_finite(name, m):
    logprobs, group = pair(np.float32([[m], [0]]), (1, -1))
    algorithm = make_algorithm(name)
    assert np.isfinite(pair_losses(algorithm, logprobs, group)).all()
    assert np.isfinite(losses.gradient_coefficient(algorithm, logprobs, group)).all()


@pytest.mark.parametrize('name', PAIRWISE)
def test_no_kl_term_beside_the_margin(name):
    logprobs, group = pair(DIFFERENCE, (1, -1), MASK)
    value, divergence = losses.policy_loss(make_algorithm(name), logprobs, group)
    assert divergence is None
    arrays = group.ref_logprobs, group.advantages, group.rollout.mask
    np.testing.assert_array_equal(value, LOSSES[name](logprobs, *arrays, beta=0.5))


def test_names():
    assert set(PAIRWISE) < set(LOSSES)
    assert len(LOSSES) == 10
    for name in LOSSES:
        assert LOSSES[name] is getattr(losses, name)


@pytest.mark.parametrize('name', PAIRWISE)
def test_errors(name):
    logprobs, group = pair(DIFFERENCE, (1, -1), MASK)
    algorithm = make_algorithm(name)
    with pytest.raises(ValueError, match=r"parameter 'ref_logprobs', which is absent from this"):
        pair_losses(algorithm, logprobs, group._replace(ref_logprobs=None))
    logprobs, group = pair(np.zeros((3, 2), np.float32), (1, -1, 0))
    with pytest.raises(ValueError, match=r'group_size=3: .*use group_size=2'):
        pair_losses(algorithm, logprobs, group)


def case(seed):
    """Ragged pairs [B, 2, T], some of them equal, NaN outside the masks."""
    rng = np.random.default_rng(seed)
    mask = np.arange(SIZE[2]) < rng.integers(1, SIZE[2] + 1, SIZE[:2])[..., None]
    ref = rng.uniform(-4, -0.2, SIZE)
    rewards = rng.choice([0.0, 1.0], SIZE[:2]) if seed % 2 else rng.uniform(-1, 2, SIZE[:2])
    if seed % 3:  # as a group's advantages, else the rewards themselves
        rewards = rewards - rewards.mean(1, keepdims=True)
    return {
        'logprobs': ref + rng.choice([0.01, 0.3, 2.0]) * rng.standard_normal(SIZE),
        'ref': np.where(mask, ref, np.nan),
        'mask': mask,
        'advantages': np.broadcast_to(rewards[..., None], SIZE),
    }


@functools.cache
def program():
    """(case, algorithm) -> mean loss and gradient by the package's functions, compiled once."""

    def total(logprobs, case, algorithm):
        mask = case['mask']
        rollout = Rollout(None, None, mask, None, None)
        batch = Batch(rollout, case['advantages'], None, case['ref'])
        axes = Batch(Rollout(None, None, 0, None, None), 0, None, 0)
        values, _ = jax.vmap(
            lambda x, group: losses.policy_loss(algorithm, x, group), in_axes=(0, axes)
        )(logprobs, batch)
        return jnp.where(mask, token_weights(mask, aggregation='sequence_mean') * values, 0).sum()

    return jax.jit(lambda case, a: jax.value_and_grad(total)(case['logprobs'], case, a))


def margins(x, case):
    """Of each pair, None where neither completion is preferred."""
    for b in range(SIZE[0]):
        ratio = [(x[b, g] - case['ref'][b, g])[case['mask'][b, g]].sum() for g in range(2)]
        first, second = case['advantages'][b, :, 0]
        preferred = 0 if first > second else 1
        yield None if first == second else ratio[preferred] - ratio[1 - preferred]


def pair_loss(loss, m, o):
    if loss == 'dpo':
        kept, swapped = np.log(1 + np.exp(-o.beta * m)), np.log(1 + np.exp(o.beta * m))
        return (1 - o.label_smoothing) * kept + o.label_smoothing * swapped
    if loss == 'ipo':
        return (m - 1 / (2 * o.beta)) ** 2
    return 1 - o.beta * m if o.beta * m.real < 1 else 0j


def check(name, seed):
    algorithm = VARIANTS[name]
    batch = case(seed)

    def mean(x):
        known = (0j if m is None else m for m in margins(x, batch))
        return sum(pair_loss(algorithm.loss, m, algorithm) for m in known) / SIZE[0]

    with jax.enable_x64(True):
        value, gradient = program()(batch, algorithm)
        ours = float(value), np.asarray(gradient)
    oracle.assert_same(ours, oracle.complex_step(mean, batch['logprobs'], batch['mask']))
    assert (ours[1][~batch['mask']] == 0).all()


@pytest.mark.parametrize('name', VARIANTS)
def test_loss_and_gradient(name):
    for seed in range(30):
        check(name, seed)


@pytest.mark.slow
@pytest.mark.parametrize('name', VARIANTS)
@hypothesis.settings(max_examples=300, deadline=None)
@hypothesis.given(seed=st.integers(0, 10**6))
def test_loss_and_gradient_of_many_batches(name, seed):
    check(name, seed)


def test_the_batches_reach_every_case():
    """No preference, the wrong completion ahead, the right one, and so far that hinge is done."""
    batches = [case(seed) for seed in range(30)]
    found = [m for batch in batches for m in margins(batch['logprobs'], batch)]
    beta = VARIANTS['hinge'].beta
    known = np.array([m for m in found if m is not None])
    assert len(known) < len(found)
    for share in ((known < 0), (known > 0) & (beta * known < 1), (beta * known > 1)):
        assert share.mean() > 0.1
