"""Estimated memory and work: by hand, and against what the compiler of CPUs says."""

import jax
import pytest
import runs

from grpo_jax import models
from grpo_jax.engine.compute import Compute, ComputePlan, choose
from grpo_jax.run import mesh
from grpo_jax.run.plan import measuring, topology
from grpo_jax.run.plan.costs import Speed
from grpo_jax.run.plan.estimate import Sizes, estimate, sampling_temporaries, update_temporaries
from grpo_jax.run.plan.measuring import memory_needed
from grpo_jax.run.plan.planning import make_plan
from grpo_jax.run.preparation import prepare_run


def test_an_update_by_hand():
    """Two groups of 4 on two devices; n = 10 + 3 * 20 tokens of a device, r = 3 at a time."""
    config = models.ModelConfig(
        vocab_size=7, width=4, layers=5, heads=2, kv_heads=1, head_dim=8, mlp_width=16
    )
    sizes = Sizes((2, 4, 10, 20), slices=1, devices=2)
    plan = ComputePlan(2, 6, packed=False, widths=1, unroll=False, logprob_chunk=4, remat=True)
    kept = 4 * 4 + 3 * 3 * 8 + 6 * 16
    backward = 2 * 4 + 3 * 16
    logits = 3 * 4 * 3 * 7 * 4
    layer = 4 * 8 * (2 * 2 + 2 * 1) + 3 * 4 * 16
    rest = logits + 1000 + 2 * layer * 4
    stored = plan._replace(remat=False)
    assert update_temporaries(config, sizes, plan, 1000) == (
        70 * 4 * (5 * 4 + kept + backward) + rest
    )
    assert update_temporaries(config, sizes, stored, 1000) == 70 * 4 * (5 * kept + backward) + rest
    halves = Sizes((4, 4, 10, 20), slices=1, devices=2)  # two microbatches: the gradient, a total
    assert update_temporaries(config, halves, plan, 1000) == (
        update_temporaries(config, sizes, plan, 1000) + 1000
    )
    assert sampling_temporaries(config, 5) == 6 * 5 * 7 * 4


def test_a_run_on_gpus_is_estimated_without_a_compiler(tmp_path, monkeypatch):
    monkeypatch.setattr(measuring, '_compiled', None)  # a call fails
    config = runs.get_config()
    config.sft.steps = 0
    config.mesh.fsdp = -1
    config.data.update(heldout_split='', completion_length=128)
    config.grpo.update(batch_size=8)
    config.grpo.compute.microbatch = None
    gpus = topology.find_topology('h100:8')
    plan = make_plan(config, gpus, str(tmp_path))
    assert plan.fits
    sizes = {m.program.name.partition(', ')[2]: m for m in plan.measured}
    copy = sizes['weights']
    assert copy.memory['results'] == pytest.approx(8 * copy.memory['policy'], rel=0.2)
    caches = 2 * 4 * config.model.layers * config.model.kv_heads * config.model.head_dim * FLOAT
    growth = sizes['caches of 1 x 4 completions from 64 to 128 columns']
    assert growth.memory['results'] == pytest.approx(128 * caches / 2, rel=0.01)  # keys, or values
    of_prompts = 4 * caches / 4
    others = growth.memory['other caches'] - of_prompts
    assert others == pytest.approx(128 * caches / 2, rel=0.01)
    block = sizes['block to column 128 of 1 x 4 completions']
    assert block.memory['temporaries'] == 6 * 4 * 258 * FLOAT
    assert block.costs.seconds >= block.costs.bytes / gpus.chip.bandwidth > 0


FLOAT, SPEED = 4, Speed(1e12, 1e12)
SHAPES = {
    'as wide as its heads': (
        {'width': 256, 'layers': 4, 'heads': 4, 'kv_heads': 4, 'head_dim': 64, 'mlp_width': 1024},
        (8, 8, 256), {'microbatch': 8, 'logprob_chunk': 64, 'remat': True},
    ),
    'few key/value heads': (
        {'width': 192, 'layers': 3, 'heads': 4, 'kv_heads': 2, 'head_dim': 64, 'mlp_width': 512},
        (8, 4, 96), {'microbatch': 4, 'logprob_chunk': 32, 'remat': True},
    ),
    'deep and narrow, stored': (
        {'width': 64, 'layers': 6, 'heads': 2, 'kv_heads': 1, 'head_dim': 64, 'mlp_width': 384},
        (4, 8, 128), {'microbatch': 4, 'logprob_chunk': 32, 'remat': False},
    ),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize('name', SHAPES)
def test_an_estimate_is_near_what_the_compiler_says(name, tmp_path):
    """Of all memory, within 15 %, with few heads: on CPUs, attention also writes scores."""
    model, (groups, group_size, length), compute = SHAPES[name]
    config = runs.get_config()
    config.sft.steps = 0
    config.data.update(heldout_split='', completion_length=length)
    config.model.update(model)
    config.grpo.update(batch_size=groups, group_size=group_size)
    config.grpo.compute.microbatch = None
    with mesh.described(jax.devices()):
        setup, (stage,) = prepare_run(config, str(tmp_path))
        options = Compute(**compute, widths=1)
        call = stage.update(choose(options, setup.model.config, stage.shape, setup.mesh))
    arguments = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(call.arguments[:2]))
    estimated = arguments + estimate(call, 1, SPEED).temporaries
    needed = memory_needed(call)
    print(name, estimated, needed)
    assert estimated == pytest.approx(needed, rel=0.15)
