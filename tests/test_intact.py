"""Damaged checkpoints: found by their checksums, set aside or passed over, and said in one line."""

import json
import logging
import shutil
import time

import jax
import numpy as np
import pytest
import runs
import tiny

from grpo_jax import sharding, verify
from grpo_jax.algorithm.optimizer import adamw
from grpo_jax.run import checkpoint, checksums, hosts, intact, managers
from grpo_jax.types import TrainState

STEPS = (2, 4)


def damaged_by(how, path):
    """Damages a file; returns what is told about it."""
    data = path.read_bytes()
    if how == 'missing':
        path.unlink()
        return 'is missing'
    if how == 'bit':
        middle = len(data) // 2
        path.write_bytes(data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :])
        return 'has other content than was written'
    path.write_bytes(data[: len(data) // 2] if how == 'short' else b'')
    return f'has {path.stat().st_size} bytes in place of {len(data)}'


HOW = ('missing', 'empty', 'short', 'bit')


@pytest.fixture(scope='module')
def state(params):
    optimizer, _ = adamw(learning_rate=1e-3, steps=10)
    moments = jax.tree.map(np.asarray, optimizer.init(params))
    return TrainState(np.int32(4), jax.tree.map(np.asarray, params), moments, np.int32(0))


@pytest.fixture(scope='module')
def written(tmp_path_factory, state, rollout):
    """A run with two checkpoints that hold all that one can hold."""
    workdir = tmp_path_factory.mktemp('written')
    with checkpoint.open_manager(workdir / 'checkpoints' / 'grpo', keep=2) as manager:
        for step in STEPS:
            checkpoint.save(manager, step, state, rollout, {'step': step, 'trained': []})
            manager.wait_until_finished()
    return workdir


@pytest.fixture
def workdir(written, tmp_path):
    shutil.copytree(written, tmp_path / 'run')
    return tmp_path / 'run'


def files(folder):
    return sorted(path for path in folder.rglob('*') if path.is_file())


def read(workdir, name='', items=('params',)):
    """The checkpoint that a command reads."""
    return intact.read_newest(workdir, ('sft', 'grpo'), name, lambda *found: found, items)


def test_every_file_has_a_checksum(written):
    folder = written / 'checkpoints' / 'grpo' / '4'
    listed = json.loads((folder / checksums.FILE).read_text())
    found = {str(path.relative_to(folder)) for path in files(folder)} - {checksums.FILE}
    assert listed.keys() == found
    assert {name.split('/')[0] for name in found if '/' in name} == {
        'params', 'rest', 'sampled', 'position',
    }  # fmt: skip
    assert list(intact.verified(written)) == [('grpo/2', ''), ('grpo/4', '')]
    assert intact.newest_intact(written, 'grpo') == 4
    assert read(written) == ('grpo', 4)


@pytest.mark.parametrize('how', tiny.some_slow(HOW, 'empty', 'short'))
def test_a_damaged_file_leaves_the_checkpoint_before_it(written, tmp_path, caplog, how):
    """Each file in turn: a resumed run sets the checkpoint aside, commands pass over it."""
    names = [path.relative_to(written) for path in files(written / 'checkpoints' / 'grpo' / '4')]
    assert len(names) > 15
    for number, name in enumerate(names):
        workdir = tmp_path / str(number)
        shutil.copytree(written, workdir)
        told, unlisted = damaged_by(how, workdir / name), name.name == checksums.FILE
        item = name.parts[3]
        caplog.clear()
        if unlisted and how == 'missing':  # as in checkpoints of earlier versions
            assert intact.newest_intact(workdir, 'grpo') == 4
            assert [x for _, x in intact.verified(workdir)][1].startswith('has no checksums')
            continue
        told = 'checksums.json cannot be read' if unlisted and how != 'bit' else told
        # Parameters are read alone, and a bit of the checksums is one of another item.
        passed = (
            (unlisted and how != 'bit')
            or item == 'params'
            or (len(name.parts) == 4 and not unlisted)
        )
        assert read(workdir) == ('grpo', 2 if passed else 4)
        before = files(workdir)
        (first, second) = intact.verified(workdir)
        assert first == ('grpo/2', '')
        assert files(workdir) == before
        assert intact.newest_intact(workdir, 'grpo') == 2
        assert not (workdir / 'checkpoints' / 'grpo' / '4').exists()
        aside = workdir / 'damaged' / 'grpo-4'
        assert len(files(aside)) == len(names) - (how == 'missing')
        assert len(caplog.messages) == 1 + passed
        assert f'is moved to {aside}, and the one before it is used' in caplog.messages[-1]
        if not unlisted:
            expected = f'{"/".join(name.parts[3:])} {told}'
            assert all(expected in text for text in (second[1], *caplog.messages))


def test_half_of_the_files(workdir, caplog):
    folder = workdir / 'checkpoints' / 'grpo' / '4'
    for path in files(folder):
        if path.name != checksums.FILE:
            path.unlink()
    assert intact.newest_intact(workdir, 'grpo') == 2
    assert caplog.messages[0].count(' is missing') == 3
    assert ' more files' in caplog.messages[0]


def test_object_stores_have_checksums_too(tmp_path, monkeypatch, state):
    """There nothing is renamed: a file says that a checkpoint is complete."""
    assert checksums.temporary_path_class('gs://bucket/run') is checksums.Committed
    assert checksums.temporary_path_class(tmp_path) is checksums.Renamed
    monkeypatch.setattr(managers, 'temporary_path_class', lambda path: checksums.Committed)
    folder = tmp_path / 'checkpoints' / 'grpo'
    with checkpoint.open_manager(folder, keep=2) as manager:
        checkpoint.save(manager, 2, state)
        manager.wait_until_finished()
    assert list(intact.verified(tmp_path)) == [('grpo/2', '')]
    assert 'commit_success.txt' in json.loads((folder / '2' / checksums.FILE).read_text())
    damaged_by('missing', folder / '2' / 'params' / 'manifest.ocdbt')
    assert 'params/manifest.ocdbt is missing' in dict(intact.verified(tmp_path))['grpo/2']


def test_a_second_damaged_checkpoint_of_a_step_has_its_own_name(workdir):
    for name in ('grpo-4', 'grpo-4-2'):
        copy = workdir / 'copy'
        shutil.copytree(workdir / 'checkpoints' / 'grpo' / '4', copy)
        (workdir / 'checkpoints' / 'grpo' / '4' / 'params' / 'manifest.ocdbt').write_bytes(b'')
        assert intact.newest_intact(workdir, 'grpo') == 2
        assert (workdir / 'damaged' / name).is_dir()
        copy.rename(workdir / 'checkpoints' / 'grpo' / '4')


def test_a_damaged_checkpoint_that_is_named_is_an_error(workdir):
    damaged_by('short', workdir / 'checkpoints' / 'grpo' / '4' / 'params' / 'manifest.ocdbt')
    for name in ('grpo/4', '4'):
        with pytest.raises(ValueError, match=r'^checkpoint grpo/4 of .* is damaged \(params/mani'):
            read(workdir, name)
    assert read(workdir, 'grpo') == ('grpo', 2)
    assert read(workdir, 'grpo/2') == ('grpo', 2)


def test_if_none_is_intact_all_are_named_and_kept(workdir):
    for step in STEPS:
        folder = workdir / 'checkpoints' / 'grpo' / str(step)
        damaged_by('empty', folder / 'params' / 'manifest.ocdbt')
    message = r'no checkpoint is intact in .*: grpo/4, grpo/2 \(the newest: params/.*\); restore'
    for reads in (read, lambda folder: intact.newest_intact(folder, 'grpo')):
        with pytest.raises(ValueError, match=message):
            reads(workdir)
    assert checkpoint.steps_of_stages(workdir) == {'grpo': [2, 4]}


def test_the_command_checks_all(workdir, monkeypatch, capsys):
    def run(*arguments):
        monkeypatch.setattr('sys.argv', ['verify', *arguments])
        with pytest.raises(SystemExit) as stopped:
            verify.run()
        return stopped.value.code, capsys.readouterr()

    status, printed = run(f'--workdir={workdir}')
    assert (status, printed.out) == (0, 'grpo/2: intact\ngrpo/4: intact\n')
    damaged_by('bit', workdir / 'checkpoints' / 'grpo' / '2' / 'rest' / 'manifest.ocdbt')
    status, printed = run(f'--workdir={workdir}')
    assert status == 1
    expected = 'grpo/2: rest/manifest.ocdbt has other content than was written\ngrpo/4: intact\n'
    assert printed.out == expected
    for arguments, message in (
        ((), 'give --workdir=FOLDER'),
        (('--workdir=a', '--fix'), "unexpected argument '--fix'"),
        ((f'--workdir={workdir / "none"}',), 'none holds no checkpoint'),
    ):
        status, printed = run(*arguments)
        assert status == 2
        assert message in printed.err


def test_other_files_disturb_nothing(workdir, state):
    """Neither in the folder of a checkpoint, nor beside it, nor beside the stages."""
    for name in ('notes.txt', 'grpo/notes.txt', 'grpo/9.txt', 'grpo/4/notes.txt', 'sft-old/1/a'):
        path = workdir / 'checkpoints' / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text('a')
    (workdir / 'checkpoints' / 'grpo' / '7 (copy)').mkdir()
    (workdir / 'checkpoints' / 'grpo' / '.cache').mkdir()
    assert checkpoint.steps_of_stages(workdir) == {'grpo': [2, 4]}
    assert list(intact.verified(workdir)) == [('grpo/2', ''), ('grpo/4', '')]
    with checkpoint.open_manager(workdir / 'checkpoints' / 'grpo', keep=2) as manager:
        restored = checkpoint.restore(manager, state, sharding.make_mesh())
        assert tiny.same(restored, state)
        checkpoint.save(manager, 6, state)
        manager.wait_until_finished()
    assert checkpoint.steps_of_stages(workdir) == {'grpo': [4, 6]}
    assert (workdir / 'checkpoints' / 'grpo' / '7 (copy)').is_dir()
    assert (workdir / 'checkpoints' / 'notes.txt').exists()


def test_every_so_many_steps_a_checkpoint_is_kept(tmp_path):
    folder = tmp_path / 'checkpoints' / 'grpo'
    tree = TrainState(np.int32(0), {'x': np.ones(2)}, (), np.int32(0))
    with checkpoint.open_manager(folder, keep=1, keep_every=4) as manager:
        for step in range(2, 12, 2):
            checkpoint.save(manager, step, tree)
        manager.wait_until_finished()
    assert checkpoint.steps_of_stages(tmp_path) == {'grpo': [4, 8, 10]}


@pytest.mark.parametrize(('best', 'kept'), [('eval/a', [4, 10]), ('-eval/a', [6, 10])])
def test_the_best_checkpoint_is_kept(tmp_path, best, kept):
    """Of those with the metric; also by a process that has written none of them."""
    folder = tmp_path / 'checkpoints' / 'grpo'
    tree = TrainState(np.int32(0), {'x': np.ones(2)}, (), np.int32(0))
    values = {2: {'eval/a': 0.5}, 4: {'eval/a': 0.9}, 6: {'eval/a': 0.1}, 8: {}, 10: {'b': 1.0}}
    for step, metrics in values.items():
        with checkpoint.open_manager(folder, keep=1, best=best) as manager:
            checkpoint.save(manager, step, tree, metrics=metrics)
            manager.wait_until_finished()
    assert checkpoint.steps_of_stages(tmp_path) == {'grpo': kept}
    assert all(not problem for _, problem in intact.verified(tmp_path))


def test_a_damaged_older_checkpoint_does_not_stop_a_run(workdir, state):
    """It is not read; Orbax reads the metadata of all when it opens a folder."""
    for name in ('_CHECKPOINT_METADATA', 'commit_success.txt', 'params/_METADATA'):
        (workdir / 'checkpoints' / 'grpo' / '2' / name).write_bytes(b'')
    assert intact.newest_intact(workdir, 'grpo') == 4
    with checkpoint.open_manager(workdir / 'checkpoints' / 'grpo', keep=2) as manager:
        assert tiny.same(checkpoint.restore(manager, state, sharding.make_mesh()), state)
        checkpoint.save(manager, 6, state)
        manager.wait_until_finished()
    assert checkpoint.steps_of_stages(workdir) == {'grpo': [4, 6]}


def test_a_manager_that_reads_leaves_what_is_being_written(workdir):
    folder = workdir / 'checkpoints' / 'grpo'
    (folder / '6.orbax-checkpoint-tmp').mkdir()
    with checkpoint.open_to_read(folder) as manager:
        assert manager.all_steps() == [2, 4]
    assert (folder / '6.orbax-checkpoint-tmp').exists()
    checkpoint.open_manager(folder, keep=2).close()
    deadline = time.monotonic() + 30  # Orbax removes it in the background
    while (folder / '6.orbax-checkpoint-tmp').exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not (folder / '6.orbax-checkpoint-tmp').exists()


def test_a_checkpoint_that_the_run_removes_meanwhile_is_not_damaged(workdir, monkeypatch, caplog):
    """`evaluate` while `train` goes on: the newest one is found again."""
    damage = checksums.damage

    def removed(folder, items=()):
        if folder.name == '4':
            shutil.move(folder, folder.parent / '8')
        return damage(folder, items)

    monkeypatch.setattr(checksums, 'damage', removed)
    assert read(workdir) == ('grpo', 8)
    assert not caplog.messages


def test_what_orbax_cannot_read_without_checksums_is_damaged(workdir, caplog):
    (workdir / 'checkpoints' / 'grpo' / '4' / checksums.FILE).unlink()

    def fail(stage, step):
        if step == 4:
            raise KeyError('x')
        return step

    assert intact.read_newest(workdir, ('grpo',), '', fail, ('params',)) == 2
    assert "grpo/4 is damaged (KeyError: 'x')" in caplog.text
    with pytest.raises(KeyError):
        intact.read_newest(workdir, ('grpo',), 'grpo/2', lambda *_: {}['y'], ('params',))


def test_a_run_with_damaged_checkpoints_ends_as_an_unbroken_one(finished, tmp_path, caplog):
    """Of both stages: what SFT had is computed again, and the records of GRPO stay."""
    workdir = tmp_path / 'run'
    shutil.copytree(finished, workdir)
    for name in ('sft/5', 'grpo/8'):
        damaged_by('bit', max(files(workdir / 'checkpoints' / name / 'params' / 'd')))
    with caplog.at_level(logging.WARNING):
        printed = runs.train(runs.get_config(), workdir)
    assert 'sft: resumed at step 3 of 5\n' in printed
    assert 'grpo: resumed at step 6 of 8\n' in printed
    assert [text.partition(' is damaged')[0] for text in caplog.messages] == [
        'checkpoint sft/5', 'checkpoint grpo/8',
    ]  # fmt: skip
    runs.assert_same_run(workdir, finished)
    assert all(not problem for _, problem in intact.verified(workdir))


def test_several_processes_take_what_the_first_has_found(workdir, monkeypatch):
    asked = []

    def from_first(function, what):
        asked.append(what)
        return json.loads(json.dumps(function()))

    monkeypatch.setattr(hosts, 'from_first', from_first)
    assert read(workdir) == ('grpo', 4)
    assert asked == ['choosing a checkpoint']
