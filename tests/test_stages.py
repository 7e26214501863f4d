"""Where a step's batch comes from, and training that begins with a checkpoint."""

import dataclasses
import functools
import itertools
import re

import folders
import jax
import numpy as np
import oracle
import orbax.checkpoint as ocp
import pytest
import runs
import tiny

from grpo_jax import data, models, rewards
from grpo_jax.rewards.verify import pool
from grpo_jax.run import parameters, policy_stages, problems, report, setup
from grpo_jax.run.rollouts import Position
from grpo_jax.run.stages import StageParams
from grpo_jax.types import Sampling

pytestmark = pytest.mark.usefixtures('compiled_once')

TIMES = re.compile('timing/|step_time$|perf/')
FILES = ('metrics.jsonl', 'completions.jsonl', 'heldout.jsonl')


@pytest.fixture(scope='module')
def source(tmp_path_factory):
    return folders.write(tmp_path_factory.mktemp('source') / 'llama')


@pytest.fixture(scope='module')
def plain(source, cache, tmp_path_factory):
    """A finished run of GRPO that trains all parameters of the checkpoint."""
    config = folders.get_config(source, cache_dir=cache)
    workdir = tmp_path_factory.mktemp('runs') / 'plain'
    runs.train(config, workdir)
    return config, workdir


@pytest.fixture(scope='module')
def adapted(source, cache, tmp_path_factory):
    """A finished run of both stages that trains adapters."""
    config = folders.get_config(source, cache_dir=cache, rank=2, sft=3)
    config.model.lora.targets = ('q_proj', 'down_proj')  # more take longer to compile
    workdir = tmp_path_factory.mktemp('runs') / 'adapted'
    runs.train(config, workdir)
    return config, workdir


def records(workdir):
    return {
        name: [
            {k: v for k, v in row.items() if not TIMES.search(k)}
            for row in runs.lines(workdir / name)
        ]
        for name in FILES
    }


def newest(workdir, stage='grpo', step=None):
    """The newest checkpoint, or another, as it lies on disk."""
    with ocp.CheckpointManager(workdir / 'checkpoints' / stage) as manager:
        step = step or manager.latest_step()
        items = ('params', 'rest')
        args = ocp.args.Composite(**{name: ocp.args.StandardRestore() for name in items})
        return {name: manager.restore(step, args=args)[name] for name in items}


def changed(config, **keys):
    """A copy of the config with other values in its `grpo` section."""
    config = config.copy_and_resolve_references()
    for name, value in keys.items():
        config.grpo[name] = value
    return config


# A step's batch


@pytest.fixture(scope='module')
def prepared(plain):
    """The setup of a run, its problems and initial parameters."""
    config, workdir = plain
    made = setup.prepare(config, workdir)
    heldout = problems.heldout_problems(made)
    return made, problems.training_problems(made, heldout), heldout, parameters.initial_params(made)


def collect(prepared, *, sampler=None, **functions):
    """What the first step collects, rewarded by the functions."""
    run_setup, training, heldout, params = prepared
    config = changed(run_setup.config, rewards={f'runs:{name}': 1.0 for name in functions})
    run_setup = dataclasses.replace(run_setup, config=config, sampler=sampler or run_setup.sampler)
    with pytest.MonkeyPatch.context() as patch:
        for name, function in functions.items():
            patch.setattr(runs, name, function, raising=False)
        stage = policy_stages.grpo_stage(run_setup, training, heldout)
        initial, position = StageParams(params), Position()
        return stage.collect(position, stage.sample(position, params, initial), params, initial)


def test_comparisons_without_result_are_in_the_metrics(prepared):
    def hanging(prompts, completions, **columns):
        pool.shared().timeouts += 2
        return [0.0] * len(completions)

    assert collect(prepared, hanging=hanging).metrics['rewards/timeouts'] == 2


@pytest.mark.slow
def test_a_batch_on_a_mesh(prepared, plain, tmp_path):
    config, _ = plain
    config = config.copy_and_resolve_references()
    config.mesh.fsdp = 2
    config.grpo.compute.microbatch = 2
    run_setup = setup.prepare(config, tmp_path)
    blocks = functools.partial(run_setup.sampler, block=3)
    on_mesh = (run_setup, *prepared[1:3], parameters.initial_params(run_setup))
    meshed = collect(on_mesh, sampler=blocks, lucky=runs.lucky)
    whole = collect(prepared, lucky=runs.lucky)
    assert meshed.completions == whole.completions
    np.testing.assert_array_equal(meshed.rollout.tokens, whole.rollout.tokens)
    np.testing.assert_array_equal(meshed.rewards, whole.rewards)


def test_a_reward_that_fails_in_the_middle_of_a_run(plain, tmp_path, monkeypatch):
    """The run ends with the cause, keeps the finished steps, and goes on from there."""
    config, workdir = plain
    calls, bonus = itertools.count(), runs.bonus

    def failing(**columns):
        return bonus(**columns) if next(calls) != 2 else 1 / 0

    monkeypatch.setattr(runs, 'bonus', failing)
    with pytest.raises(rewards.RewardError) as error:
        runs.train(config, tmp_path)
    assert "reward 'runs:bonus', called with prompts, completions" in str(error.value)
    assert 'ZeroDivisionError: division by zero' in str(error.value)
    assert [row['step'] for row in runs.lines(tmp_path / 'metrics.jsonl')] == [0, 1]
    assert runs.train(config, tmp_path).startswith('grpo: resumed at step 2 of 3\n')
    assert records(tmp_path) == records(workdir)
    assert tiny.same(newest(tmp_path)['params'], newest(workdir)['params'])


