"""Plans of small runs: what is listed, what it needs, and what makes it fit."""

import json

import jax
import numpy as np
import pytest
import runs
import tiny

from grpo_jax import models, sharding
from grpo_jax.engine.calls import Call
from grpo_jax.models.kernels.selection import choose_attention
from grpo_jax.run import compute_plans, mesh
from grpo_jax.run.plan import measuring, prediction, remedies, topology
from grpo_jax.run.plan.costs import Collectives, Costs
from grpo_jax.run.plan.planning import make_plan
from grpo_jax.run.plan.printing import print_plan
from grpo_jax.run.plan.programs import Program, programs_of
from grpo_jax.run.preparation import prepare_run
from grpo_jax.sharding import CHIPS, Chip

FLOAT = 4


def listed(config, tmp_path):
    """The programs of a run by name, none of them compiled."""
    with mesh.described(jax.devices()):
        setup, stages = prepare_run(config, str(tmp_path))
        programs = [p for stage in stages for p in programs_of(setup, stage, lambda _: None)]
    return setup, {program.name: program for program in programs}


def test_parameters_and_moments_by_hand(tmp_path):
    config = runs.get_config()
    config.model.update(width=16, layers=2, heads=4, kv_heads=2, head_dim=6, mlp_width=24)
    setup, programs = listed(config, tmp_path)
    attention = 16 * 6 * (2 * 4 + 2 * 2)  # queries and output, keys and values
    layer = attention + 3 * 16 * 24 + 2 * 16 + 2 * 6  # with the MLP, and the scales of norms
    count = setup.model.config.vocab_size * 16 + 2 * layer + 16
    resident = programs['grpo: update'].resident
    sizes = {name: measuring.bytes_of(tree) for name, tree in resident.items()}
    assert sizes['policy'] == FLOAT * count
    assert sizes['reference'] == FLOAT * count
    assert sizes['moments'] == pytest.approx(2 * FLOAT * count, abs=64)  # and counters


def test_programs_of_a_run_with_a_critic_and_a_reward_model(tmp_path):
    config = runs.get_config()
    config.grpo.algorithm.update(baseline='critic', scale='batch')
    config.reward_model.update(weight=1.0, steps=2, batch_size=4, group_size=4)
    _, programs = listed(config, tmp_path)
    sampler = 'prompts and first block'
    assert list(programs) == [
        'sft: update',
        'reward: update', f'reward: sampler, {sampler}',
        'grpo: update', f'grpo: sampler, {sampler}', 'grpo: reward model',
        f'grpo: evaluation, greedy, {sampler}', f'grpo: evaluation, samples, {sampler}',
    ]  # fmt: skip
    update = programs['grpo: update'].resident
    assert {*update} == {
        'policy', 'moments', 'critic', "critic's moments", 'reference', 'reward model'
    }  # fmt: skip
    assert programs['grpo: evaluation, samples, ' + sampler].per_step == 0
    assert programs[f'grpo: sampler, {sampler}'].columns == config.data.completion_length


def test_adapters_have_a_base_and_small_moments(tmp_path):
    config = runs.get_config()
    config.model.lora.rank = 2
    setup, programs = listed(config, tmp_path)
    resident = programs['grpo: update'].resident
    sizes = {name: measuring.bytes_of(tree) for name, tree in resident.items()}
    assert sizes['policy'] * 4 < sizes['base']
    assert sizes['moments'] == pytest.approx(2 * sizes['policy'], abs=64)
    shapes = tiny.shapes(models.Transformer(setup.model.config.base))
    assert sizes['base'] == sum(FLOAT * leaf.size for leaf in jax.tree.leaves(shapes))


def test_a_plan_of_the_update_and_what_makes_it_fit(tmp_path, capsys):
    """Half of the memory that it needs is not enough, with a smaller microbatch it is."""
    config = runs.get_config()
    config.sft.steps = 0
    config.data.heldout_split = ''
    sizes = {
        'layers': 1, 'width': 16, 'heads': 2, 'kv_heads': 2, 'head_dim': 8, 'mlp_width': 32
    }  # fmt: skip
    config.model.update(sizes)
    config.data.completion_length = 128
    config.grpo.update(batch_size=16, group_size=4)
    local = topology.find_topology('local')
    update = 'grpo: update'
    config.grpo.compute.widths = 1
    known = {}  # what has been compiled
    plan = make_plan(config, local, str(tmp_path), only=[update], known=known)
    (measured,) = plan.measured
    assert plan.fits
    decoder = models.ModelConfig(vocab_size=258, **sizes)
    forward = prediction.forward_flops(decoder, (16, 4, 4, 128))
    assert 4 * forward < measured.costs.flops < 12 * forward  # with recomputed scores and layers
    tight = local._replace(memory=0.6 * measured.total)
    plan = make_plan(config, tight, str(tmp_path), only=[update], known=known)
    assert plan.fits is False
    first = next(remedies.find_remedies(config, plan, str(tmp_path), known=known))
    assert first.change.values == {'grpo.compute.microbatch': 1}
    assert first.needed <= tight.memory


