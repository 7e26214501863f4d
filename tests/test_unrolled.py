"""Layers by themselves compute what the scan over them computes."""

import functools

import jax
import numpy as np
import optax
import pytest
import tiny

from grpo_jax import models, sharding
from grpo_jax.algorithm import Algorithm
from grpo_jax.models import Lora
from grpo_jax.sample import sample
from grpo_jax.types import Objective, Sampling
from grpo_jax.update import Critic, init_state, make_step, update

CASES = {
    'plain': ({}, {}),
    'windows, layers without positions': (
        {'layers': 3, 'window': 3, 'window_layers': (0, 2), 'unrotated_layers': (1,)},
        {'microbatch': 2},
    ),
    'adapters, recomputed': (
        {'lora': Lora(rank=2, targets=('q_proj', 'down_proj')), 'remat': True},
        {},
    ),
    'packed, with a critic': (
        {},
        {
            'baseline': 'critic', 'scale': 'none', 'packed': True, 'rows': 2, 'widths': 1,
            'microbatch': 2, 'inner_updates': 2,
        },
    ),
}  # fmt: skip


def test_layers_come_back_to_their_stack():
    params = tiny.make_params(tiny.make_model(layers=3))
    apart = models.unstacked(params)
    assert sorted(set(apart) - set(params)) == ['layers_0', 'layers_1', 'layers_2']
    np.testing.assert_array_equal(apart['layers_1']['gate'], params['blocks']['gate'][1])
    together = models.stacked(apart)
    assert jax.tree.structure(together) == jax.tree.structure(params)
    assert tiny.same(together, params)
    assert models.stacked(models.unstacked(None)) is None


def test_what_is_recomputed_stays_so(rollout):
    """Also once compiled: without a scan the two computations could be merged into one."""

    def flops(remat):
        model = tiny.make_model(layers=3, remat=remat, attention='einsum').clone(unrolled=True)
        params = models.unstacked(tiny.make_params(tiny.make_model(layers=3)))

        def loss(params):
            prompts = rollout.prompts
            arguments = prompts.tokens, prompts.length, rollout.tokens
            return models.completion_hidden(model, params, *arguments).sum()

        return jax.jit(jax.grad(loss)).lower(params).compile().cost_analysis()['flops']

    assert 1.1 < flops(True) / flops(False) < 4 / 3


@pytest.mark.parametrize('weights', ['model', 'int8'])
@pytest.mark.parametrize('layers', [1, 2])
def test_a_rollout_is_the_same(layers, weights, rollout):
    model = tiny.make_model(layers=layers)
    drawn, found = (
        sample(
            model, tiny.make_params(model), rollout.prompts, seed=0, step=0, sampling=Sampling(),
            eos_ids=np.array([3, 11, 40]), group_size=3, max_tokens=6, block=2, weights=weights,
            unroll=unroll,
        )
        for unroll in (False, True)
    )  # fmt: skip
    np.testing.assert_array_equal(found.tokens, drawn.tokens)
    np.testing.assert_allclose(found.logprobs, drawn.logprobs, atol=1e-5)


@pytest.mark.parametrize('name', CASES)
def test_an_update_is_the_same(name, rollout, rewards):
    options, algorithm = CASES[name]
    model = tiny.make_model(**options)
    params, reference = tiny.make_params(model), tiny.make_params(model, seed=1)
    if model.config.lora.rank:
        reference, params = models.split(params)
    critic = values = None
    if 'baseline' in algorithm:
        critic = Critic(tiny.make_model(scalar_head=True), optax.sgd(0.1))
        values = tiny.make_params(critic.model)
    states, metrics = [], []
    for unroll in (False, True):
        step = tiny.jit(
            functools.partial(
                update, model=model, optimizer=optax.sgd(0.1), critic=critic,
                algorithm=Algorithm(unroll=unroll, **algorithm),
            )
        )  # fmt: skip
        start = init_state(model, optax.sgd(0.1), params, critic=critic, value_params=values)
        state, found = step(start, reference, rollout, rewards, Sampling(), Objective(beta=0.3))
        states.append(state)
        metrics.append(found)
    assert jax.tree.structure(states[1]) == jax.tree.structure(states[0])
    assert tiny.gap(states[0].params, params) > 1e-3
    assert tiny.gap(states[1], states[0]) < 1e-5
    for key, value in metrics[0].items():
        np.testing.assert_allclose(metrics[1][key], value, rtol=1e-4, atol=1e-5, err_msg=key)


def test_an_update_on_a_mesh(model, params, rollout, rewards):
    """The new state lies as that of a scan does."""
    mesh = sharding.make_mesh(fsdp=2, tensor=2)
    optimizer, states = optax.sgd(0.1), []
    for where, unroll in ((None, False), (mesh, True)):
        step = make_step(model, optimizer, Algorithm(microbatch=2, unroll=unroll), where)
        start = init_state(model, optimizer, params, where)
        given = (params, rollout, rewards)
        if where is not None:
            lying = jax.device_put(params, sharding.shardings(params, mesh))
            given = (lying, *sharding.put_groups((rollout, rewards), mesh))
        states.append(step(start, *given, Sampling(), Objective(beta=0.3))[0])
    assert tiny.gap(states[0].params, params) > 1e-5
    assert tiny.gap(states[1], states[0]) < 1e-5
    expected = sharding.shardings(states[1].params, mesh)
    found = jax.tree.map(lambda x: x.sharding, states[1].params)
    assert jax.tree.leaves(found) == jax.tree.leaves(expected)


def test_a_trust_region_scans():
    with pytest.raises(ValueError, match=r"unroll=True with step='trust_region'.*unroll=False"):
        Algorithm(loss='surrogate', step='trust_region', kl='none', unroll=True)
