"""Moments in two bytes or one: how they are rounded, what they become, and their memory."""

import functools

import collectives
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
from grpo_jax.algorithm.stored_moments import round_stochastically, to_float8, with_moments
from grpo_jax.types import TrainState

round_many = jax.jit(round_stochastically)
round_rows = jax.jit(to_float8, static_argnames='second')


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
    least_normal = 2.0**-126  # numbers below it have its spacing
    assert (np.abs(made - x) < 2.0**-7 * np.maximum(np.abs(np.float64(x)), least_normal)).all()


def float64(stored):
    return np.float64(np.float32(stored.values)) * np.float64(np.float32(stored.scale))


@pytest.mark.parametrize('second', [False, True])
def test_float8_by_hand(second):
    """The largest of a row, here 192 or 3, gets the exponent 7 of 8, or 14 of 15.

    With three digits after the point 1.0625 lies halfway between 1 and 1.125, with two a quarter of
    the way to 1.25. Of the smallest numbers the spacing is 2^-9 or 2^-16 times the scale.
    """
    digits, least = (2, 2.0**-16) if second else (3, 2.0**-9)
    x = np.full((2, 20_000), 1.0625, np.float32)
    x[0, 0], x[1, 0] = 192, 3
    stored = round_rows(x, jax.random.key(0), second=second)
    assert stored.values.dtype == ('float8_e5m2' if second else 'float8_e4m3fn')
    scale = np.float64([[2.0**0], [2.0**-6]]) * (2.0**-7 if second else 1)
    np.testing.assert_array_equal(np.float64(stored.scale), scale)
    made = float64(stored)
    np.testing.assert_array_equal(made[:, 0], x[:, 0])
    assert set(made[:, 1:].ravel().tolist()) == {1.0, 1 + 2.0**-digits}
    up = (made[:, 1:] > 1).mean()
    share = 0.0625 * 2**digits
    assert up == pytest.approx(share, abs=5 * (share * (1 - share) / 40_000) ** 0.5)
    small = np.float32([[2.0**8 if not second else 2.0**15] + [0.25 * least] * 9_999])
    made = float64(round_rows(small, jax.random.key(1), second=second))[0, 1:] / 2
    if second:  # never 0
        assert set(made) == {least}
    else:
        assert set(made) == {0, least}
        assert made.mean() == pytest.approx(0.125 * least, rel=0.15)


@hypothesis.settings(max_examples=30)
@hypothesis.given(
    seed=st.integers(0, 2**31), power=st.integers(-80, 80), second=st.booleans(),
    spread=st.floats(0, 8),
)  # fmt: skip
def test_float8_is_a_neighbor(seed, power, second, spread):
    """Within a step of 1/8 or 1/4 of a number, or of the smallest one that a row has."""
    rng = np.random.default_rng(seed)
    x = np.float32(rng.standard_normal((3, 64)) * np.exp(spread * rng.standard_normal((3, 64))))
    x = np.abs(x) if second else x
    x[2] = 0
    x *= np.float32(2.0**power)
    stored = round_rows(x, jax.random.key(seed), second=second)
    made, scale = float64(stored), np.float64(np.float32(stored.scale))
    largest = np.abs(x).max(-1, keepdims=True)
    assert (largest <= scale * 2.0 ** (15 if second else 8)).all()
    assert (largest[:2] > scale[:2] * 2.0 ** (14 if second else 7) * 0.99).all()
    relative, least = (0.25, 2.0**-16) if second else (0.125, 2.0**-9)
    assert (np.abs(made - x) <= np.maximum(relative * np.abs(x), least * scale)).all()
    assert (made[2] == 0).all()
    assert not second or (made[:2] > 0).all()
    # What is stored already stays, whatever the random bits are.
    again = round_rows(np.float32(made), jax.random.key(seed + 1), second=second)
    np.testing.assert_array_equal(float64(again), made)


def states_of(optimizer, params, gradients):
    update = jax.jit(optimizer.update)
    state = optimizer.init(params)
    for gradient in gradients:
        change, state = update(gradient, state, params)
        params = optax.apply_updates(params, change)
    return params, state


