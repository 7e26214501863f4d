"""Unrolled layers compute what the scan over layers computes."""

import functools

import jax
import numpy as np
import optax
import pytest
import tiny

from grpo_jax import models, sharding
from grpo_jax.algorithm.checks import check_plan, shape_of
from grpo_jax.algorithm.config import Algorithm
from grpo_jax.algorithm.critic import Critic
from grpo_jax.algorithm.program import init_state, make_train_step
from grpo_jax.algorithm.sample import sample
from grpo_jax.algorithm.update import train_step
from grpo_jax.engine.compute import Compute, choose
from grpo_jax.models import Lora
from grpo_jax.types import Sampling

CASES = {  # options of the model, of the algorithm, and of how it is computed
    'plain': ({}, {}, {}),
    'windows, layers without positions': (
        {'layers': 3, 'window': 3, 'window_layers': (0, 2), 'unrotated_layers': (1,)},
        {},
        {'microbatch': 2},
    ),
    'adapters, recomputed': (
        {'lora': Lora(rank=2, targets=('q_proj', 'down_proj')), 'remat': True},
        {},
        {},
    ),
    'packed, with a critic': (
        {},
        {'baseline': 'critic', 'scale': 'none', 'inner_updates': 2},
        {'packed': True, 'rows': 2, 'widths': 1, 'microbatch': 2},
    ),
}  # fmt: skip


def test_stacking_undoes_unstacking():
    params = tiny.make_params(tiny.make_model(layers=3))
    layers = models.unstack_layers(params)
    assert sorted(set(layers) - set(params)) == ['layers_0', 'layers_1', 'layers_2']
    np.testing.assert_array_equal(layers['layers_1']['gate'], params['blocks']['gate'][1])
    stacked = models.stack_layers(layers)
    assert jax.tree.structure(stacked) == jax.tree.structure(params)
    assert tiny.same(stacked, params)
    assert models.stack_layers(models.unstack_layers(None)) is None


def test_recomputation_survives_compilation(rollout):
    """Without a scan the compiler could merge the two computations into one."""

    def flops(remat):
        model = tiny.make_model(layers=3, remat=remat, attention='einsum').clone(unrolled=True)
        params = models.unstack_layers(tiny.make_params(tiny.make_model(layers=3)))

        def loss(params):
            prompts = rollout.prompts
            arguments = prompts.tokens, prompts.length, rollout.tokens
            return models.completion_hidden(model, params, *arguments).sum()

        return jax.jit(jax.grad(loss)).lower(params).compile().cost_analysis()['flops']

    assert 1.1 < flops(True) / flops(False) < 4 / 3


@pytest.mark.parametrize('weights', tiny.some_slow(['model', 'int8'], 'int8'))
@pytest.mark.parametrize('layers', tiny.some_slow([1, 2], 1))
def test_a_rollout_is_the_same(layers, weights, rollout):
    model = tiny.make_model(layers=layers)
    scanned, unrolled = (
        sample(
            model, tiny.make_params(model), rollout.prompts, seed=0, step=0, sampling=Sampling(),
            eos_ids=np.array([3, 11, 40]), group_size=3, max_tokens=6, block=2, weights=weights,
            unroll=unroll,
        )
        for unroll in (False, True)
    )  # fmt: skip
    np.testing.assert_array_equal(unrolled.tokens, scanned.tokens)
    np.testing.assert_allclose(unrolled.logprobs, scanned.logprobs, atol=1e-5)


@pytest.mark.parametrize(
    'name',
    tiny.some_slow(list(CASES), *list(CASES)[1:]),
)
def test_an_update_is_the_same(name, rollout, rewards):
    options, algorithm, compute = CASES[name]
    algorithm = Algorithm(beta=0.3, **algorithm)
    model = tiny.make_model(**options)
    params, reference = tiny.make_params(model), tiny.make_params(model, seed=1)
    if model.config.lora.rank:
        reference, params = models.split_adapters(params)
    critic = values = None
    if algorithm.has_critic:
        critic = Critic(tiny.make_model(scalar_head=True), optax.sgd(0.1))
        values = tiny.make_params(critic.model)
    states, metrics = [], []
    for unroll in (False, True):
        step = tiny.jit(
            functools.partial(
                train_step, model=model, optimizer=optax.sgd(0.1), critic_model=critic,
                compute=Compute(unroll=unroll, **({'microbatch': 1} | compute)),
            )
        )  # fmt: skip
        start = init_state(model, optax.sgd(0.1), params, critic=critic, value_params=values)
        state, scalars = step(start, reference, rollout, rewards, Sampling(), algorithm)
        states.append(state)
        metrics.append(scalars)
    assert jax.tree.structure(states[1]) == jax.tree.structure(states[0])
    assert tiny.gap(states[0].params, params) > 1e-3
    assert tiny.gap(states[1], states[0]) < 1e-5
    for key, value in metrics[0].items():
        np.testing.assert_allclose(metrics[1][key], value, rtol=1e-4, atol=1e-5, err_msg=key)


@pytest.mark.slow
def test_an_update_on_a_mesh(model, params, rollout, rewards):
    """The new state has the layout of that of a scan."""
    mesh = sharding.make_mesh(fsdp=2, tensor=2)
    optimizer, states = optax.sgd(0.1), []
    for on, unroll in ((None, False), (mesh, True)):
        compute = Compute(microbatch=2, unroll=unroll)
        step = make_train_step(model, optimizer, Algorithm(beta=0.3), on, compute=compute)
        start = init_state(model, optimizer, params, on)
        inputs = (params, rollout, rewards)
        if on is not None:
            placed = jax.device_put(params, sharding.shardings(params, mesh))
            inputs = (placed, *sharding.put_groups((rollout, rewards), mesh))
        states.append(step(start, *inputs, Sampling())[0])
    assert tiny.gap(states[0].params, params) > 1e-5
    assert tiny.gap(states[1], states[0]) < 1e-5
    expected = sharding.shardings(states[1].params, mesh)
    actual = jax.tree.map(lambda x: x.sharding, states[1].params)
    assert jax.tree.leaves(actual) == jax.tree.leaves(expected)


def test_a_trust_region_scans(model, rollout):
    algorithm = Algorithm(loss='surrogate', step='trust_region')
    plan = choose(Compute(unroll=True), model.config, shape_of(rollout))
    with pytest.raises(ValueError, match=r"unroll=True with step='trust_region'.*unroll=False"):
        check_plan(algorithm, plan, rollout, None)
