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
DATA = ('groups', 'completions')


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
    assert specs['embedding'] == spec('tensor', DATA)
    assert specs['head'] == spec(DATA, 'tensor')
    assert block['query'] == block['key'] == block['value'] == spec(None, DATA, 'tensor', None)
    assert block['key_bias'] == spec(None, 'tensor', None)
    assert block['out'] == spec(None, 'tensor', None, DATA)
    assert block['gate'] == block['up'] == spec(None, DATA, 'tensor')
    assert block['down'] == spec(None, 'tensor', DATA)
    assert not any([*block['attention_norm']['scale'], *specs['final_norm']['scale']])


def test_what_does_not_divide_stays_whole():
    """Two key/value heads over a tensor axis of four; a vocabulary of 67 over anything."""
    model = tiny.make_model(vocab_size=67)
    specs = jax.tree.map(lambda s: s.spec, sharding.shardings(tiny.shapes(model), mesh_of((2, 4))))
    assert specs['blocks']['key'] == PartitionSpec(None, DATA, None, None)
    assert specs['blocks']['query'] == PartitionSpec(None, DATA, 'tensor', None)
    assert specs['embedding'] == PartitionSpec(None, DATA)


def test_an_axis_that_data_devices_do_not_divide_is_split_as_far_as_it_can():
    """A width of 12 over 4 x 2: over the 4 alone. A width of 6: over the 2. A width of 7: not."""
    mesh = sharding.make_mesh(fsdp=8, completions=2)
    for size, over in ((16, DATA), (12, 'groups'), (6, 'completions'), (7, None)):
        tree = {'head': jax.ShapeDtypeStruct((size, 20), np.float32)}
        assert sharding.shardings(tree, mesh)['head'].spec == PartitionSpec(over, 'tensor')


def test_what_is_not_split_is_listed():
    shapes = tiny.shapes(tiny.make_model(vocab_size=67, width=18, mlp_width=21))
    mesh = sharding.make_mesh(fsdp=2, tensor=4)
    vocabulary, gate, up, down = (
        f'{name} over tensor=4' for name in ('embedding: 67', 'gate: 21', 'up: 21', 'down: 21')
    )
    assert set(sharding.not_split(shapes, mesh)) == {vocabulary, gate, up, down}
    mesh = sharding.make_mesh(fsdp=4)
    assert 'query: 18 over fsdp=4' in sharding.not_split(shapes, mesh)
    assert not sharding.not_split(shapes, sharding.make_mesh(fsdp=2))
    assert not sharding.not_split(tiny.shapes(MODEL), sharding.make_mesh(fsdp=2, tensor=4))


def test_copies_to_sample_with_are_split_over_tensor_alone():
    specs = jax.tree.map(
        lambda s: s.spec, sharding.whole_over_data(tiny.shapes(MODEL), mesh_of((2, 2)))
    )
    assert specs['embedding'] == PartitionSpec('tensor', None)
    assert specs['blocks']['query'] == PartitionSpec(None, None, 'tensor', None)
    assert specs['blocks']['out'] == PartitionSpec(None, 'tensor', None, None)


@pytest.mark.parametrize(
    ('heads', 'kv_heads', 'tensor', 'works'),
    [
        (4, 2, 1, True), (4, 2, 2, True), (4, 2, 4, True), (12, 2, 6, True), (8, 8, 8, True),
        (4, 2, 8, '1, 2, 4'), (6, 2, 3, '1, 2, 6'), (8, 8, 3, '1, 2, 4, 8'), (6, 4, 6, '1, 2'),
    ],
)  # fmt: skip
def test_heads_are_whole(heads, kv_heads, tensor, works):
    """6 query heads of 2 key/value heads over 3 devices: one would read both."""
    mesh = sharding.make_mesh(tensor=tensor)
    if works is True:
        return sharding.check_heads(heads, kv_heads, mesh)
    with pytest.raises(ValueError, match=f'tensor={tensor} does not divide .* one of {works}$'):
        sharding.check_heads(heads, kv_heads, mesh)


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
    def sizes(**options):
        mesh = sharding.make_mesh(**options)
        assert mesh.axis_names == ('groups', 'completions', 'tensor')
        return tuple(mesh.shape.values())

    assert sizes() == (1, 1, 1)
    assert sizes(fsdp=-1) == (8, 1, 1)
    assert sizes(fsdp=-1, tensor=4) == (2, 1, 4)
    assert sizes(fsdp=2, tensor=-1) == (2, 1, 4)
    assert sizes(fsdp=3, tensor=2) == (3, 1, 2)
    assert sizes(fsdp=-1, completions=4) == (2, 4, 1)
    assert sizes(fsdp=6, completions=3) == (2, 3, 1)
    assert sizes(fsdp=-1, devices=jax.devices()[:3]) == (3, 1, 1)


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
        ({'fsdp': -1, 'tensor': -1}, r'mesh fsdp=-1, tensor=-1: only one of them can be -1'),
        ({'fsdp': 9, 'tensor': -1}, r'fsdp=9 x tensor=0 needs 9 devices, but JAX sees 8'),
        (
            {'fsdp': 8, 'completions': 3},
            r'completions=3 does not divide fsdp=8: use one of 1, 2, 4, 8$',
        ),
        ({'completions': 0}, r'completions=0 does not divide fsdp=1: use one of 1$'),
        ({'fsdp': -1, 'completions': -1}, r'completions=-1 does not divide fsdp=8'),
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


