"""Samples on a mesh of the same devices whose tensor axis is longer than the update's."""

import math

import collectives
import host_runs
import jax
import numpy as np
import pytest
import runs
import test_mesh
import tiny

from grpo_jax import models, sharding
from grpo_jax.engine import sampling_params
from grpo_jax.run import mesh as run_mesh
from grpo_jax.run.config import defaults, set_value
from grpo_jax.run.mesh import make_sampling_mesh

pytestmark = pytest.mark.skipif(jax.device_count() < 8, reason='needs eight devices')


def make_mesh(groups, completions=1, tensor=1):
    return sharding.make_mesh(fsdp=groups * completions, completions=completions, tensor=tensor)


@pytest.mark.parametrize(
    ('shape', 'tensor', 'expected'),
    [
        ((8, 1, 1), 4, (2, 1, 4)),
        ((4, 2, 1), 2, (4, 1, 2)),
        ((2, 4, 1), 2, (2, 2, 2)),
        ((4, 2, 1), 4, (2, 1, 4)),
        ((2, 2, 2), 4, (2, 1, 4)),
        ((2, 2, 2), 8, (1, 1, 8)),
        ((2, 2, 2), 2, (2, 2, 2)),
    ],
)
def test_devices_of_a_group_are_taken_first_and_keep_their_order(shape, tensor, expected):
    mesh = make_mesh(*shape)
    other = sharding.with_tensor(mesh, tensor)
    assert other.devices.shape == expected
    assert list(other.devices.flat) == list(mesh.devices.flat)


def test_sizes_by_hand():
    assert sharding.tensor_sizes(make_mesh(8), 8, 2) == [1, 2, 4, 8]
    assert sharding.tensor_sizes(make_mesh(8), 4, 4) == [1, 2, 4]
    assert sharding.tensor_sizes(make_mesh(2, 3), 12, 12) == [
        1,
        3,
        6,
    ]  # 2 would cut groups unevenly
    assert sharding.tensor_sizes(make_mesh(2, 2, 2), 8, 8) == [2, 4, 8]


@pytest.mark.parametrize(
    ('kind', 'shape', 'tensor'),
    [
        ('dense', (2, 2, 1), 2),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in (
                ('experts and adapters', (4, 2, 1), 2),
                ('dense', (8, 1, 1), 4),
                ('dense', (2, 2, 2), 4),
                ('dense', (4, 1, 1), 4),
                ('adapters', (2, 4, 1), 4),
            )
        ),
    ],
    ids=str,
)
def test_tokens_are_those_of_one_device(kind, shape, tensor):
    groups = test_mesh.prompts_for(shape)
    params, _, _ = test_mesh.parameters(kind)
    mesh = make_mesh(*shape)
    other = sharding.with_tensor(mesh, tensor)
    prompts = sharding.put_groups(test_mesh.rollout_of(groups).prompts, other)
    placed = test_mesh.placed(params, mesh)
    ours = test_mesh.draw(test_mesh.model_of(kind), placed, prompts, other, block=3)
    alone = test_mesh.tokens_alone(kind)
    np.testing.assert_array_equal(ours.tokens, alone.tokens[:groups])
    np.testing.assert_allclose(ours.logprobs, alone.logprobs[:groups], atol=1e-5)