@pytest.mark.parametrize(('moments', 'tolerance'), [('bfloat16', 0.01), ('float8', 0.02)])
def test_a_second_moment_falls(moments, tolerance):
    """By 0.999 in each update without a gradient; rounded to the nearest it would stay."""
    params = {'gate': jnp.ones(4096)}
    optimizer, _ = adamw(learning_rate=0.0, steps=1, moments=moments, clip_norm=0)
    gradients = [{'gate': jnp.ones(4096)}] + [{'gate': jnp.zeros(4096)}] * 400
    _, state = states_of(optimizer, params, gradients)
    nu = state[1].inner[0].nu['gate']
    nu = float64(nu) if moments == 'float8' else np.float32(nu)
    expected = 0.001 * 0.999**400
    assert nu.mean() == pytest.approx(expected, rel=tolerance)
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


def test_adamw_in_one_byte():
    """Near the rule in float64; small arrays are as in float32."""
    rng = np.random.default_rng(0)
    start = {'gate': rng.standard_normal((64, 80)), 'scale': rng.standard_normal(4)}
    gradients = [jax.tree.map(lambda x: rng.standard_normal(x.shape), start) for _ in range(30)]
    params = jax.tree.map(jnp.float32, start)
    single = [jax.tree.map(jnp.float32, gradient) for gradient in gradients]
    optimizer, _ = adamw(learning_rate=0.1, steps=30, moments='float8', clip_norm=0)
    made, state = states_of(optimizer, params, single)
    expected = adamw_by_hand(start, gradients, [0.1] * 30, **(ADAMW | {'clip_norm': 0}))
    np.testing.assert_allclose(made['scale'], expected['scale'], atol=1e-5)
    moved = expected['gate'] - start['gate']
    error = made['gate'] - expected['gate']
    assert np.sqrt((error**2).mean() / (moved**2).mean()) < 0.15
    assert abs((error * moved).mean() / (moved**2).mean()) < 0.02  # neither longer nor shorter
    adam = state[1].inner[0]
    assert (adam.mu['gate'].values.dtype, adam.nu['gate'].values.dtype) == (
        'float8_e4m3fn', 'float8_e5m2'
    )  # fmt: skip
    assert adam.nu['scale'].dtype == 'float32'


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


def test_the_compiled_update_takes_fewer_bytes():
    """Its arguments: two moments of every parameter, in two bytes or one instead of four."""
    params, sizes = {'gate': jnp.ones((64, 256)), 'down': jnp.ones((256, 64))}, {}
    for moments in ('', 'bfloat16', 'float8'):
        optimizer, _ = adamw(learning_rate=1e-2, steps=10, moments=moments)
        state = TrainState(jnp.int32(0), params, optimizer.init(params), jnp.int32(0))
        step = jax.jit(functools.partial(apply_gradient, optimizer))
        compiled = step.lower(state, params, jnp.bool(True)).compile()
        sizes[moments] = compiled.memory_analysis().argument_size_in_bytes
    count = sum(x.size for x in jax.tree.leaves(params))
    assert sizes[''] - sizes['bfloat16'] == pytest.approx(4 * count, abs=64)
    scales = 2 * 2 * (64 + 256)
    assert sizes[''] - sizes['float8'] == pytest.approx(6 * count - scales, abs=64)


@pytest.mark.slow
def test_float8_on_a_mesh():
    """Values lie where their parameters do, also after an update, which sends maxima alone."""
    mesh = sharding.make_mesh(fsdp=4, tensor=2)
    optimizer, _ = adamw(learning_rate=1e-2, steps=10, moments='float8', clip_norm=0)
    rng = np.random.default_rng(0)
    shapes = {'gate': (2, 64, 96), 'down': (2, 96, 64), 'query': (2, 64, 6, 16)}
    params = {name: np.float32(rng.standard_normal(shape)) for name, shape in shapes.items()}
    state = optimizer.init(params)
    where = [sharding.shardings(tree, mesh) for tree in (params, state, params)]
    assert where[1][1].inner[0].nu['gate'].values.spec == where[0]['gate'].spec
    assert where[1][1].inner[0].nu['gate'].scale.spec[1] == ('groups', 'completions')
    update = jax.jit(optimizer.update, in_shardings=where, out_shardings=(where[0], where[1]))
    sent = collectives.collectives(update.lower(params, state, params).compile().as_text())
    assert {kind for kind, *_ in sent} == {'all-reduce'}
    assert all(np.prod(sizes) <= 2 * 64 * 16 for _, sizes, _ in sent)
    placed = jax.device_put((params, state, params), tuple(where))
    meshed, alone = update(*placed), jax.jit(optimizer.update)(params, state, params)
    for ours, theirs in zip(jax.tree.leaves(meshed), jax.tree.leaves(alone), strict=True):
        assert (np.float32(ours) != np.float32(theirs)).mean() < 0.01


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
