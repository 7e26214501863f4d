"""How a run's updates are computed: chosen by the compiled program's memory, and kept."""

import dataclasses
import json

import jax
import pytest
import runs

from grpo_jax import sharding
from grpo_jax.engine.compute import Compute, alternatives, choose
from grpo_jax.run import compute_plans, mesh
from grpo_jax.run.compute_plans import HEADROOM, settle
from grpo_jax.run.plan import planning
from grpo_jax.run.plan.measuring import memory_needed
from grpo_jax.run.plan.topology import find_topology
from grpo_jax.run.preparation import prepare_run
from grpo_jax.sharding import memory_of

SHAPE = (16, 8, 4, 100)


@pytest.fixture(scope='module')
def prepared(tmp_path_factory):
    with mesh.described(jax.devices()):
        return prepare_run(runs.get_config(), str(tmp_path_factory.mktemp('run'))).setup


@pytest.fixture
def setup(prepared, tmp_path):
    return dataclasses.replace(prepared, workdir=tmp_path)


@pytest.fixture
def settled(setup, monkeypatch):
    """Settles without compiling; returns the plan and the numbers of the compiled alternatives."""

    def run(needed, memory=100, compute=None, **options):
        plans, compiled = alternatives(Compute(), setup.model.config, SHAPE, setup.mesh), []

        def measure(plan):
            compiled.append(plans.index(plan) if plan in plans else plan)
            return needed(plan)

        monkeypatch.setattr(compute_plans, 'memory_needed', measure)
        plan = settle(
            setup, 'grpo', compute or Compute(), SHAPE, lambda plan: plan, memory=memory, **options
        )
        return plan, compiled

    return run


def by_number(setup, *sizes):
    """What the alternatives need; None: the compiler gives up."""
    return dict(zip(alternatives(Compute(), setup.model.config, SHAPE), sizes, strict=True)).get


def kept(setup):
    return json.loads((setup.workdir / 'compute.json').read_text())['grpo']


def test_without_a_reported_memory_nothing_is_compiled(settled, setup):
    """As on CPUs: it is what the formula says."""
    assert memory_of(jax.devices()[0]) is None
    plan, compiled = settled(lambda plan: pytest.fail('compiled'), memory=None)
    assert (plan, compiled) == (choose(Compute(), setup.model.config, SHAPE), [])
    assert kept(setup) == {'plan': plan._asdict(), 'needed': None}


@pytest.mark.parametrize(
    ('sizes', 'chosen', 'compiled'),
    [
        ((95, 80, 70, 60, 50, 40, 30), 0, [0]),  # 5 of 100 bytes stay free
        ((96, 80, 70, 60, 50, 40, 30), 1, [0, 3, 2, 1]),
        ((None, None, None, 60, 50, 40, 30), 3, [0, 3, 2]),
        ((None, 600, 500, 400, 300, 95, 30), 5, [0, 3, 5, 4]),
        ((None, None, None, None, None, 96, 90), 6, [0, 3, 5, 6]),
    ],
)
def test_the_first_alternative_that_fits(settled, setup, capsys, sizes, chosen, compiled):
    plans = alternatives(Compute(), setup.model.config, SHAPE)
    assert len(plans) == 7
    assert HEADROOM == 0.05
    assert settled(by_number(setup, *sizes)) == (plans[chosen], compiled)
    assert kept(setup) == {'plan': plans[chosen]._asdict(), 'needed': sizes[chosen]}
    told = f'grpo: an update needs {sizes[chosen] / 2**20:.2f} MiB of 0.00 MiB on a device\n'
    assert capsys.readouterr().out == told
    # A resumed run computes the same, whatever it would choose now.
    assert settled(lambda plan: 0) == (plans[chosen], [])


def test_a_warning_where_nothing_fits(settled, setup, caplog):
    plan, compiled = settled(lambda plan: None)
    assert plan == alternatives(Compute(), setup.model.config, SHAPE)[-1]
    assert compiled == [0, 3, 5, 6]
    assert 'grpo: an update does not fit into the 0.00 MiB of a device, also with' in caplog.text


def test_a_resumed_run_computes_the_same_on_devices_with_less_memory(settled, setup, caplog):
    plan, _ = settled(lambda plan: 2**30, memory=2**31)
    assert settled(lambda plan: 0, memory=None) == (plan, [])
    assert settled(lambda plan: 0, memory=2**30) == (plan, [])
    assert not caplog.text
    assert settled(lambda plan: 0, memory=2**29) == (plan, [])
    assert 'which needed 1.00 GiB of a device, and these have 0.50 GiB: resume on' in caplog.text


