"""Relative paths in config files and on the command line."""

import json

import folders
import pytest
import runs

from grpo_jax import evaluate
from grpo_jax.run import arguments, config_checks, paths, saved_config
from grpo_jax.run import config as grpo_config

CONFIG = """
from grpo_jax.run.config import defaults


def differing_keys(config, saved):
    different = saved_config.differences(config, saved)
    return [saved_config.describe(key, values) for key, values in different.items()]



def get_config():
    config = defaults()
    config.pretrained = {pretrained!r}
    config.tokenizer = 'bytes'
    config.data.update(name='jsonl', options={options!r}, cache_dir='cache')
    return config
"""


def read(tmp_path, monkeypatch, *, pretrained='', options=()):
    """The config of a file in `home`, read from the folder `away`, by a relative path."""
    (tmp_path / 'home' / 'data').mkdir(parents=True, exist_ok=True)
    (tmp_path / 'home' / 'data' / 'train.jsonl').touch()
    (tmp_path / 'home' / 'model').mkdir(exist_ok=True)
    (tmp_path / 'away' / 'here').mkdir(parents=True, exist_ok=True)
    text = CONFIG.format(pretrained=pretrained, options=dict(options))
    (tmp_path / 'home' / 'mine.py').write_text(text)
    monkeypatch.chdir(tmp_path / 'away')
    return grpo_config.load('../home/mine.py')


def differing_keys(config, saved):
    different = saved_config.differences(config, saved)
    return [saved_config.describe(key, values) for key, values in different.items()]


@pytest.mark.parametrize(
    ('written', 'meant'),
    [
        ('model', '{home}/model'),
        ('./model', '{home}/model'),
        ('./missing', '{home}/missing'),  # an error that names the whole path follows
        ('../home/model', '{home}/model'),
        ('/somewhere/else', '/somewhere/else'),
        ('Qwen/Qwen2.5-0.5B', 'Qwen/Qwen2.5-0.5B'),
        ('', ''),
    ],
)
def test_a_checkpoint_is_relative_to_the_config_file(tmp_path, monkeypatch, written, meant):
    config = read(tmp_path, monkeypatch, pretrained=written)
    assert config.pretrained == meant.format(home=tmp_path / 'home')
    assert config.tokenizer == 'bytes'
    assert config.data.cache_dir == f'{tmp_path}/home/cache'


def test_a_folder_of_the_working_directory_is_no_hub_name(tmp_path, monkeypatch):
    message = r"pretrained='here' is a folder in the working directory, .* write '\.\./away/here'"
    with pytest.raises(ValueError, match=message):
        read(tmp_path, monkeypatch, pretrained='here')


@pytest.mark.parametrize(
    ('written', 'meant'),
    [
        ({'folder': 'data'}, {'folder': '{home}/data'}),
        ({'folder': '.'}, {'folder': '{home}'}),
        ({'folder': 'published'}, {'folder': 'published'}),  # below $GRPO_JAX_DATA_DIR
        ({'file': 'data/{split}.jsonl'}, {'file': '{home}/data/{split}.jsonl'}),
        ({'file': 'other.jsonl'}, {'file': 'other.jsonl'}),
        (
            {'file': '{split}.jsonl', 'folder': 'data'},
            {'file': '{split}.jsonl', 'folder': '{home}/data'},
        ),
    ],
)
def test_data_files_are_relative_to_the_config_file(tmp_path, monkeypatch, written, meant):
    config = read(tmp_path, monkeypatch, options=written)
    home = str(tmp_path / 'home')
    expected = {name: text.replace('{home}', home) for name, text in meant.items()}
    assert config.data.options.to_dict() == expected


@pytest.mark.parametrize('value', ['None', '{}'])
@pytest.mark.parametrize('key', ['tokenizer', 'data', 'data.cache_dir', 'reward_model'])
def test_missing_sections_and_paths_are_left_for_the_checks_of_keys(tmp_path, key, value):
    file = tmp_path / 'config.py'
    file.write_text(
        'from grpo_jax.run.config import defaults\n'
        f'def get_config():\n  config = defaults()\n  config.{key} = {value}\n  return config\n'
    )
    config, problems = grpo_config.read(file)
    assert config is not None
    with pytest.raises(ValueError, match=key.partition('.')[0]):
        check_keys_and_values(config, problems)


def check_keys_and_values(config, problems):
    if problems:
        raise ValueError(problems)
    config_checks.check_keys(config)
    config_checks.check_values(config)


def test_the_command_line_is_relative_to_the_working_directory(tmp_path, monkeypatch):
    read(tmp_path, monkeypatch)
    changes = {
        'pretrained': 'here',
        'data.cache_dir': 'store',
        'grpo.rewards': "{'./mine.py:f': 1.0, 'a.b:c': 2.0}",
        'eval.correct': './mine.py:f',
    }
    given = [f'--config.{key}={value}' for key, value in changes.items()]
    config, _ = arguments.parse(['--config=../home/mine.py', '--workdir=w', *given])
    away = str(tmp_path / 'away')
    assert config.pretrained == f'{away}/here'
    assert config.data.cache_dir == f'{away}/store'
    assert config.grpo.rewards.to_dict() == {f'{away}/mine.py:f': 1.0, 'a.b:c': 2.0}
    assert config.eval.correct == f'{away}/mine.py:f'


def test_older_runs_saved_relative_paths(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    ours, saved = runs.get_config(), runs.get_config()
    saved.pretrained, ours.pretrained = 'model', f'{tmp_path}/model'
    assert differing_keys(ours, saved) == []
    ours.pretrained = f'{tmp_path}/other'
    assert len(differing_keys(ours, saved)) == 1
    assert not paths.same_path('data.prompt', 'a', './a')


def test_train_from_one_folder_and_evaluate_from_another(tmp_path, monkeypatch, capsys):
    """A checkpoint, data and a reward beside the config file, by relative paths."""
    monkeypatch.delenv('GRPO_JAX_DATA_DIR', raising=False)
    home = tmp_path / 'home'
    folders.write(home / 'model')
    folders.rows(home / 'sums', train=[f'{i}+1=' for i in range(8)], test=['9+9=', '8+9='])
    (home / 'my_reward.py').write_text(
        'def short(completions, **_):\n    return [1.0 / (1 + len(text)) for text in completions]\n'
    )
    (home / 'mine.py').write_text(
        'from grpo_jax.run.config import defaults\n'
        'def get_config():\n'
        '    config = defaults()\n'
        "    config.pretrained = 'model'\n"
        "    config.data.update(name='jsonl', options={'folder': 'sums'}, completion_length=4)\n"
        '    config.grpo.update(steps=1, batch_size=2, group_size=2)\n'
        "    config.grpo.rewards = {'./my_reward.py:short': 1.0}\n"
        '    config.eval.batch_size = 2\n'
        '    return config\n'
    )
    for name in ('one', 'two'):
        (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path / 'one')
    runs.train(*arguments.parse(['--config=../home/mine.py', '--workdir=run']))
    monkeypatch.chdir(tmp_path / 'two')
    runs.train(*arguments.parse(['--config=../home/mine.py', '--workdir=../one/run']))  # resumes
    monkeypatch.setattr('sys.argv', ['evaluate', '-workdir=../one/run'])
    capsys.readouterr()
    with runs.compiled_once():
        evaluate.run()
    assert 0 <= json.loads(capsys.readouterr().out)['eval/reward'] <= 1
    saved = json.loads((tmp_path / 'one' / 'run' / 'config.json').read_text())
    assert saved['pretrained'] == str(home / 'model')
    assert saved['data']['options'] == {'folder': str(home / 'sums')}
