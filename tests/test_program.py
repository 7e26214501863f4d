"""Gradient and step of an update in dtypes of two bytes, and with all terms of the loss."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny

from grpo_jax.algorithm.config import Algorithm
from grpo_jax.algorithm.program import init_state, make_train_step
from grpo_jax.engine.compute import Compute
from grpo_jax.models import ModelConfig
from grpo_jax.types import Sampling

COMPUTE = Compute(microbatch=2)

# The trust region's step


def run_update(params, rollout, rewards, **options):
    model, optimizer = tiny.Bigram(), optax.identity()
    algorithm = Algorithm(loss='surrogate', step='trust_region', kl='none', cg_steps=3, **options)
    state = init_state(model, optimizer, params)
    step = make_train_step(model, optimizer, algorithm, compute=COMPUTE)
    state, metrics = step(state, None, rollout, rewards)
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
    after, found = run_update(before, rollout, rewards, max_kl=0.1)
    expected, _ = run_update(exact, rollout, rewards, max_kl=0.1)
    assert found['trust_region/accepted'] == 1
    assert 0 < found['trust_region/kl_step'] <= 0.1
    assert {x.dtype for x in jax.tree.leaves(after)} == {jnp.dtype(dtype)}
    moved, should = difference(after, before), difference(expected, exact)
    assert moved @ should > 0.98 * np.linalg.norm(moved) * np.linalg.norm(should)


def test_the_search_knows_of_the_entropy_bonus(rollout, rewards):
    """With equal rewards it is all there is to gain."""
    params, same = tiny.Bigram().make_params(), np.ones_like(rewards)
    for bonus in (0.0, 0.1):
        options = {'entropy_bonus': bonus, 'entropy': True}
        after, found = run_update(params, rollout, same, **options)
        assert found['trust_region/accepted'] == (bonus > 0)
    _, again = run_update(after, rollout, same, **options)
    assert again['entropy'] > found['entropy']


# The gradient


class Half(tiny.Bigram):
    config: ModelConfig = dataclasses.replace(tiny.Bigram.config, dtype='float16')


def test_slopes_of_many_tokens_are_not_too_small_for_float16():
    """A thousandth of the reward stands for a thousand times the tokens."""
    rollout = tiny.make_rollout(max_tokens=700)
    rewards = 1e-3 * tiny.make_rewards()
    optimizer = optax.trace(0.0)
    algorithm = Algorithm(baseline='none', scale='none', kl='none')

    def gradient(model):
        step = make_train_step(model, optimizer, algorithm, compute=COMPUTE)
        state = init_state(model, optimizer, model.make_params())
        state, _ = step(state, None, rollout, rewards, Sampling(), algorithm)
        return jax.device_get(state.opt_state.trace)

    found, expected = gradient(Half()), gradient(tiny.Bigram())
    assert tiny.gap(found, expected) < 0.005 * tiny.largest(expected)