@pytest.mark.parametrize(
    ('shape', 'tensor'), [((8, 1, 1), 4), ((4, 2, 1), 4), ((2, 4, 1), 2), ((2, 2, 2), 4)], ids=str
)
def test_no_device_holds_all_of_a_parameter(shape, tensor):
    """Each sends and receives parts of its own, and gets 1/tensor of each matrix."""
    mesh = make_mesh(*shape)
    model = tiny.make_model(
        layers=2, width=64, heads=4, kv_heads=4, head_dim=16, mlp_width=128, vocab_size=64
    )
    params = sharding.placed(tiny.shapes(model), mesh)
    other = sharding.with_tensor(mesh, tensor)
    call = sampling_params.conversion(params, 'float32', 'model', True, mesh=other)
    lowered = call.program.trace(*call.arguments, **call.options).lower()
    compiled = lowered.compile({'xla_backend_optimization_level': 0})
    program = compiled.as_text()
    sent = [sizes for _, sizes, _ in collectives.collectives(program)]
    assert any(kind == 'all-to-all' for kind, _, _ in collectives.collectives(program))
    matrix = 64 * 128  # the largest of a layer
    assert all(math.prod(sizes) <= 2 * matrix // tensor for sizes in sent)  # of both layers
    scales = 4 * 5 * 64  # bytes of the norms, which are whole
    shapes = call.program.eval_shape(*call.arguments, **call.options)
    whole = sum(leaf.size * 4 for leaf in jax.tree.leaves(shapes))
    found = compiled.memory_analysis().output_size_in_bytes
    assert found == pytest.approx((whole - scales) / tensor + scales, rel=0.02)


def test_parameters_of_another_mesh_are_always_copied():
    mesh = make_mesh(8)
    params = sharding.placed(tiny.shapes(tiny.make_model()), mesh)
    with pytest.raises(ValueError, match='gather=False has no effect on parameters of another'):
        sampling_params.conversion(
            params, 'float32', 'model', False, mesh=sharding.with_tensor(mesh, 2), gather=False
        )


def config_of(**values):
    config = defaults()
    config.mesh.update(values)
    return config


def chosen(share, kv_heads=4, **values):
    """The tensor axis where a copy takes this share of a device's memory."""
    model = models.Transformer(
        models.ModelConfig(
            vocab_size=256, width=256, layers=4, heads=8, kv_heads=kv_heads, head_dim=32,
            mlp_width=1024,
        )
    )  # fmt: skip
    size = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tiny.shapes(model)))
    mesh = make_mesh(8)
    with run_mesh.described(list(mesh.devices.flat), size / share):
        return make_sampling_mesh(config_of(**values), model, mesh).shape['tensor']


def test_so_many_devices_share_a_copy_that_it_takes_little_of_their_memory():
    """Each has 1/tensor of a copy, and 4 key/value heads are not for 8 devices."""
    assert chosen(0.29) == 1
    assert chosen(0.31) == 4  # 0.155 with 2
    assert chosen(0.29 * 2) == 4
    assert chosen(1.1) == 4  # 0.275
    assert chosen(1.3) == 1  # 0.325
    assert chosen(1.3, kv_heads=8) == 8
    assert chosen(0.7, gather=False) == chosen(0.7, gather=True) == 1
    assert chosen(0.1, sampling_tensor=8) == 8


def test_what_does_not_fit_is_an_error():
    with pytest.raises(ValueError, match=r'sampling_tensor=3 does not .*: use one of 1, 2, 4, 8'):
        chosen(0.1, sampling_tensor=3)
    with pytest.raises(ValueError, match=r'gather=False has no effect with mesh.sampling_t'):
        chosen(0.1, sampling_tensor=2, gather=False)


@pytest.mark.parametrize(
    'changes',
    [
        {},
        *(
            pytest.param(changes, marks=pytest.mark.slow, id=name)
            for name, changes in {
                'refill': {'grpo.refill': 2, 'grpo.drop': 'duplicates'},
                'ahead': {'grpo.ahead': True, 'grpo.algorithm.importance': 'token'},
                'int8': {'grpo.weights': 'int8', 'grpo.algorithm.importance': 'token'},
                'reward model': {'reward_model.weight': 1.0, 'reward_model.steps': 1},
                'greedy': {'grpo.algorithm.baseline': 'greedy', 'grpo.algorithm.scale': 'none'},
                'critic': {'grpo.algorithm.baseline': 'critic', 'grpo.algorithm.scale': 'none'},
                'turns': {'environment.name': 'episode_tools:echo'},
            }.items()
        ),
    ],
)
def test_a_run_has_the_completions_of_one_on_the_mesh_of_its_updates(changes, tmp_path):
    printed = {}

    def trained(name, sampling_tensor):
        config = host_runs.get_config()
        config.mesh.update(fsdp=4, sampling_tensor=sampling_tensor)
        config.grpo.steps = 2
        for key, value in changes.items():
            set_value(config, key, value)
        printed[name] = runs.train(config, tmp_path / name)
        return host_runs.rows(tmp_path / name / 'completions.jsonl')

    assert trained('ours', 2) == trained('theirs', None)
    assert printed['ours'].startswith('sampling: mesh.sampling_tensor=2 devices share a copy')
    assert 'sampling:' not in printed['theirs']
    assert host_runs.largest_difference(tmp_path / 'ours', tmp_path / 'theirs', 'grpo') <= 1e-6
