"""Checkpoints in a bucket, against a server of Google Cloud Storage's API on the loopback."""

import importlib
import os
import pathlib
import shutil
import subprocess
import sys
import threading
import time

import host_runs
import jax
import numpy as np
import pytest
import runs
import tiny

from grpo_jax import evaluate, export, replay, sharding, verify
from grpo_jax.algorithm.optimizer import adamw
from grpo_jax.run import buckets, checkpoint, checksums, intact, layout
from grpo_jax.types import TrainState

pytestmark = pytest.mark.slow

REASON = 'needs gcsfs: pip install gcsfs'


@pytest.fixture(scope='module')
def server():
    """A server with the bucket `runs`, which all clients in this process use from now on."""
    with pytest.MonkeyPatch.context() as patch:
        # It would ask for the kind of each bucket by another protocol.
        patch.setenv('GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT', 'false')
        pytest.importorskip('gcsfs', reason=REASON)
        bucket_server = importlib.import_module('bucket_server')  # needs what gcsfs does
        made = bucket_server.Buckets(0, ['runs', 'others'])
        threading.Thread(target=made.serve_forever, daemon=True).start()
        for name in ('STORAGE_EMULATOR_HOST', 'TENSORSTORE_GCS_HTTP_URL'):
            patch.setenv(name, f'http://127.0.0.1:{made.server_port}')
        patch.setenv('GOOGLE_CLOUD_PROJECT', 'test')
        yield made
    made.shutdown()


@pytest.fixture(scope='module')
def state(params):
    optimizer, _ = adamw(learning_rate=1e-3, steps=10)
    moments = jax.tree.map(np.asarray, optimizer.init(params))
    return TrainState(np.int32(4), jax.tree.map(np.asarray, params), moments, np.int32(0))


@pytest.fixture
def written(server, state, rollout, tmp_path):
    """The folder in the bucket of a run with the checkpoints 4 and 6."""
    server.objects['runs'].clear()
    folder = 'gs://runs/exp/a'
    with checkpoint.open_manager(layout.checkpoints(tmp_path, folder) / 'grpo', keep=2) as manager:
        for step in (2, 4, 6):
            checkpoint.save(manager, step, state, rollout, {'step': step, 'trained': []})
    return folder


def test_checkpoints_are_kept_and_restored(server, written, state, rollout, tmp_path):
    assert checkpoint.steps_of_stages(tmp_path, written) == {'grpo': [4, 6]}
    assert not [name for name in server.objects['runs'] if name.startswith('exp/a/grpo/2')]
    assert list(tmp_path.iterdir()) == []
    mesh = sharding.make_mesh(fsdp=1)
    with checkpoint.open_to_read(layout.checkpoints(tmp_path, written) / 'grpo') as manager:
        assert tiny.same(checkpoint.restore(manager, state, mesh), state)
        assert tiny.same(checkpoint.restore_samples(manager, mesh, 4), rollout)
        assert checkpoint.restore_position(manager, 4) == {'step': 4, 'trained': []}


def test_checksums_download_nothing(server, written, tmp_path):
    server.reads.clear()
    assert list(intact.verified(tmp_path, written)) == [('grpo/4', ''), ('grpo/6', '')]
    assert {os.path.basename(name) for name, _ in server.reads} == {checksums.FILE}


