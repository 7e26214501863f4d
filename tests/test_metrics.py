"""Metrics of completions and rewards by hand. Those of the loss are tested with the update."""

import jax.numpy as jnp
import numpy as np
import pytest

from grpo_jax.algorithm.metrics import rollout_metrics
from grpo_jax.types import Prompts, Rollout


def test_rollout_metrics_by_hand():
    prompts = Prompts(np.zeros((2, 4), np.int32), np.array([4, 2], np.int32), np.arange(2))
    ended = np.array([[True, True], [False, True]])
    mask = np.arange(5) < np.array([[2, 4], [5, 1]])[..., None]
    rollout = Rollout(prompts, np.zeros((2, 2, 5), np.int32), mask, np.zeros((2, 2, 5)), ended)
    rewards = jnp.array([[1.0, 0.0], [0.5, 0.5]])
    expected = {
        'reward': 0.5,
        'reward_std': (0.5 / 3) ** 0.5,  # of all four, as a sample
        'reward_std_in_group': 0.25,  # of [1, 0] it is 0.5, of [0.5, 0.5] nothing
        'frac_reward_zero_std': 0.5,
        'num_tokens': 4 + 2 + 2 + 4 + 5 + 1,
        'completions/mean_length': 3,
        'completions/min_length': 1,
        'completions/max_length': 5,
        'completions/mean_terminated_length': 7 / 3,
        'completions/min_terminated_length': 1,
        'completions/max_terminated_length': 4,
        'completions/clipped_ratio': 0.25,
    }
    ours = rollout_metrics(rollout, rewards)
    assert {name: float(ours[name]) for name in expected} == pytest.approx(expected)

    none = rollout_metrics(rollout._replace(ended=np.zeros((2, 2), bool)), rewards)
    for name in ('mean', 'min', 'max'):
        assert none[f'completions/{name}_terminated_length'] == 0
    assert none['completions/clipped_ratio'] == 1
