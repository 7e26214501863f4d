"""Gradient and step of an update in dtypes of two bytes, and with all terms of the loss."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny

from grpo_jax import update
from grpo_jax.algorithm import Algorithm
from grpo_jax.types import Objective, Sampling

# The trust region's step


def run_update(params, rollout, rewards, objective, **options):
    model, optimizer = tiny.Bigram(), optax.identity()
    algorithm = Algorithm(
        loss='surrogate', step='trust_region', kl='none', microbatch=2, cg_steps=3, **options
    )
    state = update.init_state(model, optimizer, params)
    step = update.make_step(model, optimizer, algorithm)
    state, metrics = step(state, None, rollout, rewards, Sampling(), objective)
    return state.params, {name: float(value) for name, value in metrics.items()}


def difference(a, b):
    return np.concatenate(
        [
            (np.float64(x) - np.float64(y)).ravel()
            for x, y in zip(*map(jax.tree.leaves, (a, b)), strict=True)
        ]
    )


@pytest.mark.parametrize('dtype', ['bfloat16', 'float16'])
def test_parameters_of_two_bytes_are_updated(dtype, rollout, rewards):
    exact = tiny.Bigram().make_params()
    before = jax.tree.map(lambda x: x.astype(dtype), exact)
    objective = Objective(max_kl=0.1)
    after, found = run_update(before, rollout, rewards, objective)
    expected, _ = run_update(exact, rollout, rewards, objective)
    assert found['trust_region/accepted'] == 1
    assert 0 < found['trust_region/kl_step'] <= 0.1
    assert {x.dtype for x in jax.tree.leaves(after)} == {jnp.dtype(dtype)}
    moved, should = difference(after, before), difference(expected, exact)
    assert moved @ should > 0.98 * np.linalg.norm(moved) * np.linalg.norm(should)


def test_the_search_knows_of_the_entropy_bonus(rollout, rewards):
    """With equal rewards it is all there is to gain."""
    params, same = tiny.Bigram().make_params(), np.ones_like(rewards)
    for bonus in (0.0, 0.1):
        objective = Objective(entropy_bonus=bonus)
        after, found = run_update(params, rollout, same, objective, entropy=True)
        assert found['trust_region/accepted'] == (bonus > 0)
    _, again = run_update(after, rollout, same, objective, entropy=True)
    assert again['entropy'] > found['entropy']


# The gradient


class Half(tiny.Bigram):
    config = SimpleNamespace(**(vars(tiny.Bigram.config) | {'dtype': 'float16'}))


def test_slopes_of_many_tokens_are_not_too_small_for_float16():
    """A thousandth of the reward stands for a thousand times the tokens."""
    rollout = tiny.make_rollout(max_tokens=700)
    rewards = 1e-3 * tiny.make_rewards()
    optimizer = optax.trace(0.0)
    algorithm = Algorithm(baseline='none', scale='none', kl='none', microbatch=2)

    def gradient(model):
        step = update.make_step(model, optimizer, algorithm)
        state = update.init_state(model, optimizer, model.make_params())
        state, _ = step(state, None, rollout, rewards, Sampling(), Objective())
        return jax.device_get(state.opt_state.trace)

    found, expected = gradient(Half()), gradient(tiny.Bigram())
    assert tiny.gap(found, expected) < 0.005 * tiny.largest(expected)
