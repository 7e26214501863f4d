"""Gradient and step of an update in dtypes of two bytes, and with all terms of the loss."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny

from grpo_jax import sharding
from grpo_jax.algorithm.config import Algorithm
from grpo_jax.algorithm.optimizer import adamw, apply_gradient
from grpo_jax.algorithm.program import MOMENTS, init_state, make_train_step
from grpo_jax.engine.compute import Compute
from grpo_jax.models import ModelConfig
from grpo_jax.types import Sampling, TrainState

COMPUTE = Compute(microbatch=2)

# Moments in the host's memory


def memory_kinds(tree):
    return {x.sharding.memory_kind for x in jax.tree.leaves(tree) if x.ndim}


def test_an_optimizer_with_moments_in_the_hosts_memory():
    """Two updates in a loop: the same numbers, and the moments are back in the end."""
    mesh, ends = sharding.make_mesh(), []
    optimizer, _ = adamw(learning_rate=1e-2, steps=10)
    params = {'gate': jnp.ones((4, 8)), 'scale': jnp.ones(8)}

    def make(params):
        return TrainState(jnp.int32(0), params, optimizer.init(params), jnp.int32(0))

    def update(state, _):
        gradient = jax.tree.map(lambda x: x / 3, state.params)
        return apply_gradient(optimizer, state, gradient, jnp.bool(True))[0], None

    for host in ((), MOMENTS):
        where = sharding.shardings(jax.eval_shape(make, params), mesh, host=host)
        state = jax.jit(make, out_shardings=where)(params)
        kinds = memory_kinds(state.opt_state)
        assert kinds == {'pinned_host' if host else 'device'}
        step = jax.jit(lambda state: jax.lax.scan(update, state, length=2)[0], out_shardings=where)
        state = step(state)
        assert (memory_kinds(state.opt_state), memory_kinds(state.params)) == (kinds, {'device'})
        ends.append(jax.device_get(state))
    assert tiny.same(*ends)


@pytest.mark.slow
@pytest.mark.parametrize('inner_updates', [1, 2])
def test_a_step_with_moments_in_the_hosts_memory(inner_updates, params, model, rollout, rewards):
    mesh = sharding.make_mesh(fsdp=2)
    optimizer, _ = adamw(learning_rate=1e-2, steps=10)
    arrays, ends = sharding.put_rollout(rollout, rewards, mesh), []
    algorithm = Algorithm(kl='none', inner_updates=inner_updates)
    for offload in (False, True):
        state = init_state(model, optimizer, params, mesh, offload_moments=offload)
        step = make_train_step(
            model, optimizer, algorithm, mesh, compute=COMPUTE, offload_moments=offload
        )
        for _ in range(2):
            state, _ = step(state, None, *arrays)
        assert memory_kinds(state.opt_state) == {'pinned_host' if offload else 'device'}
        assert memory_kinds(state.params) == {'device'}
        assert step._cache_size() == 1
        ends.append(jax.device_get(state))
    assert tiny.same(*ends)


def test_what_lies_in_the_hosts_memory_stays_there():
    """As when a checkpoint is read into the place of a state."""
    mesh = sharding.make_mesh()
    tree = {'gate': np.ones((2, 2), np.float32), 'count': np.int32(0)}
    host = jax.device_put(tree, sharding.replicated(mesh).with_memory_kind('pinned_host'))
    where = sharding.shardings(host, mesh)
    assert (where['gate'].memory_kind, where['count'].memory_kind) == ('pinned_host', 'device')
    assert sharding.shardings(tree, mesh)['gate'].memory_kind == 'device'


def test_moments_are_copied_only_where_the_update_is_made():
    """Outside of the branch, a compiler copies them before the backward pass, and keeps them."""
    optimizer, _ = adamw(learning_rate=0.1, steps=3)
    params = {'w': jnp.ones(3)}
    where = sharding.replicated(sharding.make_mesh(fsdp=1)).with_memory_kind('pinned_host')
    moments = jax.tree.map(
        lambda x: jax.device_put(x, where) if x.ndim else x, optimizer.init(params)
    )
    state = TrainState(jnp.int32(0), params, moments, jnp.int32(0))
    program = jax.make_jaxpr(apply_gradient, static_argnums=0)(optimizer, state, params, True)
    (branch,) = [x.params['branches'][1] for x in program.eqns if x.primitive.name == 'cond']
    assert not [x for x in program.eqns if x.primitive.name == 'device_put']
    assert str(branch).count('device_put') == 4  # two moments there, and back


def test_devices_that_cannot_read_the_hosts_memory(monkeypatch):
    with pytest.raises(ValueError, match='offload_moments=True needs a mesh: pass one'):
        make_train_step(tiny.Bigram(), optax.sgd(0.1), Algorithm(), offload_moments=True)
    mesh = sharding.make_mesh()
    monkeypatch.setattr(sharding.parameters, 'HOST', 'unknown_host')
    message = r"no memory of kind 'unknown_host' \(they have device.*optimizer.moments='bfloat16'"
    with pytest.raises(ValueError, match=message):
        init_state(
            tiny.Bigram(), optax.sgd(0.1), jax.random.key(0), mesh, offload_moments=True
        )  # fmt: skip


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
