"""Checkpoints in another folder than the workdir: the key `checkpoint.folder`."""

import filecmp
import json
import os
import shutil

import pytest
import runs

from grpo_jax import evaluate, export, replay, verify
from grpo_jax.run import buckets, checkpoint, layout, listing, parameters, paths, saved_config
from grpo_jax.run import setup as setups
from grpo_jax.run.defaults import defaults
from grpo_jax.run.start import Start, with_start
from grpo_jax.run.training import train

FOLDER = 'bucket/of/runs'


@pytest.fixture(scope='module')
def moved(finished, tmp_path_factory):
    """A copy of the shared run whose checkpoints are in another folder."""
    return moved_to(tmp_path_factory.mktemp('moved'), finished)


def moved_to(base, finished):
    workdir, folder = base / 'run', base / FOLDER
    shutil.copytree(finished, workdir)
    folder.parent.mkdir(parents=True)
    (workdir / 'checkpoints').rename(folder)
    saved = saved_config.read(workdir / 'config.json', quiet=True)
    saved.checkpoint.folder = str(folder)
    (workdir / 'config.json').write_text(saved_config.to_json(saved))
    return workdir, folder


def config_of(folder):
    config = runs.get_config()
    config.checkpoint.folder = str(folder)
    return config


def same_run(workdir, folder, finished):
    """As `runs.assert_same_run`, with the checkpoints in `folder`."""
    assert not (workdir / 'checkpoints').exists()
    os.symlink(folder, workdir / 'checkpoints')
    runs.assert_same_run(workdir, finished)
    (workdir / 'checkpoints').unlink()


def command(module, monkeypatch, *arguments):
    monkeypatch.setattr('sys.argv', ['command', *arguments])
    with runs.compiled_once():
        module.run()


def files(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob('*') if p.is_file()}


def test_a_run_is_resumed_there(finished, tmp_path):
    workdir, folder = moved_to(tmp_path, finished)
    newest = folder / 'grpo' / '8' / 'params' / 'manifest.ocdbt'
    assert newest.exists()
    newest.write_bytes(b'')
    (folder / 'notes.txt').touch()
    runs.train(config_of(folder), workdir)
    same_run(workdir, folder, finished)
    assert (folder / 'damaged-grpo-8').is_dir()
    assert not (workdir / 'damaged').exists()
    assert listing.steps_of_stages(workdir, str(folder)).keys() == {'sft', 'grpo'}


def test_commands_find_it(moved, finished, tmp_path, monkeypatch, capsys):
    workdir, folder = moved
    assert verify.main(str(workdir))
    printed = capsys.readouterr().out
    assert 'grpo/8: intact' in printed
    for run, name in ((workdir, 'ours'), (finished, 'theirs')):
        output = f'--output={tmp_path / name}.jsonl'
        command(evaluate, monkeypatch, f'--workdir={run}', output)
        command(export, monkeypatch, f'--workdir={run}', f'--output={tmp_path / name}')
    assert filecmp.cmp(tmp_path / 'ours.jsonl', tmp_path / 'theirs.jsonl', shallow=False)
    assert files(tmp_path / 'ours') == files(tmp_path / 'theirs')
    before = files(folder)
    command(replay, monkeypatch, f'--workdir={workdir}', '--step=7')
    assert 'parameters and moments of the checkpoint grpo/8' in capsys.readouterr().out
    assert files(folder) == before


def test_another_run_starts_from_it(moved, tmp_path):
    workdir, _ = moved
    config = runs.get_config()
    config.sft.steps, config.start = 0, f'{workdir}:sft'
    config = with_start(config, str(tmp_path))
    assert config.start == f'{workdir}:sft/5'
    assert config.checkpoint.folder == ''
    setup = setups.prepare(config, tmp_path)
    assert parameters.newest_policy(parameters._start_setup(setup), 'sft/5').name == 'sft/5'


def test_a_run_does_not_begin_anew_in_another_folder(moved, tmp_path):
    workdir, folder = moved
    other = tmp_path / 'other'
    records = {name: (workdir / name).read_bytes() for name in runs.FILES}
    check = checkpoint.check_workdir
    with pytest.raises(ValueError, match=r'checkpoint.folder \(there .*--override continues'):
        check(str(workdir), config_of(other))
    message = rf'the newest checkpoint of the run, grpo/8, is in \'{folder}\' and not in .*{other}'
    with pytest.raises(ValueError, match=message):
        check(str(workdir), config_of(other), override=True)
    with pytest.raises(ValueError, match=f"is in '{folder}' and not in .*{workdir}/checkpoints"):
        check(str(workdir), runs.get_config(), override=True)
    shutil.copytree(folder, other, dirs_exist_ok=True)
    check(str(workdir), config_of(other), override=True)
    shutil.rmtree(other / 'grpo' / '8')
    with pytest.raises(ValueError, match='grpo/8, is in'):
        check(str(workdir), config_of(other), override=True)
    assert records == {name: (workdir / name).read_bytes() for name in runs.FILES}


