"""AdamW, its schedule and its clip against the update rule written out."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny

from grpo_jax.algorithm.optimizer import adamw, make_optimizer


def adamw_by_hand(params, gradients, rates, *, b1, b2, eps, weight_decay, clip_norm):
    """Loshchilov and Hutter (1711.05101), algorithm 2, after a clip of the global norm."""
    params = {name: np.array(p, np.float64) for name, p in params.items()}
    first = {name: 0.0 for name in params}
    second = dict(first)
    for t, (gradient, rate) in enumerate(zip(gradients, rates, strict=True), start=1):
        norm = np.sqrt(sum((g**2).sum() for g in gradient.values()))
        for name, g in gradient.items():
            g = g * min(1, clip_norm / norm) if clip_norm else g
            first[name] = b1 * first[name] + (1 - b1) * g
            second[name] = b2 * second[name] + (1 - b2) * g**2
            change = first[name] / (1 - b1**t) / (np.sqrt(second[name] / (1 - b2**t)) + eps)
            if not name.endswith(('scale', 'bias')):
                change = change + weight_decay * params[name]
            params[name] = params[name] - rate * change
    return params


ADAMW = {'b1': 0.9, 'b2': 0.999, 'eps': 1e-8, 'weight_decay': 0.0, 'clip_norm': 1.0}


@pytest.mark.parametrize(
    'change',
    [
        {},
        {'b1': 0.5},
        {'b2': 0.9},
        {'eps': 0.1},
        {'weight_decay': 0.3},
        {'clip_norm': 0.2},
        {'clip_norm': 0},
    ],
    ids=str,
)
def test_adamw(change):
    """Its defaults are ADAMW; every option counts, and weight decay leaves vectors alone."""
    rng = np.random.default_rng(0)
    shapes = {'gate': (3, 4), 'scale': (4,), 'query_bias': (2, 2)}

    def random():
        return {name: rng.standard_normal(shape) for name, shape in shapes.items()}

    start, gradients = random(), [random() for _ in range(3)]
    gradients[2] = jax.tree.map(lambda g: g / 100, gradients[2])  # below every clip norm
    optimizer, _ = adamw(learning_rate=0.1, steps=3, **change)
    params = jax.tree.map(jnp.float32, start)
    state = optimizer.init(params)
    for gradient in gradients:
        updates, state = optimizer.update(jax.tree.map(jnp.float32, gradient), state, params)
        params = optax.apply_updates(params, updates)
    expected = adamw_by_hand(start, gradients, [0.1] * 3, **(ADAMW | change))
    assert tiny.gap(params, expected) <= 1e-5
    if change:
        assert tiny.gap(expected, adamw_by_hand(start, gradients, [0.1] * 3, **ADAMW)) > 1e-3


@pytest.mark.parametrize(
    ('options', 'expected'),
    [
        ({}, [4, 4, 4, 4, 4, 4]),
        ({'warmup_steps': 3}, [1, 2, 3, 4, 4, 4]),
        ({'decay': 'linear'}, [4, 4 * 5 / 6, 4 * 4 / 6, 2, 4 * 2 / 6, 4 / 6]),
        ({'warmup_steps': 2, 'decay': 'linear'}, [4 / 3, 8 / 3, 4, 3, 2, 1]),
        ({'warmup_steps': 1, 'hold_steps': 2, 'decay': 'linear'}, [2, 4, 4, 4, 8 / 3, 4 / 3]),
        ({'warmup_steps': 2, 'decay': 'cosine'}, [4 / 3, 8 / 3, 4, 2 + 2**0.5, 2, 2 - 2**0.5]),
    ],
)
def test_learning_rates(options, expected):
    """Six updates, peak 4; the first already moves, the decay would reach 0 at the seventh."""
    optimizer, schedule = adamw(learning_rate=4.0, steps=6, eps=0.0, **options)
    np.testing.assert_allclose([schedule(i) for i in range(6)], expected, rtol=1e-5)
    params = {'gate': jnp.zeros(())}
    state = optimizer.init(params)
    for rate in expected:  # Adam moves by the rate itself where all gradients are equal
        updates, state = optimizer.update({'gate': jnp.ones(())}, state, params)
        assert updates['gate'] == pytest.approx(-rate, rel=1e-4)


@pytest.mark.parametrize(
    ('options', 'message'),
    [
        ({'decay': 'step'}, r"decay='step' is unknown: use one of constant, linear, cosine"),
        ({'warmup_steps': 2, 'hold_steps': 9}, r'=9 add up to more than steps=10: shorten'),
        ({'warmup_steps': 11}, r'warmup_steps=11 and hold_steps=0 add up to more than steps=10'),
        ({'warmup_steps': -1}, r'warmup_steps=-1 is out of range: make it at least 0'),
        ({'learning_rate': -0.1}, r'learning_rate=-0.1 is out of range: make it at least 0'),
        ({'learning_rate': np.nan}, r'learning_rate=nan is out of range'),
        ({'clip_norm': -1.0}, r'clip_norm=-1.0 is out of range: make it at least 0$'),
        ({'weight_decay': -0.1}, r'weight_decay=-0.1 is out of range'),
        ({'b1': 2.0}, r'b1=2.0 is out of range: make it at least 0 and below 1'),
        ({'b2': 1.0}, r'b2=1.0 is out of range: make it at least 0 and below 1'),
    ],
)
def test_bad_optimizer(options, message):
    with pytest.raises(ValueError, match=message):
        adamw(**{'learning_rate': 1.0, 'steps': 10, **options})


def updates(optimizer, params, gradient, count=3):
    state, steps = optimizer.init(params), []
    for _ in range(count):
        update, state = optimizer.update(gradient, state, params)
        steps.append(update)
    return steps


@pytest.mark.parametrize('name', ['optax:sgd', 'optax.sgd', optax.sgd])
def test_any_optax_factory(name):
    """With the same clip and schedule; the gradient's norm is 5."""
    optimizer, schedule = make_optimizer(
        name, learning_rate=0.1, steps=8, warmup_steps=3, options={'momentum': 0.5}
    )
    gradient = {'gate': jnp.array([3.0, 4.0])}
    found = updates(optimizer, {'gate': jnp.zeros(2)}, gradient)
    rates = [0.025, 0.05, 0.075]
    np.testing.assert_allclose([schedule(k) for k in range(3)], rates, rtol=1e-6)
    for update, rate, trace in zip(found, rates, (1.0, 1.5, 1.75), strict=True):
        np.testing.assert_allclose(update['gate'], -rate * trace * np.array([0.6, 0.8]), rtol=1e-5)


