"""Prompts over the steps of a run: no batch is skipped or used twice, also in resumed runs."""

import dataclasses
import itertools
import json
import shutil

import numpy as np
import pytest
import runs

from grpo_jax import rewards
from grpo_jax.run import checkpoint, policy_stages, problems, report, setup
from grpo_jax.run.rollouts import Position
from grpo_jax.run.stages import StageParams
from grpo_jax.types import Rollout

pytestmark = pytest.mark.usefixtures('compiled_once')

B, G = 4, 4


def get_config(**grpo):
    """Few prompts and few different completions, so that both come again in a run."""
    config = runs.get_config()
    config.sft.update(steps=0)
    config.data.options.train_size = 24
    config.data.completion_length = 2
    config.grpo.sampling.update(top_k=4)
    config.grpo.rewards = {'runs:lucky': 1.0}
    config.grpo.update(batch_size=B, group_size=G, **grpo)
    config.eval.update(every=10, samples=0)
    return config


# Stages with a sampler of stubs


def make_stage(tmp_path, sampled, iteration=1, **grpo):
    """A stage whose sampler notes (number, prompts) of each batch in `sampled`."""

    def sampler(params, prompts, *, draw, step, sampling, group_size, weights, record):
        sampled.append((step, np.asarray(prompts.index).tolist()))
        rng = np.random.default_rng(step)
        shape = (B, G, 3)
        tokens = rng.integers(97, 99, shape).astype(np.int32)
        mask = np.ones(shape, bool)
        yield Rollout(prompts, tokens, mask, np.zeros(shape, np.float32), np.ones((B, G), bool))

    run_setup = setup.prepare(get_config(**grpo), tmp_path)
    heldout = problems.heldout_problems(run_setup)
    training = problems.training_problems(run_setup, heldout)
    run_setup = dataclasses.replace(run_setup, sampler=sampler)
    return policy_stages.grpo_stage(run_setup, training, heldout, iteration), len(training.table)


def steps(stage, position, count):
    """The position after each step, and the batches used in it."""
    initial = StageParams(None)
    for _ in range(count):
        samples = stage.sample(position, None, initial)
        batch = stage.collect(position, samples, None, initial)
        used = batch.metrics.get('refill/batches', 1.0)
        assert batch.position.next_batch == position.next_batch + used
        position = batch.position
        yield position, used


def test_batches_follow_each_other_and_epochs_are_whole(tmp_path):
    sampled = []
    stage, size = make_stage(tmp_path, sampled, refill=2)
    used = [count for _, count in steps(stage, Position(), 12)]
    assert set(used) >= {1.0, 2.0}
    numbers = [number for number, _ in sampled]
    assert numbers == list(range(int(sum(used))))
    prompts = [index for _, batch in sampled for index in batch]
    assert len(prompts) > 2 * size
    for start in range(0, len(prompts) - size, size):
        assert len(set(prompts[start : start + size])) == size


def test_a_position_is_all_that_the_next_batches_depend_on(tmp_path):
    whole, resumed = [], []
    stage, _ = make_stage(tmp_path, whole, refill=2, drop=('wrong', 'duplicates'))
    positions = [position for position, _ in steps(stage, Position(), 9)]
    saved = json.loads(json.dumps(positions[3].to_json()))
    stage, _ = make_stage(tmp_path, resumed, refill=2, drop=('wrong', 'duplicates'))
    again = [position for position, _ in steps(stage, Position.from_json(saved), 5)]
    assert again == positions[4:]
    assert resumed == whole[positions[3].next_batch :]


def test_without_refill_step_k_uses_batch_k(tmp_path):
    """In a later iteration the batches after those of the one before."""
    sampled = []
    stage, _ = make_stage(tmp_path, sampled)
    *_, (position, _) = steps(stage, Position(), 8)
    stage, _ = make_stage(tmp_path, sampled, iteration=2)
    *_, (position, _) = steps(stage, position._replace(step=0), 8)
    assert position._replace(tokens=0) == Position(8, 16)
    assert [number for number, _ in sampled] == list(range(16))


# Whole runs


CONFIG = {'refill': 2, 'drop': ('wrong', 'duplicates')}


@pytest.fixture(scope='module')
def finished_run(tmp_path_factory):
    workdir = tmp_path_factory.mktemp('dynamic') / 'run'
    runs.train(get_config(**CONFIG), workdir)
    return workdir


def position_of(workdir):
    with checkpoint.open_manager(workdir / 'checkpoints' / 'grpo', keep=9) as manager:
        return Position.from_json(checkpoint.restore_position(manager))


def test_a_completion_is_trained_on_once_in_a_run(finished_run):
    seen, used = set(), 0
    completions = report.read(finished_run / 'completions.jsonl', 'grpo')
    again = 0
    for row in report.read(finished_run / 'metrics.jsonl', 'grpo'):
        used += row['refill/batches']
        step = [r for r in completions if r['step'] == row['step']]
        assert len(step) == B * G
        right = [(r['prompt'], r['completion']) for r in step if r['reward'] > 0]
        again += len(set(right) & seen)
        assert row['completions/kept_ratio'] == pytest.approx(len(set(right) - seen) / (B * G))
        seen |= set(right)
    assert again, 'no completion was sampled in two steps'
    position = position_of(finished_run)
    assert (position.step, position.next_batch, len(position.trained)) == (8, used, len(seen))


@pytest.mark.parametrize('kind', ['killed', 'failed'])
def test_a_resumed_run_equals_an_unbroken_one(finished_run, tmp_path, monkeypatch, kind):
    workdir = tmp_path / 'run'
    if kind == 'killed':  # the newest checkpoint is an older one, and later rows are there
        shutil.copytree(finished_run, workdir)
        shutil.rmtree(workdir / 'checkpoints' / 'grpo' / '8')
        resumed = 6
    else:
        calls, lucky = itertools.count(), runs.lucky

        def failing(**columns):
            return 1 / 0 if next(calls) == 9 else lucky(**columns)

        monkeypatch.setattr(runs, 'lucky', failing)
        with pytest.raises(rewards.RewardError):
            runs.train(get_config(**CONFIG), workdir)
        resumed = position_of(workdir).step
        assert 0 < resumed < 8
        monkeypatch.setattr(runs, 'lucky', lucky)
    printed = runs.train(get_config(**CONFIG), workdir)
    assert f'grpo: resumed at step {resumed} of 8\n' in printed
    runs.assert_same_run(workdir, finished_run)
    assert position_of(workdir) == position_of(finished_run)