def test_a_run_does_not_begin_anew_where_nothing_is_mounted(moved, tmp_path):
    workdir = tmp_path / 'run'
    shutil.copytree(moved[0], workdir)
    config = config_of(tmp_path / 'unmounted')
    (workdir / 'config.json').write_text(saved_config.to_json(config))
    with pytest.raises(ValueError, match=r'unmounted.* holds no checkpoint: restore them there or'):
        checkpoint.check_workdir(str(workdir), config)
    rows = [json.dumps({'stage': 'sft', 'step': step}) for step in range(6)]  # one per 3 steps
    (workdir / 'metrics.jsonl').write_text('\n'.join(rows) + '\n')
    checkpoint.check_workdir(str(workdir), config)  # the first save may not have been complete


def test_a_new_run_does_not_take_the_checkpoints_of_another(moved, tmp_path):
    config = config_of(moved[1])
    with pytest.raises(ValueError, match=f'{moved[1]}.* holds the checkpoints of another run, suc'):
        checkpoint.check_workdir(str(tmp_path), config)
    shutil.copy(moved[0] / 'config.json', tmp_path)  # of a workdir that is lost
    checkpoint.check_workdir(str(tmp_path), config)
    assert listing.find_checkpoint(tmp_path, ('grpo',), '', str(moved[1])) == ('grpo', 8)


def test_a_folder_that_cannot_be_written_to(tmp_path):
    (tmp_path / 'file').touch()
    with pytest.raises(ValueError, match=r'checkpoint.folder .*file/a.* cannot be written to'):
        checkpoint.check_workdir(str(tmp_path / 'run'), config_of(tmp_path / 'file' / 'a'))


@pytest.mark.parametrize('address', ['gs://', 'gs://a', 'gs://a/', 'gs:/a/b', 's3://a/b', 'x:/y'])
def test_addresses_that_are_refused(address, tmp_path):
    with pytest.raises(
        ValueError, match=r"name a folder, or one in a bucket of .*'gs://BUCKET/FOL"
    ):
        checkpoint.check_workdir(str(tmp_path), config_of(address))


def test_a_workdir_or_an_output_in_a_bucket_is_refused(moved, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=r"workdir='gs://a/b' has to be a path .*checkpoint.folde"):
        train(runs.get_config(), 'gs://a/b')
    with pytest.raises(ValueError, match="start='gs://a/b' has to be a path"):
        Start.parse('gs://a/b:sft')
    with pytest.raises(ValueError, match=r'workdir=.* has to be a path'):
        verify.main('gs://a/b')
    for module, options in ((export, []), (evaluate, []), (replay, ['--step=7'])):
        with pytest.raises(SystemExit):
            command(module, monkeypatch, f'--workdir={moved[0]}', '--output=gs://a/b', *options)
        assert "--output='gs://a/b' has to be a path of this machine" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_without_the_packages_a_bucket_is_refused_in_one_line(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__('sys').modules, 'gcsfs', None)
    buckets._bucket.cache_clear()
    with pytest.raises(ValueError, match=r'gs://a cannot be used \(.*pip install gcsfs'):
        checkpoint.check_workdir(str(tmp_path), config_of('gs://a/b'))


def test_paths_in_a_config(tmp_path, monkeypatch):
    config = defaults()
    for given, expected in (
        ('', ''), ('a', f'{tmp_path}/a'), ('../a', f'{tmp_path.parent}/a'), ('/a', '/a'),
        ('~/a', os.path.expanduser('~/a')), ('gs://a/b', 'gs://a/b'), ('s3:/a', 's3:/a'),
    ):  # fmt: skip
        config.checkpoint.folder = given
        paths.make_absolute(config, str(tmp_path))
        assert config.checkpoint.folder == expected
    assert paths.same_path('checkpoint.folder', 'gs://a/b', 'gs://a/b/')
    assert not paths.same_path('checkpoint.folder', 'gs://a/b', 'gs://a/c')
    assert not paths.same_path('checkpoint.folder', '', 'gs://a/c')
    monkeypatch.chdir(tmp_path)
    assert layout.checkpoints('run') == layout.checkpoints(tmp_path / 'run')
    assert str(layout.checkpoints('run', 'b')) == f'{tmp_path}/b'


def test_the_config_is_enough_to_go_on(moved, finished, tmp_path):
    """Of a workdir that is lost; the records begin where the run goes on."""
    folder = tmp_path / 'saved'
    shutil.copytree(moved[1], folder)
    shutil.rmtree(folder / 'grpo' / '8')
    saved = saved_config.read(moved[0] / 'config.json', quiet=True)
    saved.checkpoint.folder = str(folder)
    (tmp_path / 'run').mkdir()
    (tmp_path / 'run' / 'config.json').write_text(saved_config.to_json(saved))
    runs.train(config_of(folder), tmp_path / 'run')
    rows = runs.lines(tmp_path / 'run' / 'completions.jsonl')
    assert rows == [x for x in runs.lines(finished / 'completions.jsonl') if x['step'] > 5]
