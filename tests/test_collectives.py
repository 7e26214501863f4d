"""What devices send each other while they sample and update, read from the compiled programs."""

import json
import math
import os
import pathlib
import subprocess
import sys

import collectives
import jax
import numpy as np
import pytest
import tiny
from collectives import GROUP_SIZE, GROUPS, LAYERS, LENGTH, PROMPT, VOCAB, WIDTH

from grpo_jax import sharding
from grpo_jax.engine import compaction, decode
from grpo_jax.engine.compaction import NEVER_COMPACT, DecodeInputs, Slots, SlotShape
from grpo_jax.engine.sampling_params import sampling_params
from grpo_jax.types import Prompts, Sampling

DATA_DEVICES = collectives.MESH[0] * collectives.MESH[1]


def on_64_devices(**options):
    root = pathlib.Path(__file__).parents[1]
    count = '--xla_force_host_platform_device_count=64'
    done = subprocess.run(
        [sys.executable, collectives.__file__, json.dumps(options)],
        env=os.environ | {
            'PYTHONPATH': str(root),
            'XLA_FLAGS': f'{os.environ.get("XLA_FLAGS", "")} {count}',
        },
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


def of_tokens(sizes):
    """Whether an axis counts tokens of completions or prompts."""
    return any(size and size % tokens == 0 for size in sizes for tokens in (LENGTH, PROMPT))


@pytest.mark.parametrize(
    'options',
    [{}, pytest.param({'experts': 4, 'experts_per_token': 2}, marks=pytest.mark.slow)],
    ids=['dense', 'experts'],
)
def test_an_update_on_64_devices(options):
    """16 x 2 x 2: no logits are sent, no tokens but a device's own, and no moments.

    Parameters are gathered over one axis of the mesh at a time: over two, the compiler of TPUs
    takes ten times as long.
    """
    found = on_64_devices(**options)
    assert found['stays']
    own_tokens = GROUPS * GROUP_SIZE * LENGTH * WIDTH // DATA_DEVICES
    parameters = 0
    for kind, sizes, name in found['collectives']:
        about = f'{kind} of {sizes} in {name}'
        if of_tokens(sizes):
            assert not any(size in (VOCAB, VOCAB // 2) for size in sizes), f'logits: {about}'
            assert math.prod(sizes) <= own_tokens, f"others' hidden states: {about}"
        else:
            parameters += kind == 'all-gather'
        assert len(sizes) < 2 or sizes[0] != LAYERS, f'moments, or all layers at once: {about}'
    assert parameters > 10
    of_parameters = [devices for sizes, devices in found['gathered'] if not of_tokens(sizes)]
    assert set(of_parameters) <= set(collectives.MESH), found['gathered']


@pytest.mark.skipif(jax.device_count() < 8, reason='needs eight devices')
@pytest.mark.parametrize('gather', [True, False])
def test_decoding_waits_for_no_weights_where_they_were_gathered(gather):
    mesh = sharding.make_mesh(fsdp=8, completions=4)
    model = tiny.make_model(vocab_size=72)
    params = tiny.make_params(model)
    placed = jax.device_put(params, sharding.shardings(params, mesh))
    placed = sampling_params(placed, 'float32', 'model', False, mesh=mesh, gather=gather)
    prompts = sharding.put_groups(tiny.make_rollout(groups=2).prompts, mesh)
    inputs = DecodeInputs(placed, prompts, None, Sampling(), np.arange(6), None)
    lowered = decode.first_block.lower(
        model, inputs, 0, 0, NEVER_COMPACT, group_size=4, max_tokens=6, width=6, record=(),
        mesh=mesh,
    )  # fmt: skip
    compiled = lowered.compile({'xla_backend_optimization_level': 0})
    program, (*_, state) = compiled.as_text(), compiled.output_shardings
    assert state.t.is_fully_replicated  # what the host reads
    assert state.live.is_fully_replicated
    assert state.ended.is_equivalent_to(sharding.groups(mesh), 2)
    sent = [
        sizes
        for _, sizes, name in collectives.collectives(program)
        if 'first_block)/while/' in name and math.prod(sizes) > 2
    ]
    assert bool(sent) != gather  # of at most 2 numbers: how many completions go on
    copies = {x.sharding.is_fully_replicated for x in jax.tree.leaves(placed)}
    assert copies == ({True} if gather else {True, False})


@pytest.mark.skipif(jax.device_count() < 8, reason='needs eight devices')
def test_compaction_sends_nothing():
    """Also where heads are split over the mesh's tensor axis, and slots leave their groups."""
    mesh = sharding.make_mesh(fsdp=4, completions=2, tensor=2)

    def array(dtype, *shape, axes=(sharding.DATA,)):
        where = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*axes))
        return jax.ShapeDtypeStruct(shape, dtype, sharding=where)

    numbers, absent = array('int32', 8, 6), None
    prompts = Prompts(array('int32', 8, 5), array('int32', 8), array('int32', 8))
    slots = Slots(numbers, numbers, numbers, array('bool', 8, 6), numbers, absent)
    kept = array('int32', 4, 6)
    caches = [
        array('float32', 2, 8, *rest, axes=(None, sharding.DATA, *[None] * split, 'tensor'))
        for rest, split in (((6, 2, 9, 3), 1), ((2, 5, 3), 0))
    ]
    shape = SlotShape(6, 1, apart=True)
    for lowered in (
        compaction.choose_slots.lower(prompts, slots, shape, mesh),
        compaction.choose_slots.lower(prompts, slots, SlotShape(2, 3), mesh),
        compaction.keep_slots.lower(caches[0], kept, rows=1, mesh=mesh),
        compaction.keep_slots.lower(caches[0], kept, rows=3, mesh=mesh),
        compaction.copy_prompts.lower(caches[1], kept, size=6, mesh=mesh),
        decode.grow_cache.lower(caches[0], 12),
    ):
        compiled = lowered.compile({'xla_backend_optimization_level': 0})
        assert collectives.collectives(compiled.as_text()) == []
        for where in jax.tree.leaves(compiled.output_shardings):
            assert not where.is_fully_replicated
