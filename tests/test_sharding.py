"""The table of layouts, meshes, and that no number depends on them: on eight virtual devices."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny
from jax.sharding import PartitionSpec

from grpo_jax import sharding
from grpo_jax.algorithm.config import Algorithm
from grpo_jax.algorithm.optimizer import adamw
from grpo_jax.algorithm.program import init_state, make_train_step
from grpo_jax.algorithm.sample import sample
from grpo_jax.algorithm.update import train_step
from grpo_jax.engine.compute import Compute
from grpo_jax.models import Lora
from grpo_jax.types import Sampling, TrainState

pytestmark = pytest.mark.skipif(jax.device_count() < 8, reason='needs eight devices')

SLOW = pytest.mark.slow
MESHES = [pytest.param((8, 1), marks=SLOW), (4, 2), pytest.param((2, 4), marks=SLOW)]
# Sizes that every mesh divides, but for the 2 key/value heads and a tensor axis of 4.
MODEL = tiny.make_model(vocab_size=72, attention_bias=True, tied_head=False)
ROLLOUT = tiny.make_rollout(vocab=72, groups=8)
REWARDS = tiny.make_rewards(groups=8)
ALGORITHM = Algorithm()


def mesh_of(shape):
    return sharding.make_mesh(fsdp=shape[0], tensor=shape[1])


# The table


def test_every_parameter_is_in_the_table_or_replicated_on_purpose():
    options = {
        'tied_head': False,
        'qk_norm': 'head',
        'attention_bias': True,
        'out_bias': True,
    }
    dense = tiny.make_model(**options, mlp_bias=True, lora=Lora(rank=2))
    routed = tiny.make_model(**options, experts=3, experts_per_token=2)
    names = {
        path[-1].key
        for model in (dense, routed, tiny.make_model(scalar_head=True))
        for path, _ in jax.tree_util.tree_leaves_with_path(tiny.shapes(model))
    }
    assert names - set(sharding.TABLE) == {'scale'}
    assert set(sharding.TABLE) <= names


def test_specs_by_hand():
    params = tiny.shapes(MODEL)
    specs = jax.tree.map(lambda s: s.spec, sharding.shardings(params, mesh_of((2, 2))))
    spec, block = PartitionSpec, specs['blocks']
    assert specs['embedding'] == spec('tensor', 'fsdp')
    assert specs['head'] == spec('fsdp', 'tensor')
    assert block['query'] == block['key'] == block['value'] == spec(None, 'fsdp', 'tensor', None)
    assert block['key_bias'] == spec(None, 'tensor', None)
    assert block['out'] == spec(None, 'tensor', None, 'fsdp')
    assert block['gate'] == block['up'] == spec(None, 'fsdp', 'tensor')
    assert block['down'] == spec(None, 'tensor', 'fsdp')
    assert not any([*block['attention_norm']['scale'], *specs['final_norm']['scale']])


def test_what_does_not_divide_stays_whole():
    """Two key/value heads over a tensor axis of four; a vocabulary of 67 over anything."""
    model = tiny.make_model(vocab_size=67)
    specs = jax.tree.map(lambda s: s.spec, sharding.shardings(tiny.shapes(model), mesh_of((2, 4))))
    assert specs['blocks']['key'] == PartitionSpec(None, 'fsdp', None, None)
    assert specs['blocks']['query'] == PartitionSpec(None, 'fsdp', 'tensor', None)
    assert specs['embedding'] == PartitionSpec(None, 'fsdp')


def test_moments_are_laid_out_like_their_parameters():
    optimizer, _ = adamw(learning_rate=1e-3, steps=10)
    state = init_state(MODEL, optimizer, tiny.make_params(MODEL), mesh_of((4, 2)))
    wanted = jax.tree.map(lambda x: x.sharding, state.params)
    adam = next(s for s in jax.tree.leaves(state.opt_state, is_leaf=is_adam) if is_adam(s))
    for moments in (adam.mu, adam.nu):
        assert jax.tree.map(lambda x: x.sharding, moments) == wanted
    assert adam.count.sharding.is_fully_replicated
    embedding = state.params['embedding']
    assert {shard.data.shape for shard in embedding.addressable_shards} == {(72 // 2, 16 // 4)}


def is_adam(x):
    return isinstance(x, optax.ScaleByAdamState)


def test_groups_are_spread_over_fsdp():
    placed = sharding.put_groups(ROLLOUT, mesh_of((4, 2)))
    assert tiny.same(placed, ROLLOUT)
    for leaf in jax.tree.leaves(placed):
        assert {shard.data.shape[0] for shard in leaf.addressable_shards} == {2}


# Meshes


def test_make_mesh():
    assert dict(sharding.make_mesh().shape) == {'fsdp': 1, 'tensor': 1}
    assert dict(sharding.make_mesh(fsdp=-1).shape) == {'fsdp': 8, 'tensor': 1}
    assert dict(sharding.make_mesh(fsdp=-1, tensor=4).shape) == {'fsdp': 2, 'tensor': 4}
    assert dict(sharding.make_mesh(fsdp=3, tensor=2).shape) == {'fsdp': 3, 'tensor': 2}


@pytest.mark.parametrize(
    ('sizes', 'message'),
    [
        ({'fsdp': 0}, r'mesh fsdp=0, tensor=1: make each at least 1'),
        ({'fsdp': -2}, r'mesh fsdp=-2, tensor=1: make each at least 1'),
        ({'tensor': 0}, r'mesh fsdp=1, tensor=0: make each at least 1'),
        (
            {'fsdp': 16},
            r'fsdp=16 x tensor=1 needs 16 devices, but JAX sees 8: make the mesh smaller',
        ),
        ({'fsdp': 3, 'tensor': 3}, r'fsdp=3 x tensor=3 needs 9 devices, but JAX sees 8'),
        ({'fsdp': -1, 'tensor': 9}, r'tensor=9 needs 9 devices, but JAX sees 8'),
    ],
)
def test_a_mesh_that_does_not_fit(sizes, message):
    with pytest.raises(ValueError, match=message):
        sharding.make_mesh(**sizes)


@pytest.mark.parametrize(
    ('batch', 'microbatch', 'fsdp', 'message'),
    [
        (6, 4, None, r'microbatch=4 .*batch of 6 prompts.*use one of 1, 2, 3, 6$'),
        (6, 12, None, r'microbatch=12 .*use one of 1, 2, 3, 6$'),
        (6, 2, 4, r'batch of 6 prompts does not divide over mesh fsdp=4: use 4, 8 prompts'),
        (2, 2, 4, r'batch of 2 prompts does not divide over mesh fsdp=4: use 4 prompts'),
        (16, 2, 4, r'microbatch=2 .*over fsdp=4 .*use one of 4, 8, 16$'),
        (24, 16, 4, r'microbatch=16 .*use one of 4, 8, 12, 24$'),
    ],
)
def test_a_batch_that_does_not_divide(batch, microbatch, fsdp, message):
    mesh = None if fsdp is None else mesh_of((fsdp, 1))
    with pytest.raises(ValueError, match=message):
        sharding.check_batch(batch, microbatch, mesh)


def test_batches_that_divide():
    for batch, microbatch, shape in (
        (6, 3, (1, 1)),
        (16, 4, (4, 2)),
        (16, 16, (8, 1)),
        (8, 8, (2, 4)),
    ):
        sharding.check_batch(batch, microbatch, mesh_of(shape))


def test_the_update_checks_its_batch_against_the_mesh():
    compute = Compute(microbatch=2)
    step = make_train_step(MODEL, optax.sgd(1.0), ALGORITHM, mesh_of((4, 2)), compute=compute)
    state = init_state(MODEL, optax.sgd(1.0), tiny.make_params(MODEL), mesh_of((4, 2)))
    with pytest.raises(ValueError, match=r'microbatch=2 .*over fsdp=4 .*use one of 4, 8\b'):
        step(state, None, ROLLOUT, REWARDS, Sampling(), ALGORITHM)


# The same numbers on every mesh


RECORDER = optax.sgd(1.0, momentum=0.0)  # its trace is the gradient


@functools.cache
def alone():
    """Gradient, metrics and samples on one device."""
    params = tiny.make_params(MODEL)
    settings = {'model': MODEL, 'optimizer': RECORDER, 'compute': Compute(microbatch=1)}
    step = tiny.jit(functools.partial(train_step, **settings))
    state = TrainState(jnp.int32(0), params, RECORDER.init(params), jnp.int32(0))
    state, metrics = step(state, None, ROLLOUT, REWARDS, Sampling(), ALGORITHM)
    return jax.device_get((state.opt_state[0].trace, metrics, draw(params, ROLLOUT.prompts)))


def draw(params, prompts):
    return sample(
        MODEL,
        params,
        prompts,
        seed=0,
        step=0,
        sampling=Sampling(),
        eos_ids=np.arange(6),
        group_size=3,
        max_tokens=6,
    )


@functools.cache
def ten_steps(shape):
    """On a mesh: the first step's gradient and metrics, the last state, and the program."""
    mesh = mesh_of(shape)
    state = init_state(MODEL, RECORDER, tiny.make_params(MODEL), mesh)
    layout = jax.tree.map(lambda x: x.sharding, state)
    batch = sharding.put_groups((ROLLOUT, REWARDS), mesh)
    step = make_train_step(MODEL, RECORDER, ALGORITHM, mesh, compute=Compute(microbatch=8))
    program = step.lower(state, None, *batch, Sampling(), ALGORITHM).compile()
    first = None
    for i in range(10):
        sampling = Sampling(1 - 0.01 * i, top_k=60 * i)
        bounds = {'clip_low': 0.2 + 0.01 * i, 'clip_high': 0.2 + 0.02 * i}
        algorithm = dataclasses.replace(ALGORITHM, **bounds)
        state, metrics = step(state, None, *batch, sampling, algorithm)
        first = first or jax.device_get((state.opt_state[0].trace, metrics))
        assert jax.tree.map(lambda x: x.sharding, state) == layout
    assert step._cache_size() == 1
    assert int(state.step) == 10
    return *first, program.as_text()


