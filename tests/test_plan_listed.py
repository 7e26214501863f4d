"""The programs that a plan lists are those that a run dispatches."""

import jax
import numpy as np
import pytest
import runs
from hypothesis import given, settings
from hypothesis import strategies as st

from grpo_jax import models
from grpo_jax.algorithm.sample import sample_blocks
from grpo_jax.engine import calls, decode
from grpo_jax.engine.calls import Call
from grpo_jax.run import mesh
from grpo_jax.run.plan import listed
from grpo_jax.run.plan.planning import list_programs
from grpo_jax.run.plan.programs import programs_of
from grpo_jax.run.plan.sampling import Sample
from grpo_jax.run.preparation import prepare_run
from grpo_jax.types import Sampling


def short_config():
    config = runs.get_config()
    config.sft.steps = 1
    config.sft.optimizer.warmup_steps = 0
    config.grpo.steps = 1
    return config


def programs(config, workdir):
    """The programs of a run, {digest: name}."""
    with mesh.described(jax.devices()):
        setup, stages = prepare_run(config, str(workdir))
        return {key: x for stage in stages for key, x in list_programs(setup, stage).items()}


@pytest.fixture(scope='module')
def planned(tmp_path_factory):
    workdir = tmp_path_factory.mktemp('planned')
    listed.keep(str(workdir), {}, programs(short_config(), workdir))
    return workdir


def test_a_run_uses_the_programs_of_its_plan(planned, caplog):
    runs.train(short_config(), planned)
    assert 'does not list' not in caplog.text
    assert (planned / 'checkpoints' / 'grpo' / '1').is_dir()


def test_other_programs_are_told_by_name_and_once(planned, tmp_path, caplog):
    config = short_config()
    config.data.completion_length = 9
    with mesh.described(jax.devices()):
        setup, stages = prepare_run(config, str(tmp_path))
        found = [p.call for p in programs_of(setup, stages[-1], lambda program: None)]
    with listed.warned_of_others(planned):
        for call in [*found, *found]:
            call._replace(program=Named(call.program)).run()
    warnings = [record.message for record in caplog.records]
    assert len(warnings) == len({call.digest for call in found}) == 3  # two samplers are the same
    assert all('plan.json does not list a program that this run uses' in x for x in warnings)
    assert 'update of 4 x 4 x 9 tokens' in warnings[0]
    assert 'prompts of 4 tokens, and the first 9 columns of 4 x 4 completions' in warnings[1]


class Named:
    """In the place of a program, which is not run."""

    def __init__(self, program):
        self.__qualname__ = program.__qualname__

    def __call__(self, *arguments, **options):
        return None


def test_a_folder_without_a_plan_is_not_checked(tmp_path):
    with listed.warned_of_others(tmp_path):
        assert calls._observers == []


# Digests


def test_digests_depend_on_shapes_options_and_what_a_program_was_made_with():
    def call(size=2, dtype='float32', width=1, made=(), name='step'):
        def program(x):
            return x

        program.__qualname__ = name
        x = jax.ShapeDtypeStruct((size,), dtype), 0.5
        return Call(program, (x,), {'width': width}, 'name', made)

    same = {call().digest, call()._replace(name='another').digest}
    assert len(same) == 1
    array = call()._replace(arguments=((np.ones(2, np.float32), 0.25),))
    assert array.digest in same  # values do not matter
    others = [
        call(size=3), call(dtype='int32'), call(width=2), call(made=(object,)), call(name='other')
    ]  # fmt: skip
    assert len({x.digest for x in others} | same) == 6


# Sampler


@pytest.fixture(scope='module')
def sampler(tmp_path_factory):
    """A sampler of up to three blocks, and all of its programs."""
    config = short_config()
    config.sft.steps = 0
    config.data.update(heldout_split='', completion_length=160)
    config.model.update(layers=1, width=8, heads=1, kv_heads=1, head_dim=8, mlp_width=8)
    with mesh.described(jax.devices()):
        setup, (stage,) = prepare_run(config, str(tmp_path_factory.mktemp('run')))
    sample = Sample(setup, (4, 8, *stage.shape[2:]), Sampling())
    params = jax.eval_shape(lambda: models.init_params(setup.model, jax.random.key(0)))
    first = sample.first(params)
    results = first.program.eval_shape(*first.arguments, **first.options)
    found = {sample.call(move, params, results).digest for move in sample.moves}
    return setup, params, first, {first.digest, *found}


@settings(max_examples=20, deadline=None)
@given(st.data())
def test_rollouts_of_any_lengths_use_listed_programs(sampler, data):
    """Programs are not run: how many completions go on after each block is drawn."""
    setup, params, first, known = sampler
    inputs, live = first.arguments[1], np.full(4, 8)

    def run(call):
        nonlocal live
        used.append(call)
        results = call.program.eval_shape(*call.arguments, **call.options)
        if call.program not in (decode.first_block, decode.next_block):
            return results
        live = np.array([data.draw(st.integers(0, int(n))) for n in live])
        enough = np.array([live.max(), live.sum()]) > np.array(call.arguments[-1])
        t = call.options['width'] - (0 if enough.all() else data.draw(st.integers(0, 3)))
        counts = np.array([live.max(), live.sum()], np.int32)
        state = results[-1]._replace(t=np.int32(t), live=counts)
        return (*results[:-1], state)

    used = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Call, 'run', run)
        blocks = sample_blocks(
            setup.model, params, inputs.prompts, seed=0, step=0, sampling=inputs.sampling,
            eos_ids=inputs.eos_ids, group_size=8, max_tokens=160, mesh=setup.mesh,
        )  # fmt: skip
        assert len(list(blocks)) >= 1
    assert {call.digest for call in used} <= known, [call.name for call in used]


@pytest.mark.slow
def test_a_run_with_an_environment_uses_the_programs_of_its_plan(tmp_path, caplog):
    """Replies, blocks that pause, and caches that grow by a reply."""
    config = short_config()
    config.environment.update(name='episode_tools:echo', reply_tokens=20, template='{reply}')
    config.data.completion_length = 40
    config.grpo.steps = 2
    planned = programs(config, tmp_path)
    listed.keep(str(tmp_path), {}, planned)
    runs.train(config, tmp_path)
    assert 'does not list' not in caplog.text
    replies = [name for name in planned.values() if 'replies of' in name]
    assert {name.split('replies of ')[1].split()[0] for name in replies} == {'16', '64'}