def test_explicit_options_stay(settled):
    explicit = Compute(microbatch=16, remat=False, logprob_chunk=7, rows=4)
    plan, compiled = settled(lambda plan: None, compute=explicit)
    assert (plan.microbatch, plan.remat, plan.logprob_chunk, plan.rows) == (16, False, 7, 4)
    assert compiled == [plan]  # to say that it does not fit


def test_options_that_the_program_does_not_have(settled):
    plan, compiled = settled(lambda plan: None, fixed=('rows', 'logprob_chunk'))
    assert plan.rows == 0
    assert len(compiled) < 4
    assert {plan.logprob_chunk for plan in compiled[:-1] if not isinstance(plan, int)} <= {128}


def test_a_kept_plan_that_is_not_possible_any_more(settled, setup, caplog):
    plan, _ = settled(lambda plan: 0)
    for changed in ({'microbatch': 5}, {'rows': 7}):  # 16 prompts or 128 completions
        caplog.clear()
        text = json.dumps({'grpo': {'plan': (plan._replace(**changed))._asdict(), 'needed': None}})
        (setup.workdir / 'compute.json').write_text(text)
        assert settled(lambda plan: 0)[0] == plan
        assert 'which the options or the devices of now do not allow' in caplog.text


def test_a_described_memory_is_what_is_chosen_for(settled, setup):
    """As on devices that report theirs, which CPUs do not."""
    plans = alternatives(Compute(), setup.model.config, SHAPE, setup.mesh)
    sizes = dict(zip(plans, range(len(plans), 0, -1), strict=True))
    for needed, expected in ((len(plans), plans[0]), (1, plans[-1])):
        with mesh.described(jax.devices(), needed / (1 - HEADROOM) + 1e-6):
            assert settled(sizes.get, memory=None)[0] == expected
    with mesh.described(jax.devices()):
        expected = choose(Compute(), setup.model.config, SHAPE, setup.mesh)
        assert settled(sizes.get, memory=None) == (expected, [])


@pytest.mark.parametrize(('memory', 'expected'), [('3GiB', 3 * 2**30), ('', None)])
def test_the_memory_of_the_command_is_what_is_chosen_for(tmp_path, monkeypatch, memory, expected):
    found = []

    def prepare(config, workdir):
        found.append(mesh.memory_of(sharding.make_mesh(fsdp=1)))
        raise KeyError

    monkeypatch.setattr(planning, 'prepare_run', prepare)
    with pytest.raises(KeyError):
        planning.make_plan(runs.get_config(), find_topology('local', memory), str(tmp_path))
    assert found == [expected]


@pytest.fixture(scope='module')
def stage(tmp_path_factory):
    """A stage whose update is compiled fast and needs more for logits than for anything else."""
    config = runs.get_config()
    config.sft.steps = 0
    config.data.update(heldout_split='', completion_length=128)
    config.model.update(
        layers=8, width=16, heads=2, kv_heads=2, head_dim=8, mlp_width=32, remat=None
    )  # fmt: skip
    config.grpo.update(batch_size=16, group_size=4)
    config.grpo.compute.widths = 1
    with mesh.described(jax.devices()):
        prepared = prepare_run(config, str(tmp_path_factory.mktemp('stage')))
    return prepared.setup, prepared.stages[0]


@pytest.mark.slow
def test_memory_falls_along_the_alternatives_of_a_compiled_update(stage, monkeypatch, tmp_path):
    """Each of them is what is chosen for just enough memory."""
    setup, stage = stage
    setup = dataclasses.replace(setup, workdir=tmp_path)
    compute = Compute(widths=1)
    plans = alternatives(compute, setup.model.config, stage.shape, setup.mesh)
    needed = {plan: memory_needed(stage.update(plan)) for plan in plans}
    sizes = list(needed.values())
    assert sizes == sorted(set(sizes), reverse=True)
    monkeypatch.setattr(compute_plans, 'memory_needed', lambda plan: needed[plan])
    for plan, size in needed.items():
        memory = size / (1 - HEADROOM) + 1
        monkeypatch.setattr(sharding, 'memory_of', lambda device, memory=memory: memory)
        found = settle(setup, 'grpo', compute, stage.shape, lambda plan: plan)
        (tmp_path / 'compute.json').unlink(missing_ok=True)
        assert found == plan