@pytest.mark.parametrize('shape', MESHES, ids=str)
def test_ten_steps_on_a_mesh(shape):
    """They compile once, keep the layout of all arrays, and give one device's gradient."""
    expected, expected_metrics, _ = alone()
    gradient, metrics, _ = ten_steps(shape)
    gap = tiny.gap(gradient, expected)
    print(f'mesh {shape}: gradient differs by {gap:.1e}')
    assert tiny.largest(expected) > 0.05
    assert gap <= 1e-5
    for name, value in expected_metrics.items():
        assert metrics[name] == pytest.approx(value, abs=1e-5, rel=1e-5), name


def test_samples_on_a_mesh():
    expected = alone()[2]
    mesh = mesh_of((4, 2))
    params = tiny.make_params(MODEL)
    params = jax.device_put(params, sharding.shardings(params, mesh))
    ours = draw(params, sharding.put_groups(ROLLOUT.prompts, mesh))
    np.testing.assert_array_equal(ours.tokens, expected.tokens)
    np.testing.assert_array_equal(ours.mask, expected.mask)
    np.testing.assert_allclose(ours.logprobs, expected.logprobs, atol=1e-5)


def test_fsdp_moves_parameters_and_no_activations():
    """On 8 x 1 no device holds another's hidden states or logits [8 groups, rows, tokens, .]."""
    collective = r'= (.*) (?:all-gather|all-reduce|reduce-scatter)(?:-start)?\('
    moved = re.findall(collective, ten_steps((8, 1))[2])
    shapes = {
        tuple(map(int, dims.split(',')))
        for result in moved
        for dims in re.findall(r'f32\[([\d,]+)\]', result)
    }
    assert shapes
    assert not {shape for shape in shapes if len(shape) >= 4 and shape[0] == 8}