def test_the_command_prints_json(tmp_path, capsys, monkeypatch):
    """With programs that are not compiled."""

    def measure(self, program):
        parts = {name: measuring.bytes_of(tree) for name, tree in program.resident.items()}
        costs = Costs(1e9, 1e6, 0.5, {'all-gather': Collectives(2, 100.0)})
        return measuring.Measured(program, parts | {'temporaries': 2.0**20}, costs, 0.1)

    monkeypatch.setattr(measuring.Compiler, 'measure', measure)
    monkeypatch.setattr(compute_plans, 'memory_needed', lambda call: 2.0**20)
    config = runs.get_config()
    plan = print_plan(config, str(tmp_path), memory='2MiB', json=True)
    found = json.loads(capsys.readouterr().out)
    assert found['fits'] is plan.fits is True
    assert found['memory'] == 2**21
    assert [stage['name'] for stage in found['stages']] == ['sft', 'grpo']
    assert found['stages'][1]['shape'] == {'B': 4, 'G': 4, 'P': 4, 'T': 7}
    assert found['stages'][0]['programs'][0]['collectives']['all-gather']['count'] == 2
    assert found['changes'] == []
    print_plan(config, str(tmp_path), memory='2MiB')
    text = capsys.readouterr().out
    assert 'grpo: update' in text
    assert 'fits: needs' in text


def test_a_sampler_of_several_blocks(tmp_path):
    """Its second block takes the results of the first; 128 columns are two blocks of 64."""
    config = runs.get_config()
    config.sft.steps = 0
    config.data.update(heldout_split='', completion_length=128)
    config.model.update(layers=1, width=16, heads=1, kv_heads=1, head_dim=8, mlp_width=8)
    plan = make_plan(
        config, topology.find_topology('local'), str(tmp_path), only=['grpo: sampler, block']
    )
    (last,) = plan.measured
    assert last.program.name == 'grpo: sampler, block to column 128 of 4 x 4 completions'
    assert (last.program.columns, last.program.per_step) == (64, 1)
    cache = 2 * 4 * 4 * 1 * 128 * 8 * FLOAT  # keys and values of 16 completions, one head of 8
    assert last.memory['batch and caches'] > cache
    one_layer = 2 * 16 * (16 * 8 * 4 + 3 * 16 * 8 + 16 * 258)  # FLOPs of a column of 16 tokens
    assert one_layer * 64 < last.costs.flops < 3 * one_layer * 64  # and attention


def test_caches_beside_the_array_that_a_program_changes(tmp_path):
    """By hand: one layer and one head of 8, 4 x 8 completions, prompts of 4 tokens."""
    config = runs.get_config()
    config.sft.steps = 0
    config.data.update(heldout_split='', completion_length=160)
    config.model.update(layers=1, width=8, heads=1, kv_heads=1, head_dim=8, mlp_width=8)
    config.grpo.group_size = 8
    with mesh.described(jax.devices()):
        setup, (stage,) = prepare_run(config, str(tmp_path))
        programs = [
            p for p in programs_of(setup, stage, measuring.shapes_of) if 'sampler' in p.name
        ]
    compiled = {p.kind.rpartition(', ')[2]: p for p in programs if not p.listed_only}
    assert {*compiled} == {'prompts and first block', 'growth', 'compaction', 'copies', 'block'}
    names = [compiled[kind].name.partition(', ')[2] for kind in ('growth', 'compaction', 'copies')]
    assert names == [
        'caches of 4 x 8 completions from 128 to 160 columns',
        'compaction of 4 x 8 completions to 16 x 1 completions, 160 columns',
        'copies of the prompts of 4 x 8 completions for 16 x 1 completions',
    ]
    column = 8 * FLOAT
    prompts, completions = 4 * 4 * column, 32 * 160 * column  # keys, or values
    tokens = 4 * 8 * (160 * (FLOAT + FLOAT + 1) + 1) + 3 * FLOAT  # with log-probs, mask and ends
    for kind, others in {
        'growth': 2 * prompts + completions,  # of the values, which are last, keys have grown
        'compaction': 2 * prompts + completions,  # of the keys, which are first
        'copies': completions + 4 * prompts,  # half of both; copied keys, beside the values
    }.items():
        resident = compiled[kind].resident
        assert measuring.bytes_of(resident['other caches']) == others, kind
        assert measuring.bytes_of(resident['tokens so far']) == tokens
    arguments = [measuring.bytes_of(compiled[kind].call.arguments) for kind in ('growth', 'copies')]
    assert arguments == [32 * 128 * column, prompts + 16 * 4]  # and which slots are kept


