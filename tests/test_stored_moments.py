"""Moments in bfloat16: how they are rounded, what they become, and the memory that they take."""

import functools

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny
from test_optimizer import ADAMW, adamw_by_hand

from grpo_jax import sharding
from grpo_jax.algorithm.optimizer import adamw, apply_gradient, make_optimizer
from grpo_jax.algorithm.stored_moments import round_stochastically, with_moments
from grpo_jax.types import TrainState

round_many = jax.jit(round_stochastically)


def test_rounding_by_hand():
    """1 + 2^-9 is a quarter of the way from 1 to the next bfloat16, 1 + 2^-7."""
    x = jnp.full(40_000, 1 + 2.0**-9).at[1::2].multiply(-1)
    made = np.abs(np.float32(round_many(x, jax.random.key(0))))
    assert set(made.tolist()) == {1.0, 1 + 2.0**-7}
    up = (made > 1).mean()
    assert up == pytest.approx(0.25, abs=5 * (0.25 * 0.75 / len(x)) ** 0.5)
    both = (made[::2] > 1).mean(), (made[1::2] > 1).mean()
    assert both == pytest.approx((0.25, 0.25), abs=0.02)


def test_what_is_not_finite_stays():
    x = jnp.float32([np.inf, -np.inf, np.nan, 0.0, -0.0])
    made = np.float32(round_many(x, jax.random.key(1)))
    np.testing.assert_array_equal(made, x)
    assert np.signbit(made[4])


@hypothesis.settings(max_examples=30)
@hypothesis.given(seed=st.integers(0, 2**31), power=st.integers(-120, 120))
def test_a_value_is_rounded_to_a_neighbor(seed, power):
    x = np.float32(np.random.default_rng(seed).standard_normal(64) * 2.0**power)
    x[:8] = np.float32(x[:8].astype(jnp.bfloat16))  # these stay as they are
    made = np.float64(np.float32(round_many(x, jax.random.key(seed))))
    np.testing.assert_array_equal(made[:8], x[:8])
    assert (np.abs(made - x) < 2.0**-7 * np.abs(x) + 1e-45).all()


def states_of(optimizer, params, gradients):
    update = jax.jit(optimizer.update)
    state = optimizer.init(params)
    for gradient in gradients:
        change, state = update(gradient, state, params)
        params = optax.apply_updates(params, change)
    return params, state


def test_a_second_moment_falls():
    """By 0.999 in each update without a gradient; rounded to the nearest it would stay."""
    params = {'gate': jnp.ones(4096)}
    optimizer, _ = adamw(learning_rate=0.0, steps=1, moments='bfloat16', clip_norm=0)
    gradients = [{'gate': jnp.ones(4096)}] + [{'gate': jnp.zeros(4096)}] * 400
    _, state = states_of(optimizer, params, gradients)
    nu = np.float32(state[1].inner[0].nu['gate'])
    expected = 0.001 * 0.999**400
    assert nu.mean() == pytest.approx(expected, rel=0.01)
    stuck = np.float32(1e-3).astype(jnp.bfloat16)
    assert (np.float32(stuck) * np.float32(0.999)).astype(jnp.bfloat16) == stuck


@pytest.mark.parametrize(('moments', 'tolerance'), [('float32', 1e-5), ('bfloat16', 2e-2)])
def test_adamw(moments, tolerance):
    """The rule in float64; with parameters in bfloat16 the moments are what was asked for."""
    rng = np.random.default_rng(0)
    start = {'gate': rng.standard_normal((3, 4)), 'scale': rng.standard_normal(4)}
    gradients = [jax.tree.map(lambda x: rng.standard_normal(x.shape), start) for _ in range(5)]
    optimizer, _ = adamw(learning_rate=0.1, steps=5, weight_decay=0.3, moments=moments)
    params = jax.tree.map(jnp.float32, start)
    single = [jax.tree.map(jnp.float32, gradient) for gradient in gradients]
    made, state = states_of(optimizer, params, single)
    expected = adamw_by_hand(start, gradients, [0.1] * 5, **(ADAMW | {'weight_decay': 0.3}))
    assert tiny.gap(made, expected) <= tolerance
    narrow = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
    for moments_of in (state, optimizer.init(narrow)):
        kinds = {x.dtype.name for x in jax.tree.leaves(moments_of) if x.ndim}
        assert kinds == {moments}
    change, _ = optimizer.update(narrow, optimizer.init(narrow), narrow)
    assert optax.apply_updates(narrow, change)['gate'].dtype == jnp.bfloat16