def test_adamw_by_its_name_is_adamw():
    options = {'learning_rate': 0.1, 'steps': 3, 'b1': 0.5, 'weight_decay': 0.1, 'clip_norm': 0.5}
    params = gradient = {'gate': jnp.array([3.0, 4.0])}
    for optimizer, _ in (make_optimizer(**options), make_optimizer('adamw', **options)):
        assert tiny.same(
            updates(optimizer, params, gradient), updates(adamw(**options)[0], params, gradient)
        )


@pytest.mark.parametrize(
    ('name', 'options', 'message'),
    [
        ('adam', {}, "unknown optimizer 'adam', did you mean 'adamw'"),
        ('optax:adamm', {}, "optimizer 'optax:adamm': optax has no 'adamm', did you mean 'adam'"),
        ('optax:sgd', {'options': {'momentun': 1}}, 'do not fit optax:sgd: .* it takes momentum'),
        ('optax:sgd', {'b1': 0.5}, "b1=0.5 has no effect with name='optax:sgd': use options"),
        ('adamw', {'options': {'b1': 0.5}}, "has no effect with name='adamw': set b1, b2, eps and"),
        ('optax:sgd', {'decay': 'step'}, "decay='step' is unknown"),
        ('optax:sgd', {'clip_norm': -1.0}, 'clip_norm=-1.0 is out of range'),
        (lambda learning_rate: 0, {}, 'returned int: return an optax.GradientTransformation'),
    ],
)
def test_bad_factories(name, options, message):
    with pytest.raises(ValueError, match=message):
        make_optimizer(name, learning_rate=1.0, steps=10, **options)
