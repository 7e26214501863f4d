"""A run whose reward function crashes: it stops with a checkpoint, or goes on without rewards."""

import logging

import pytest
import runs

from grpo_jax.rewards import RewardError
from grpo_jax.run import report

NAME = 'hostile_rewards:crashes_on_some'


def get_config(most):
    config = runs.get_config()
    config.grpo.rewards = {
        'runs:lucky': 1.0,
        NAME: {
            'weight': 0.5,
            'call': {'isolated': True, 'on_error': 'none', 'per': 'completion', 'timeout': 60},
        },
    }
    config.grpo.reward_calls.max_failed = most
    config.grpo.steps = 4
    config.eval.every = 4
    return config


@pytest.mark.slow
def test_a_run_with_a_reward_function_that_crashes(tmp_path, caplog):
    message = (
        rf"reward '{NAME}' failed on \d+ completions of a step, and .*max_failed allows 0; .*ended"
    )
    with pytest.raises(RewardError, match=message):
        runs.train(get_config(0.0), tmp_path)
    done = len(report.read(tmp_path / 'metrics.jsonl', 'grpo'))
    assert (tmp_path / 'checkpoints' / 'grpo' / str(done)).is_dir() == (done > 0)
    with caplog.at_level(logging.WARNING):
        runs.train(get_config(1.0), tmp_path, override=True)
    metrics = report.read(tmp_path / 'metrics.jsonl', 'grpo')
    assert len(metrics) == 4
    failed = [row.get(f'rewards/{NAME}/failed', 0.0) for row in metrics]
    assert sum(failed) > 0
    assert failed == [row.get('rewards/skipped', 0.0) for row in metrics]
    assert f"reward '{NAME}' failed on" in caplog.text
    records = report.read(tmp_path / 'completions.jsonl', 'grpo')
    lost = [row for row in records if row['rewards'][NAME] is None]
    assert len(lost) == sum(failed)
    assert all(row['reward'] is None for row in lost)
