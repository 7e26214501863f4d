"""Processes on machines without a shared file system: a workdir each, checkpoints in one folder."""

import contextlib
import json
import os

import host_runs
import pytest
import runs

from grpo_jax.run import checkpoint, hosts, process_folder
from grpo_jax.run.hosts import agreement


def test_one_process_has_the_workdir():
    config = runs.get_config()
    config.checkpoint.folder = 'gs://a/b'
    assert process_folder.own_folder(config, 'run') == 'run'


@pytest.fixture
def second(monkeypatch):
    """As if this were the second process, which does not see the workdir of the first."""
    for name, value in (('count', 2), ('index', 1), ('is_seen', False)):
        monkeypatch.setattr(hosts, name, lambda *_, value=value: value)
    monkeypatch.setattr(hosts, 'from_first', lambda function, what: function())
    monkeypatch.setattr(hosts, 'together', lambda what: contextlib.nullcontext())


def test_a_process_reads_the_config_of_the_first(second, tmp_path):
    config, workdir = runs.get_config(), str(tmp_path)
    assert process_folder.own_folder(config, workdir) == workdir  # which is refused later
    config.checkpoint.folder = 'gs://a/b'
    own = tmp_path / 'process-1'
    assert process_folder.own_folder(config, workdir) == str(own)
    assert list(own.iterdir()) == []
    (tmp_path / 'config.json').write_text('{}')
    process_folder.own_folder(config, workdir)
    assert (own / 'config.json').read_text() == '{}'
    (tmp_path / 'config.json').unlink()  # the first begins again
    process_folder.own_folder(config, workdir)
    assert list(own.iterdir()) == []


def test_replayed_samples_need_a_shared_workdir(second, tmp_path):
    config = runs.get_config()
    config.checkpoint.folder = 'gs://a/b'
    config.reward_model.update(steps=1, replay=0.1)
    process_folder.own_folder(config, str(tmp_path))
    config.grpo.iterations = 2
    with pytest.raises(ValueError, match=r'reward_model.replay=0.1 reads .* or set it to 0'):
        process_folder.own_folder(config, str(tmp_path))


@pytest.mark.parametrize('folder', ['', '/elsewhere'])
def test_checkpoints_have_to_be_shared(folder, tmp_path, monkeypatch):
    config = runs.get_config()
    config.checkpoint.folder = folder
    monkeypatch.setattr(agreement, 'is_seen', lambda path: str(path) not in (folder, str(tmp_path)))
    name = 'checkpoint.folder' if folder else 'workdir'
    with pytest.raises(ValueError, match=f"{name} '.*' is another folder than that of process 0"):
        process_folder.check_shared(config, tmp_path)


def command(folder, *changes):
    """In folders of the machines `host-0` and `host-1`."""
    return [f'--config={host_runs.__file__}', f'--workdir={folder}/host-{{process}}/run', *changes]


def ended(folder, *changes, **variables):
    """The status and the last line of the error of both processes."""
    results = host_runs.Processes('train', 2, command(folder, *changes), variables).wait()
    return [(status, (err.splitlines() or [''])[-1]) for status, _, err in results]


@pytest.mark.slow
def test_a_run_is_that_of_one_process(tmp_path):
    saved, reference = tmp_path / 'saved', tmp_path / 'reference'
    place = f'--config.checkpoint.folder={saved}'
    failing = {'HOST_RUNS_FAILURE': 'raise', 'HOST_RUNS_VICTIM': '1'}
    (status, line), other = ended(tmp_path, place, **failing)
    assert (status, line) == other
    assert (status, 'no such answer' in line) == (2, True)
    assert checkpoint.steps_of_stages(tmp_path, str(saved)) == {'grpo': [2]}
    here, there = (tmp_path / f'host-{k}' / 'run' for k in range(2))
    assert not (here / 'checkpoints').exists()
    assert [path.name for path in there.iterdir()] == ['process-1']
    assert not (there / 'process-1' / 'config.json').exists()  # that the first had at its start

    (status, line), other = ended(tmp_path, place, '--config.seed=7')
    assert (status, line) == other
    assert (status, 'holds the run of another config: seed (there 0, here 7)' in line) == (2, True)

    assert [status for status, _ in ended(tmp_path, place)] == [0, 0]
    host_runs.train(reference, 1)
    os.symlink(saved, here / 'checkpoints')
    assert host_runs.largest_difference(here, reference) <= 1e-6
    ours, theirs = (host_runs.rows(path / 'completions.jsonl') for path in (here, reference))
    assert json.dumps(ours) == json.dumps(theirs)
    assert json.loads((there / 'process-1' / 'config.json').read_text())['seed'] == 0
