"""Runs that sample one step ahead of the update: stale by one update, and exact when resumed."""

import shutil

import pytest
import runs

from grpo_jax import rewards
from grpo_jax.run import report


def get_config(**options):
    config = runs.get_config()
    config.grpo.update(ahead=True, **options)
    config.grpo.algorithm.importance = 'token'
    return config


@pytest.fixture(scope='module')
def ahead(tmp_path_factory):
    """A finished run."""
    workdir = tmp_path_factory.mktemp('ahead') / 'run'
    runs.train(get_config(), workdir)
    return workdir


def test_samples_are_one_update_old(ahead, tmp_path):
    rows = report.read(ahead / 'metrics.jsonl', 'grpo')
    gaps = [row['sampling/sampling_logp_difference/max'] for row in rows]
    assert gaps[0] < 1e-4
    assert min(gaps[1:]) > 1e-3
    # The policy of before the first update, which sampled steps 0 and 1, stays with a rate of 0.
    config = get_config()
    config.grpo.ahead = False
    config.grpo.optimizer.learning_rate = 0.0
    runs.train(config, tmp_path)
    still, moving = (
        [[row for row in report.read(path / 'completions.jsonl', 'grpo') if row['step'] == k]
         for k in range(8)]
        for path in (tmp_path, ahead)
    )  # fmt: skip
    assert [a == b for a, b in zip(still, moving, strict=True)][:2] == [True, True]
    assert still != moving


def test_a_run_that_is_stopped_goes_on_with_what_it_had_sampled(ahead, tmp_path, monkeypatch):
    config = get_config()
    bonus = runs.bonus
    for failing in (5, 0, 2):  # calls until a reward fails
        left = iter(range(failing))

        def reward(left=left, **columns):
            return 1 / 0 if next(left, None) is None else bonus(**columns)

        monkeypatch.setattr(runs, 'bonus', reward)
        with pytest.raises(rewards.RewardError):
            runs.train(config, tmp_path / 'stopped')
    steps = [row['step'] for row in report.read(tmp_path / 'stopped' / 'metrics.jsonl', 'grpo')]
    assert steps == list(range(7))
    monkeypatch.setattr(runs, 'bonus', bonus)
    printed = runs.train(config, tmp_path / 'stopped')
    assert printed.startswith('sft: resumed at step 5 of 5\ngrpo: resumed at step 7 of 8\n')
    runs.assert_same_run(tmp_path / 'stopped', ahead)


def test_a_run_goes_on_from_a_checkpoint_between(ahead, tmp_path, monkeypatch):
    """As after a kill: the newest checkpoint is an older one, and later rows are made anew."""
    shutil.copytree(ahead, tmp_path / 'run')
    shutil.rmtree(tmp_path / 'run' / 'checkpoints' / 'grpo' / '8')
    printed = runs.train(get_config(), tmp_path / 'run')
    assert 'grpo: resumed at step 6 of 8\n' in printed
    runs.assert_same_run(tmp_path / 'run', ahead)
