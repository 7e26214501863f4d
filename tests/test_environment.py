"""Versions and devices that compute a run, and the record of their changes."""

import json

import jax
import pytest
import runs

from grpo_jax.run import environment
from grpo_jax.sharding import make_mesh


@pytest.mark.parametrize('steps', [{'grpo': [3, 6]}, {'grpo': []}])
def test_changes_are_recorded_where_there_are_checkpoints(tmp_path, steps):
    mesh = make_mesh(fsdp=2, devices=jax.devices()[:2])
    for _ in range(2):  # the second is the same
        environment.keep_environment(mesh, tmp_path, steps)
    kept = environment.read_environment(tmp_path)
    assert kept['jax'] == jax.__version__
    assert kept['devices'] == f'2 {jax.devices()[0].device_kind}'
    assert not (tmp_path / 'changes.jsonl').exists()
    file = tmp_path / 'environment.json'
    file.write_text(json.dumps(kept | {'jax': '0.9.9'}))
    environment.keep_environment(mesh, tmp_path, steps)
    assert environment.read_environment(tmp_path) == kept
    changes = tmp_path / 'changes.jsonl'
    recorded = runs.lines(changes) if changes.exists() else []
    change = {'jax': {'from': '0.9.9', 'to': jax.__version__}}
    expected = [{'stage': 'grpo', 'step': 6, 'changes': change}]
    assert recorded == (expected if steps['grpo'] else [])


def test_a_run_of_an_earlier_version_has_kept_nothing(tmp_path):
    assert environment.read_environment(tmp_path) == {}