# Devices


def test_names_of_devices():
    local = topology.find_topology('local', '3GiB')
    assert (local.devices, local.memory) == (jax.devices(), 3 * 2**30)
    for name in ('v5e', 'v5e:', 'v9:2x2', 'v5e:4by4', ''):
        with pytest.raises(ValueError, match=f"--topology={name} is unknown: use 'local', or one"):
            topology.find_topology(name)
    for text in ('16', 'GiB', '0GiB', '16 TB'):
        with pytest.raises(ValueError, match=f'--memory={text}: give bytes'):
            topology.parse_memory(text)
    assert topology.parse_memory('16GB') == 16e9


def test_times_by_hand():
    """A layer of width 2 with one head of 2, an MLP of 3 and 5 tokens; P = T = 2, B = G = 1."""
    config = models.ModelConfig(
        vocab_size=5, width=2, layers=1, heads=1, kv_heads=1, head_dim=2, mlp_width=3
    )
    products = 4 * (4 * 2 * 2 + 3 * 2 * 3) + 2 * 2 * 5  # four tokens; logits of two
    pairs = 2**2 / 2 + 2 * 2 + 2**2 / 2
    forward = prediction.forward_flops(config, (1, 1, 2, 2))
    assert forward == 2 * products + 4 * 2 * pairs
    chip = Chip(memory=1, flops=10, bandwidth=1, links=4.0)
    costs = Costs(seconds=3.0, collectives={'all-reduce': Collectives(1, 20.0)})
    program = measuring.Measured(Program('update', lambda: (Call(None, ()), {})), {}, costs, 0.0)
    assert prediction.times_of(program, chip) == (3.0, 5.0)
    assert prediction.times_of(program, chip).total == 5.0  # both at the same time
    assert prediction.times_of(program, chip).without_overlap == 8.0


def test_chips_are_found_by_the_kind_of_a_device():
    class Device:
        platform = 'gpu'
        device_kind = 'NVIDIA H100 80GB HBM3'

    assert sharding.chip_of(Device()) == CHIPS['h100']
    assert sharding.memory_of(Device()) == CHIPS['h100'].memory
    Device.device_kind = 'TPU v5 lite'
    assert sharding.chip_of(Device()) == CHIPS['v5e']
    assert sharding.memory_of(jax.devices()[0]) is None  # a CPU


# TPUs, which only their compiler has to be here for


@pytest.fixture
def chip():
    pytest.importorskip('libtpu')
    return topology.find_topology('v5e:1x1')


def test_programs_are_traced_for_the_described_platform(chip):
    config = models.ModelConfig(
        vocab_size=8, width=16, layers=1, heads=1, kv_heads=1, head_dim=128, mlp_width=8
    )
    assert choose_attention(config) == 'recomputed'
    with sharding.use(sharding.make_mesh(devices=chip.devices)):
        assert choose_attention(config) == 'splash'
    assert sharding.memory_of(chip.devices[0]) == CHIPS['v5e'].memory


def test_the_compiler_says_what_is_too_large(chip):
    where = sharding.replicated(sharding.make_mesh(devices=chip.devices))
    x = jax.ShapeDtypeStruct((1 << 16, 1 << 16), np.float32, sharding=where)
    call = Call(jax.jit(lambda x: x.T + 1), (x,))
    assert measuring.memory_needed(call) is None
    # The argument, its transpose and the result.
    assert measuring._compiled(call, None).needed == pytest.approx(3 * 2**34, rel=0.02)
