"""Where a step's batch comes from, and training that begins with a checkpoint."""

import dataclasses
import functools
import itertools
import re
import threading

import folders
import jax
import numpy as np
import oracle
import orbax.checkpoint as ocp
import pytest
import runs
import tiny

from grpo_jax import data, models, report, rewards, setup, stages
from grpo_jax.rewards import pool
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


def records(workdir, *, but=TIMES):
    return {
        name: [
            {k: v for k, v in row.items() if not but.search(k)}
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


# Parts of a batch


def test_parts_train_as_the_whole_does(plain, tmp_path):
    """Bit for bit, but for the last bits of the log-probs that the sampler notes."""
    config, workdir = plain
    runs.train(changed(config, sample_batch=2), tmp_path)
    noted = re.compile(f'{TIMES.pattern}|^sampling/')
    parts, whole = (records(folder, but=noted) for folder in (tmp_path, workdir))
    assert len(whole['metrics.jsonl']) == 3
    assert len(whole['completions.jsonl']) == 3 * 16
    assert parts == whole
    assert tiny.same(newest(tmp_path)['params'], newest(workdir)['params'])
    for rows in zip(*(runs.lines(f / 'metrics.jsonl') for f in (tmp_path, workdir)), strict=True):
        ours, theirs = ({k: v for k, v in row.items() if k[:9] == 'sampling/'} for row in rows)
        assert len(ours) == 5
        assert ours == pytest.approx(theirs, abs=2e-6)


@pytest.fixture(scope='module')
def asked(plain):
    """A prepared run, its problems and parameters."""
    config, workdir = plain
    made = setup.prepare(config, workdir)
    heldout = setup.heldout_problems(made)
    return made, setup.training_problems(made, heldout), heldout, setup.initial_params(made)


def collect(asked, *, sampler=None, parts=2, **functions):
    """What the first step collects, rewarded by the functions."""
    made, training, heldout, params = asked
    named = {f'runs:{name}': 1.0 for name in functions}
    config = changed(made.config, sample_batch=4 // parts, rewards=named)
    made = dataclasses.replace(made, config=config, sampler=sampler or made.sampler)
    with pytest.MonkeyPatch.context() as patch:
        for name, function in functions.items():
            patch.setattr(runs, name, function, raising=False)
        stage, began = stages.grpo_stage(made, training, heldout), stages.Models(params)
        return stage.collect(0, stage.sample(0, params, began), params, began)


def test_a_part_is_judged_while_the_next_is_sampled(asked):
    """The last part cannot end before the first one has come to its reward."""
    parts, judged, in_time = [], threading.Event(), []

    def wait(tokens):
        in_time.append(judged.wait(60))
        return np.asarray(tokens)

    @jax.jit
    def after_the_first_reward(rollout):
        shape = jax.ShapeDtypeStruct(rollout.tokens.shape, rollout.tokens.dtype)
        return rollout._replace(tokens=jax.pure_callback(wait, shape, rollout.tokens))

    def sampler(*args, **options):
        (rollout,) = asked[0].sampler(*args, **options)
        parts.append(after_the_first_reward(rollout) if parts else rollout)
        return iter([parts[-1]])

    def watching(prompts, completions, **columns):
        judged.set()
        return [0.0] * len(completions)

    collect(asked, sampler=sampler, watching=watching)
    assert len(parts) == 2
    assert in_time == [True]


def test_slow_rewards_of_all_parts_run_at_once(asked):
    together = threading.Barrier(2)

    def slow(prompts, completions, **columns):
        together.wait(60)
        return [1.0] * len(completions)

    assert (collect(asked, slow=slow).rewards == 1).all()


def test_the_order_does_not_depend_on_which_reward_is_ready_first(asked):
    """The first part's reward ends last."""
    last = threading.Event()
    whole = collect(asked, parts=1, bonus=runs.bonus)
    first = whole.completions[0]['prompt']

    def bonus(prompts, completions, **columns):
        if prompts[0] == first:
            assert last.wait(60)
        else:
            last.set()
        return runs_bonus(prompts, completions)

    runs_bonus = runs.bonus
    parts = collect(asked, bonus=bonus)
    assert parts.completions == whole.completions
    assert np.ptp(whole.rewards) > 0
    np.testing.assert_array_equal(parts.rewards, whole.rewards)
    np.testing.assert_array_equal(parts.rollout.tokens, whole.rollout.tokens)
    np.testing.assert_array_equal(parts.rollout.prompts.index, whole.rollout.prompts.index)
    np.testing.assert_allclose(parts.rollout.logprobs, whole.rollout.logprobs, atol=1e-5)


def test_comparisons_that_were_given_up_are_counted_once(asked):
    """Although each part sees those that another one meets meanwhile."""
    together = threading.Barrier(2)

    def given_up(prompts, completions, **columns):
        together.wait(60)
        with lock:
            pool.shared().timeouts += 1
        together.wait(60)
        return [0.0] * len(completions)

    lock = threading.Lock()
    assert collect(asked, given_up=given_up).metrics['rewards/timeouts'] == 2


def test_a_whole_batch_is_rewarded_in_the_main_thread(asked):
    """There a library's own alarms work, and an interrupt ends a reward."""
    threads = []

    def here(prompts, completions, **columns):
        threads.append(threading.current_thread())
        return [0.0] * len(completions)

    collect(asked, parts=1, here=here)
    assert threads == [threading.main_thread()]


@pytest.mark.slow
def test_parts_on_a_mesh(asked, plain, tmp_path):
    config, _ = plain
    config = config.copy_and_resolve_references()
    config.mesh.fsdp = 2
    config.grpo.algorithm.microbatch = 2
    made = setup.prepare(config, tmp_path)
    blocks = functools.partial(made.sampler, block=3)
    there = (made, *asked[1:3], setup.initial_params(made))
    meshed = collect(there, sampler=blocks, lucky=runs.lucky)
    whole = collect(asked, parts=1, lucky=runs.lucky)
    assert meshed.completions == whole.completions
    np.testing.assert_array_equal(meshed.rollout.tokens, whole.rollout.tokens)
    np.testing.assert_array_equal(meshed.rewards, whole.rewards)


@pytest.mark.parametrize(
    ('size', 'devices', 'message'),
    [
        (3, 1, 'sample_batch=3 does not cut grpo.batch_size of 4 prompts .* use one of 1, 2, 4$'),
        (8, 1, 'sample_batch=8 does not cut grpo.batch_size of 4 prompts .* use one of 1, 2, 4$'),
        (
            1,
            2,
            r'sample_batch=1 does not cut grpo.batch_size of 4 prompts over fsdp=2 .* one of 2, 4$',
        ),
    ],
)
def test_parts_that_do_not_divide(size, devices, message, asked):
    made, training, heldout, _ = asked
    config = changed(made.config, sample_batch=size)
    config.grpo.algorithm.microbatch = 2
    mesh = setup.sharding.make_mesh(fsdp=devices, tensor=1)
    made = dataclasses.replace(made, config=config, mesh=mesh)
    with pytest.raises(ValueError, match=message):
        stages.grpo_stage(made, training, heldout)


def test_a_negative_part(source, tmp_path):
    config = changed(folders.get_config(source), sample_batch=-1)
    with pytest.raises(ValueError, match=r'grpo.sample_batch=-1 is out of range'):
        setup.prepare(config, tmp_path)


def test_a_reward_that_fails_in_one_part(plain, tmp_path, monkeypatch):
    """The run ends with what is wrong, keeps what it has, and goes on from there."""
    config, workdir = plain
    config = changed(config, sample_batch=2)
    calls, bonus = itertools.count(), runs.bonus

    def failing(**columns):
        return bonus(**columns) if next(calls) != 2 + 2 + 1 else 1 / 0

    monkeypatch.setattr(runs, 'bonus', failing)
    with pytest.raises(rewards.RewardError) as error:
        runs.train(config, tmp_path)
    assert "reward 'runs:bonus', called with prompts, completions" in str(error.value)
    assert 'ZeroDivisionError: division by zero' in str(error.value)
    assert [row['step'] for row in runs.lines(tmp_path / 'metrics.jsonl')] == [0, 1]
    assert runs.train(config, tmp_path).startswith('grpo: resumed at step 2 of 3\n')
    noted = re.compile(f'{TIMES.pattern}|^sampling/')
    assert records(tmp_path, but=noted) == records(workdir, but=noted)
    assert tiny.same(newest(tmp_path)['params'], newest(workdir)['params'])


# What a stage is


def test_demonstrations_of_a_chat_end_with_the_turn(source, tmp_path):
    table = folders.rows(tmp_path / 'rows', train=['a', 'b', 'c'], test=['x'])
    chat = folders.write(tmp_path / 'chat', tokenizer=folders.chat_tokenizer())
    config = folders.get_config(chat, **table, chat=True, prompt_length=64)
    config.sft.update(steps=2, batch_size=3, microbatch=3)
    made = setup.prepare(config, tmp_path / 'run')
    stage = stages.sft_stage(made, setup.training_problems(made, setup.heldout_problems(made)))
    batch = stage.collect(0, stage.sample(0, None, None), None, None)
    assert batch.rollout.tokens[:, 0, :2].tolist() == [[ord('1'), folders.IM_END]] * 3
    assert batch.rollout.mask.sum(-1).tolist() == [[2]] * 3
    assert batch.rewards.tolist() == [[1.0]] * 3


def test_without_beta_there_is_no_reference(asked):
    made, training, heldout, _ = asked
    assert stages.grpo_stage(made, training, heldout).parts.algorithm.kl == 'k3'
    config = made.config.copy_and_resolve_references()
    config.grpo.objective.beta = 0.0
    made = dataclasses.replace(made, config=config)
    assert stages.grpo_stage(made, training, heldout).parts.algorithm.kl == 'none'


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
    pretrained = setup.initial_params(made)
    after_sft = models.merge(made.model.config, pretrained, newest(workdir, 'sft')['params'])
    adapters = newest(workdir, step=2)['params']
    policy = models.merge(made.model.config, after_sft, adapters)
    training = setup.training_problems(made, setup.heldout_problems(made))
    rollout = jax.device_get(
        made.sampler(
            models.join(after_sft, adapters),
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
    """So the same command works once the folder has been mended."""
    source = folders.write(tmp_path / 'source')
    text = (source / 'config.json').read_text()
    (source / 'config.json').write_text(
        text.replace('"num_hidden_layers": 1', '"num_hidden_layers": 2')
    )
    config = folders.get_config(source, cache_dir=str(tmp_path / 'cache'))
    with pytest.raises(ValueError, match=r'layers.1.* is missing'):
        runs.train(config, tmp_path / 'run')
    assert not list((tmp_path / 'run').iterdir())