# What a stage is


def test_demonstrations_of_a_chat_end_with_the_turn(source, tmp_path):
    table = folders.rows(tmp_path / 'rows', train=['a', 'b', 'c'], test=['x'])
    chat = folders.write(tmp_path / 'chat', tokenizer=folders.chat_tokenizer())
    config = folders.get_config(chat, **table, chat=True, prompt_length=64)
    config.sft.update(steps=2, batch_size=3, microbatch=3)
    made = setup.prepare(config, tmp_path / 'run')
    stage = policy_stages.sft_stage(
        made, problems.training_problems(made, problems.heldout_problems(made))
    )
    initial, position = StageParams(None), Position()
    batch = stage.collect(position, stage.sample(position, None, initial), None, initial)
    tokens = int(batch.rollout.prompts.length.sum()) + 3 * 2  # of prompts and demonstrations
    assert batch.position == Position(1, tokens=tokens)
    assert batch.rollout.tokens[:, 0, :2].tolist() == [[ord('1'), folders.IM_END]] * 3
    assert batch.rollout.mask.sum(-1).tolist() == [[2]] * 3
    assert batch.rewards.tolist() == [[1.0]] * 3


def test_without_beta_there_is_no_reference(prepared):
    run_setup, training, heldout, _ = prepared
    stage = policy_stages.grpo_stage(run_setup, training, heldout)
    assert stage.algorithm.uses_reference
    config = run_setup.config.copy_and_resolve_references()
    config.grpo.algorithm.beta = 0.0
    run_setup = dataclasses.replace(run_setup, config=config)
    stage = policy_stages.grpo_stage(run_setup, training, heldout)
    assert not stage.algorithm.uses_reference


# Runs from a checkpoint


def test_checkpoints_of_adapters_hold_adapters_only(adapted):
    _, workdir = adapted
    for stage in ('sft', 'grpo'):
        state = newest(workdir, stage)
        names = {path[-1].key for path, _ in jax.tree_util.tree_leaves_with_path(state['params'])}
        assert len(names) == 4
        assert all(name.endswith(('_lora_a', '_lora_b')) for name in names)
        leaves = jax.tree.leaves(state['rest'])
        size = sum(leaf.size for leaf in jax.tree.leaves(state['params']))
        assert sum(np.size(leaf) for leaf in leaves if np.ndim(leaf)) == 2 * size  # both moments


def test_the_reference_is_the_policy_after_sft(adapted):
    """KL is 0 at GRPO's first step; at its last it is that of NumPy from the merged SFT policy."""
    config, workdir = adapted
    kl = [row['kl'] for row in report.read(workdir / 'metrics.jsonl', 'grpo')]
    assert kl[0] == 0
    made = setup.prepare(config, workdir)
    pretrained = parameters.initial_params(made)
    after_sft = models.merge_adapters(
        made.model.config, pretrained, newest(workdir, 'sft')['params']
    )
    adapters = newest(workdir, step=2)['params']
    policy = models.merge_adapters(made.model.config, after_sft, adapters)
    training = problems.training_problems(made, problems.heldout_problems(made))
    rollout = jax.device_get(
        made.sampler(
            models.join_adapters(after_sft, adapters),
            data.batches(training.table, 4, seed=0)[2],
            step=2,
            sampling=Sampling(),
            group_size=4,
        )
    )

    def logprobs(params):
        logits = oracle.completion_logits(oracle.float64(params), rollout, made.model.config.base)
        return oracle.logprobs(logits, rollout.tokens)[rollout.mask]

    def k3(reference):
        gap = logprobs(reference) - logprobs(policy)
        return np.mean(np.exp(gap) - gap - 1)

    assert kl[2] == pytest.approx(k3(after_sft), rel=0.01)
    assert k3(pretrained) > 5 * kl[2]


STOPS = {
    'plain': [('grpo', 0), ('grpo', 2)],
    'adapted': [('sft', 2), ('grpo', 2)],
}


@pytest.mark.parametrize('kind', STOPS)
def test_stopped_runs_end_as_unbroken_ones(kind, request, tmp_path, monkeypatch):
    """To the last bit: records, parameters, optimizer."""
    config, workdir = request.getfixturevalue(kind)
    write, stops = report.Records.metrics, list(STOPS[kind])

    def interrupt(records, step, values):
        if stops and (records.stage, step) == stops[0]:
            stops.pop(0)
            raise KeyboardInterrupt
        write(records, step, values)

    monkeypatch.setattr(report.Records, 'metrics', interrupt)
    while stops:
        with pytest.raises(KeyboardInterrupt):
            runs.train(config, tmp_path)
    runs.train(config, tmp_path)
    assert records(tmp_path) == records(workdir)
    for stage in {stage for stage, _ in STOPS[kind]}:
        assert tiny.same(newest(tmp_path, stage), newest(workdir, stage))


def test_weights_that_do_not_fit_leave_no_run_behind(tmp_path):
    """So the same command works once the folder has been fixed."""
    source = folders.write(tmp_path / 'source')
    text = (source / 'config.json').read_text()
    (source / 'config.json').write_text(
        text.replace('"num_hidden_layers": 1', '"num_hidden_layers": 2')
    )
    config = folders.get_config(source, cache_dir=str(tmp_path / 'cache'))
    with pytest.raises(ValueError, match=r'layers.1.* is missing'):
        runs.train(config, tmp_path / 'run')
    assert not list((tmp_path / 'run').iterdir())