@pytest.mark.parametrize(
    ('batch', 'group_size', 'fsdp', 'completions'),
    [
        (8, 8, 8, 1), (16, 4, 8, 1), (2, 8, 8, 4), (1, 8, 8, 8), (6, 4, 8, 4), (4, 64, 256, 64),
        (3, 5, 8, 1), (2, 3, 8, 1), (12, 6, 8, 2),
    ],
)  # fmt: skip
def test_the_fewest_devices_for_a_group_are_chosen(batch, group_size, fsdp, completions):
    assert sharding.choose_completions(fsdp, batch, group_size) == completions


def test_a_batch_of_split_groups():
    mesh = sharding.make_mesh(fsdp=8, completions=4)
    sharding.check_batch(2, 2, mesh, group_size=8)
    sharding.check_batch(16, 8, mesh, group_size=6)  # 4 does not divide 6: groups are whole
    assert sharding.slices_of(2, 8, mesh) == sharding.slices_of(16, 4, mesh) == 4
    assert sharding.slices_of(16, 6, mesh) == sharding.slices_of(8, 1, mesh) == 1
    assert sharding.slices_of(5, 3, None) == 1
    over = r'fsdp=8 \(groups of 8 over completions=4\): use 2, 4 prompts, or mesh completions=8$'
    with pytest.raises(ValueError, match=over):
        sharding.check_batch(3, 3, mesh, group_size=8)
    with pytest.raises(ValueError, match=r'microbatch=1 .* use one of 2, 4$'):
        sharding.check_batch(4, 1, mesh, group_size=8)
    with pytest.raises(ValueError, match=r'batch of 2 prompts .* fsdp=8: use 8 prompts$'):
        sharding.check_batch(2, 2, mesh)  # such as demonstrations
    with pytest.raises(ValueError, match=r'use 8 prompts, or mesh completions=4$'):
        sharding.check_batch(2, 2, sharding.make_mesh(fsdp=8), group_size=8)


def test_slices_of_groups_by_hand():
    """Four groups on 2 x 2 devices: each device's slices are next to each other."""
    mesh = sharding.make_mesh(fsdp=4, completions=2)
    rollout = tiny.make_rollout(groups=4, group_size=6)
    names = np.int32(np.arange(4)[:, None] * 10 + np.arange(6))  # 32: completion 2 of group 3
    tree = rollout.prompts, {'names': names}
    prompts, split = jax.jit(lambda tree: sharding.split_groups(tree, 2, mesh))(tree)
    np.testing.assert_array_equal(
        split['names'],
        [[0, 1, 2], [10, 11, 12], [3, 4, 5], [13, 14, 15],
         [20, 21, 22], [30, 31, 32], [23, 24, 25], [33, 34, 35]],
    )  # fmt: skip
    np.testing.assert_array_equal(prompts.index, rollout.prompts.index[[0, 1, 0, 1, 2, 3, 2, 3]])
    assert {x.data.shape for x in split['names'].addressable_shards} == {(2, 3)}
    joined = jax.jit(lambda tree: sharding.join_groups(tree, 2, mesh))((prompts, split))
    assert tiny.same(joined, tree)
    assert joined[1]['names'].sharding.spec == PartitionSpec('groups', 'completions')


def test_a_rollout_is_placed_by_prompts_and_completions():
    mesh = sharding.make_mesh(fsdp=4, completions=2)
    rollout, rewards = sharding.put_rollout(
        tiny.make_rollout(groups=4, group_size=6), tiny.make_rewards(groups=4, group_size=6), mesh
    )
    for x in (rollout.tokens, rollout.ended, rewards):
        assert x.sharding.spec == PartitionSpec('groups', 'completions')
    for x in rollout.prompts[:3]:  # also of tokens [4, 6]
        assert x.sharding.spec == PartitionSpec('groups')
    whole, _ = sharding.put_rollout(tiny.make_rollout(groups=4, group_size=3), None, mesh)
    assert whole.tokens.sharding.spec == PartitionSpec(DATA)


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


@pytest.mark.slow
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


@pytest.mark.slow
def test_samples_on_a_mesh():
    expected = alone()[2]
    mesh = mesh_of((4, 2))
    params = tiny.make_params(MODEL)
    params = jax.device_put(params, sharding.shardings(params, mesh))
    ours = draw(params, sharding.put_groups(ROLLOUT.prompts, mesh))
    np.testing.assert_array_equal(ours.tokens, expected.tokens)
    np.testing.assert_array_equal(ours.mask, expected.mask)
    np.testing.assert_allclose(ours.logprobs, expected.logprobs, atol=1e-5)


@pytest.mark.slow  # tests/test_collectives.py says more, of 64 devices
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