DAMAGE = {
    'missing': (lambda data: None, 'is missing'),
    'empty': (lambda data: b'', 'has 0 bytes in place of'),
    'short': (lambda data: data[: len(data) // 2], 'bytes in place of'),
    'bit': (lambda data: bytes([data[0] ^ 1]) + data[1:], 'has other content than was written'),
}


@pytest.mark.parametrize('how', DAMAGE)
def test_a_damaged_object_leaves_the_checkpoint_before_it(server, written, tmp_path, how, caplog):
    """Each object in turn; what is set aside keeps all that is left of it."""
    intact_objects = dict(server.objects['runs'])
    names = [name for name in intact_objects if name.startswith('exp/a/grpo/6/')]
    assert len(names) > 15
    change, told = DAMAGE[how]
    for name in names:
        inner = name.removeprefix('exp/a/grpo/6/')
        objects = server.objects['runs'] = dict(intact_objects)
        generation, data = objects.pop(name)
        if (changed := change(data)) is not None:
            objects[name] = (generation + 1000, changed)
        if inner == 'commit_success.txt' and how == 'missing':  # as of a save that was cut off
            assert checkpoint.steps_of_stages(tmp_path, written) == {'grpo': [4]}
            continue
        if inner == checksums.FILE:
            continue
        caplog.clear()
        assert intact.newest_intact(tmp_path, 'grpo', written) == 4
        assert f'{inner} ' in caplog.messages[0]
        assert told in caplog.messages[0]
        assert checkpoint.steps_of_stages(tmp_path, written) == {'grpo': [4]}
        moved = {x for x in objects if x.startswith('exp/a/damaged-grpo-6/')}
        left = {
            x.replace('/grpo/', '/damaged-grpo-') for x in names if x != name or changed is not None
        }
        assert moved == left - {'exp/a/damaged-grpo-6/commit_success.txt'}
        assert not [x for x in objects if x.startswith('exp/a/grpo/6/')]


def test_a_save_that_was_cut_off_is_removed(server, written, state, tmp_path):
    del server.objects['runs']['exp/a/grpo/6/commit_success.txt']
    folder = layout.checkpoints(tmp_path, written) / 'grpo'
    with checkpoint.open_manager(folder, keep=2) as manager:
        assert manager.all_steps() == [4]
        checkpoint.save(manager, 6, state)
    assert list(intact.verified(tmp_path, written)) == [('grpo/4', ''), ('grpo/6', '')]


def download(server, prefix, folder):
    """Copies objects into a folder, as `gcloud storage cp` does."""
    for name, (_, data) in server.objects['runs'].items():
        if name.startswith(prefix):
            path = folder / name.removeprefix(prefix)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)


def test_a_copy_in_a_folder_is_checked_by_the_checksums_of_the_bucket(server, written, tmp_path):
    download(server, 'exp/a/', tmp_path / 'checkpoints')
    assert list(intact.verified(tmp_path)) == [('grpo/4', ''), ('grpo/6', '')]
    path = next((tmp_path / 'checkpoints' / 'grpo' / '6' / 'params').rglob('d/*'))
    path.write_bytes(path.read_bytes()[:-1] + b'?')
    assert 'has other content than was written' in dict(intact.verified(tmp_path))['grpo/6']


def test_a_copy_in_a_bucket_is_checked_by_the_checksums_of_the_files(server, state, tmp_path):
    server.objects['runs'].clear()
    with checkpoint.open_manager(tmp_path / 'checkpoints' / 'grpo', keep=2) as manager:
        checkpoint.save(manager, 2, state)
    for path in (tmp_path / 'checkpoints').rglob('*'):
        if path.is_file():
            name = f'copy/{path.relative_to(tmp_path / "checkpoints")}'
            server.objects['runs'][name] = (1, path.read_bytes())
    assert list(intact.verified(tmp_path, 'gs://runs/copy')) == [('grpo/2', '')]


@pytest.mark.parametrize('killed', ['grpo/6/', 'sft/5/'])
def test_a_run_is_the_same_as_in_a_folder(server, finished, tmp_path, monkeypatch, killed):
    """Killed while a checkpoint is written, and resumed by the same command."""
    server.objects['runs'].clear()
    workdir, folder = tmp_path / 'run', 'gs://runs/exp/b'
    arguments = [f'--config={runs.__file__}', f'--workdir={workdir}']
    arguments.append(f'--config.checkpoint.folder={folder}')
    environment = {
        'JAX_NUM_CPU_DEVICES': str(jax.device_count()),
        'JAX_DISABLE_MOST_OPTIMIZATIONS': '1',
        'JAX_COMPILATION_CACHE_DIR': os.environ['GRPO_JAX_TEST_PROGRAMS'],
        'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS': '0',
        'JAX_PERSISTENT_CACHE_ENABLE_XLA_CACHES': 'none',
    }
    process = subprocess.Popen(
        [sys.executable, '-m', 'grpo_jax.train', *arguments],
        cwd=pathlib.Path(runs.__file__).parents[1], env=os.environ | environment,
    )  # fmt: skip
    while not any(name.startswith(f'exp/b/{killed}') for name in [*server.objects['runs']]):
        assert process.poll() is None
        time.sleep(0.001)
    process.kill()
    process.wait()
    assert f'exp/b/{killed}commit_success.txt' not in server.objects['runs']
    config = runs.get_config()
    config.checkpoint.folder = folder
    runs.train(config, workdir)
    assert not (workdir / 'checkpoints').exists()
    download(server, 'exp/b/', workdir / 'checkpoints')
    runs.assert_same_run(workdir, finished)
    shutil.rmtree(workdir / 'checkpoints')

    server.reads.clear()
    assert verify.main(str(workdir))
    assert {os.path.basename(name) for name, _ in server.reads} == {checksums.FILE}
    outputs = []
    for run, name in ((workdir, 'ours'), (finished, 'theirs')):
        for module, output in ((evaluate, f'{name}.jsonl'), (export, name)):
            monkeypatch.setattr(
                'sys.argv', ['x', f'--workdir={run}', f'--output={tmp_path / output}']
            )
            with runs.compiled_once():
                module.run()
        files = [tmp_path / f'{name}.jsonl', *sorted((tmp_path / name).iterdir())]
        outputs.append([path.read_bytes() for path in files])
    assert outputs[0] == outputs[1]
    monkeypatch.setattr('sys.argv', ['replay', f'--workdir={workdir}', '--step=7'])
    with runs.compiled_once():
        replay.run()


def test_two_machines_without_a_shared_folder(server, tmp_path):
    """One of two processes fails; the run goes on, and is that of one process."""
    server.objects['runs'].clear()
    folder = 'gs://runs/pod'
    arguments = [
        f'--config={host_runs.__file__}', f'--workdir={tmp_path}/host-{{process}}',
        f'--config.checkpoint.folder={folder}',
    ]  # fmt: skip
    failing = {'HOST_RUNS_FAILURE': 'raise', 'HOST_RUNS_VICTIM': '1'}
    results = host_runs.Processes('train', 2, arguments, failing).wait()
    assert [status for status, _, _ in results] == [2, 2], results
    assert checkpoint.steps_of_stages(tmp_path, folder) == {'grpo': [2]}
    assert 'grpo: resumed at step 2 of 3' in host_runs.run('train', 2, *arguments)
    assert list(intact.verified(tmp_path, folder)) == [('grpo/2', ''), ('grpo/3', '')]
    assert [path.name for path in (tmp_path / 'host-1').iterdir()] == ['process-1']
    host_runs.train(tmp_path / 'reference', 1)
    download(server, 'pod/', tmp_path / 'host-0' / 'checkpoints')
    difference = host_runs.largest_difference(tmp_path / 'host-0', tmp_path / 'reference')
    assert difference <= 1e-6


def test_a_bucket_that_does_not_exist(server, tmp_path):
    config = runs.get_config()
    config.checkpoint.folder = 'gs://nowhere/a'
    with pytest.raises(
        ValueError, match=r'gs://nowhere cannot be used: it does not exist: .*creat'
    ):
        checkpoint.check_workdir(str(tmp_path), config)


@pytest.mark.parametrize(
    ('status', 'message'),
    [(401, 'there are no credentials'), (403, 'give it the roles'), (400, 'try again')],
)
def test_a_bucket_without_access(server, status, message, tmp_path):
    config = runs.get_config()
    config.checkpoint.folder = 'gs://others/a'
    buckets._bucket.cache_clear()
    server.refused['others'] = status
    with pytest.raises(ValueError, match=f'gs://others cannot be used: .*{message}') as caught:
        checkpoint.check_workdir(str(tmp_path), config)
    assert '\n' not in str(caught.value)
    server.refused.clear()
    buckets.open_folder('gs://others/a')
    server.refused['others'] = status
    with pytest.raises(ValueError, match=message):
        checkpoint.check_workdir(str(tmp_path), config)
    server.refused.clear()


def test_without_credentials(server, tmp_path, monkeypatch):
    monkeypatch.delenv('STORAGE_EMULATOR_HOST')
    monkeypatch.setenv('NO_GCE_CHECK', 'true')
    monkeypatch.setenv('HOME', str(tmp_path))
    monkeypatch.setenv('CLOUDSDK_CONFIG', str(tmp_path))
    buckets._bucket.cache_clear()
    with pytest.raises(ValueError, match='there are no credentials: run `gcloud auth application-'):
        buckets.open_folder('gs://runs/a')