def test_it_is_repeated_exactly():
    params = {'gate': jnp.linspace(-1, 1, 32)}
    optimizer, _ = adamw(learning_rate=0.1, steps=5, moments='bfloat16')
    ends = [states_of(optimizer, params, [params] * 3) for _ in range(2)]
    assert tiny.same(*ends)
    assert int(ends[0][1][1].updates) == 3


def test_any_optimizer():
    params = {'gate': jnp.ones(8)}
    optimizer, _ = make_optimizer(
        'optax:sgd', learning_rate=0.1, steps=5, moments='bfloat16', options={'momentum': 0.9}
    )
    made, state = states_of(optimizer, params, [params] * 2)
    assert {x.dtype.name for x in jax.tree.leaves(state) if x.ndim} == {'bfloat16'}
    exact, _ = make_optimizer('optax:sgd', learning_rate=0.1, steps=5, options={'momentum': 0.9})
    assert tiny.gap(made, states_of(exact, params, [params] * 2)[0]) < 1e-3


def test_without_it_nothing_changes():
    optimizer = optax.sgd(0.1)
    assert with_moments(optimizer, '') is optimizer


def test_unknown_moments():
    with pytest.raises(ValueError, match=r"moments='int4' is unknown: use one of float32, bflo"):
        make_optimizer(learning_rate=0.1, steps=5, moments='int4')


def test_the_compiled_update_takes_half_the_bytes():
    """Its arguments: two moments of every parameter, in two bytes instead of four."""
    params, sizes = tiny.make_params(tiny.make_model()), {}
    for moments in ('', 'bfloat16'):
        optimizer, _ = adamw(learning_rate=1e-2, steps=10, moments=moments)
        state = TrainState(jnp.int32(0), params, optimizer.init(params), jnp.int32(0))
        step = jax.jit(functools.partial(apply_gradient, optimizer))
        compiled = step.lower(state, params, jnp.bool(True)).compile()
        sizes[moments] = compiled.memory_analysis().argument_size_in_bytes
    count = sum(x.size for x in jax.tree.leaves(params))
    assert sizes[''] - sizes['bfloat16'] == pytest.approx(4 * count, abs=64)


@pytest.mark.slow
def test_on_a_mesh(rollout, rewards):
    """The same moments, bit for bit where the gradient is: random bits do not depend on it."""
    mesh = sharding.make_mesh(fsdp=4, tensor=2)
    optimizer, _ = adamw(learning_rate=1e-2, steps=10, moments='bfloat16')
    params = tiny.make_params(tiny.make_model())
    gradient = jax.tree.map(lambda x: x / 3, params)
    alone = jax.jit(optimizer.update)(gradient, optimizer.init(params), params)
    where = sharding.shardings(params, mesh)
    placed = jax.device_put((gradient, params), (where, where))
    state = jax.device_put(optimizer.init(params), sharding.shardings(optimizer.init(params), mesh))
    meshed = jax.jit(optimizer.update)(placed[0], state, placed[1])
    for ours, theirs in zip(jax.tree.leaves(meshed[1]), jax.tree.leaves(alone[1]), strict=True):
        gap = np.abs(np.float32(ours) - np.float32(theirs))
        assert (gap > 0).mean() < 0.01
