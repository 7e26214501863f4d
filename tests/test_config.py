"""The config: every key is read, what is wrong is one line, what is saved comes back."""

import json
import pathlib
import re
import subprocess
import sys
from collections.abc import Mapping

import pytest
import runs
from ml_collections import ConfigDict

from grpo_jax import config as grpo_config
from grpo_jax import train

ROOT = pathlib.Path(__file__).parents[1]
SMOKE = f'--config={ROOT}/configs/smoke.py'


# Every key is read


class Recorder(Mapping):
    """A config that notes which values are taken from it, by attribute, item or `**`."""

    def __init__(self, config, seen, prefix=''):
        self._config, self._seen, self._prefix = config, seen, prefix

    def __getitem__(self, name):
        value, path = self._config[name], self._prefix + name
        if isinstance(value, ConfigDict):
            return Recorder(value, self._seen, f'{path}.')
        self._seen.add(path)
        return value

    __getattr__ = __getitem__

    def __iter__(self):
        return iter(self._config)

    def __len__(self):
        return len(self._config)

    def to_dict(self):
        """To save the config is not to read it."""
        return self._config.to_dict()


def leaves(tree, prefix=''):
    for name, value in tree.items():
        if isinstance(value, dict):
            yield from leaves(value, f'{prefix}{name}.')
        else:
            yield prefix + name


def test_the_recorder_notes_values_only():
    config = ConfigDict({'a': {'x': 1, 'y': 2, 'z': 3}, 'b': {'u': 1, 'v': 2}, 'c': 3, 'd': {}})
    seen = set()
    recorder = Recorder(config, seen)
    assert json.dumps(recorder.to_dict())
    assert (len(recorder.b), bool(recorder.d), list(recorder)) == (2, False, ['a', 'b', 'c', 'd'])
    assert not seen
    assert (recorder.a.x, recorder['a']['z'], dict(**recorder.b)) == (1, 3, {'u': 1, 'v': 2})
    assert seen == {'a.x', 'a.z', 'b.u', 'b.v'}
    assert sorted({*leaves(config.to_dict())} - seen) == ['a.y', 'c']


def test_every_key_is_read(tmp_path):
    config = runs.get_config()
    config.log.completions = 3
    with config.unlocked():
        config.log.left_alone = 1
    seen = set()
    runs.train(Recorder(config, seen), tmp_path)
    completions = runs.lines(tmp_path / 'completions.jsonl')
    assert [row['step'] for row in completions] == [step for step in range(8) for _ in range(3)]
    other = runs.get_config()  # with a critic and a reward model
    other.grpo.update(steps=2, rewards={})
    other.grpo.algorithm.update(baseline='critic', scale='none', kl='k1', kl_place='reward')
    other.reward_model.update(weight=1.0, steps=1, batch_size=2, group_size=2, microbatch=2)
    runs.train(Recorder(other, seen), tmp_path / 'other')
    unread = {*leaves(config.to_dict())} - seen
    assert unread == {'log.left_alone'}


# Text and back


def test_json_and_back():
    config = runs.get_config()
    config.grpo.optimizer.eps = 1e-11
    text = grpo_config.to_json(config)
    again = grpo_config.from_json(text)
    assert again.to_dict() == config.to_dict()
    assert again.is_locked
    assert grpo_config.to_json(again) == text
    assert text.isascii()
    assert json.loads(text)['grpo']['rewards'] == {
        'runs:lucky': 1.0,
        'chain_format': 0.5,
        'runs:bonus': 1.0,
    }


def test_a_saved_config_takes_changes(tmp_path):
    (tmp_path / 'config.json').write_text(grpo_config.to_json(runs.get_config()))
    changes = ('--config.eval.k=(2,)', '--config.eval.samples=2', '--config.seed=3')
    config, workdir = grpo_config.parse([f'--workdir={tmp_path}', *changes], saved=True)
    assert (config.eval.k, config.eval.samples, config.seed) == ((2,), 2, 3)
    assert workdir == str(tmp_path)


def test_from_json_refuses_other_keys():
    saved = json.loads(grpo_config.to_json(grpo_config.defaults()))
    saved['grpo']['stepz'] = saved['grpo'].pop('steps')
    with pytest.raises(ValueError, match=r"unknown config key 'grpo.stepz': did .* 'grpo.steps'\?"):
        grpo_config.from_json(json.dumps(saved))
    del saved['grpo']['stepz']
    with pytest.raises(ValueError, match=r"config key 'grpo.steps' is missing: start from"):
        grpo_config.from_json(json.dumps(saved))


def test_differing_keys():
    config = runs.get_config()
    saved = grpo_config.to_json(config)
    assert grpo_config.differing_keys(config, saved) == []
    config.seed = 1
    config.eval.k = (1, 2)
    config.grpo.rewards = {'runs:lucky': 2.0, 'chain_format': 0.5, 'runs:bonus': 1.0, 'x:y': 1.0}
    assert grpo_config.differing_keys(config, saved) == [
        'eval.k (there [1, 4], here [1, 2])',
        'grpo.rewards.runs:lucky (there 1.0, here 2.0)',
        'grpo.rewards.x:y (there None, here 1.0)',
        'seed (there 0, here 1)',
    ]


# The command line


def test_parse():
    changes = {
        'seed': '3',
        'grpo.objective.beta': '1',  # an int where a float is meant
        'sft.optimizer.learning_rate': '1e-3',
        'model.tied_head': 'false',
        'eval.k': '(2,)',
        'data.prompt': 'a={question} ',
        'data.options.train_size': '80',
        'grpo.rewards.chain_format': '0.25',
    }
    arguments = [f'--config.{name}={value}' for name, value in changes.items()]
    config, workdir = grpo_config.parse([SMOKE, '--workdir=a', *arguments, '-workdir=b=c'])
    assert workdir == 'b=c'
    assert (config.seed, config.grpo.objective.beta) == (3, 1.0)
    assert isinstance(config.grpo.objective.beta, float)
    assert config.sft.optimizer.learning_rate == 1e-3
    assert (config.model.tied_head, config.eval.k) == (False, (2,))
    assert config.data.prompt == 'a={question} '
    assert config.data.options.train_size == 80
    assert config.grpo.rewards.to_dict() == {'exact_answer': 1.0, 'chain_format': 0.25}
    assert config.is_locked


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        ([], '--workdir=FOLDER is missing: name the folder of the run'),
        ([SMOKE, '--workdir='], '--workdir=FOLDER is missing'),
        (['--workdir=w'], '--config=: no such file: give the path of a config file'),
        (['--workdir=w', '--config=no.py'], '--config=no.py: no such file: give the path'),
        ([SMOKE, '--workdir=w', 'more'], "unexpected argument 'more': options are --config=FILE"),
        ([SMOKE, '--workdir=w', '--config.seed'], "unexpected argument '--config.seed'"),
        ([SMOKE, '--workdir=w', '--wrkdir=w'], "unexpected argument '--wrkdir=w'"),
        (
            [SMOKE, '--workdir=w', '--config.grpo.grup_size=4'],
            "unknown config key 'grpo.grup_size': did you mean 'grpo.group_size'?",
        ),
        (
            [SMOKE, '--workdir=w', '--config.group_sizes=4'],
            "unknown config key 'group_sizes': did you mean 'grpo.group_size'?",
        ),
        (
            [SMOKE, '--workdir=w', '--config.zzz=4'],
            "unknown config key 'zzz': see grpo_jax.config.defaults() for all keys",
        ),
        (
            [SMOKE, '--workdir=w', '--config.data.options.sizes=4'],
            "unknown config key 'data.options.sizes'",
        ),
        (
            [SMOKE, '--workdir=w', '--config.seed=1.5'],
            "flag --config.seed=1.5: invalid literal for int() with base 10: '1.5': give a value "
            'of the same type as the default',
        ),
        ([SMOKE, '--workdir=w', '--config.grpo.objective.beta=x'], 'could not convert string'),
        ([SMOKE, '--workdir=w', '--config.model.tied_head=x'], 'Non-boolean argument'),
    ],
)
def test_parse_refuses(arguments, message):
    with pytest.raises(ValueError) as error:  # noqa: PT011 the message follows
        grpo_config.parse(arguments)
    assert message in str(error.value)
    assert '\n' not in str(error.value)


@pytest.mark.parametrize(
    ('body', 'message'),
    [
        (
            'config.grpo.sampling.temperatur = 1.0',
            "unknown config key 'temperatur': did you mean 'grpo.sampling.temperature'?",
        ),
        (
            'config.checkpoint.update(kept=1)',
            "unknown config key 'kept': did you mean 'checkpoint.keep'?",
        ),
        (
            'config.unlock(); config.grpo.sampling.temperatur = 1.0',
            "key 'grpo.sampling.temperatur': did you mean 'grpo.sampling.temperature'?",
        ),
        ("config.grpo.steps = 'ten'", "TypeError: Could not override field 'steps'"),
        ('config = None', 'get_config() returned None: return a ConfigDict'),
        ('import no_such_module', "ModuleNotFoundError: No module named 'no_such_module'"),
        ('1 +', 'SyntaxError: invalid syntax'),
    ],
)
def test_a_config_file_refuses(tmp_path, monkeypatch, capsys, body, message):
    path = tmp_path / 'mine.py'
    lines = ('import grpo_jax.config', 'def get_config():', '  config = grpo_jax.config.defaults()')
    path.write_text('\n'.join((*lines, f'  {body}', '  return config')))
    monkeypatch.setattr('sys.argv', ['train', f'--config={path}', f'--workdir={tmp_path}/run'])
    with pytest.raises(SystemExit) as stopped:
        train.run()
    assert stopped.value.code == 2
    assert_one_line(capsys.readouterr(), message)
    assert not (tmp_path / 'run').exists()


def assert_one_line(captured, message):
    assert captured.err.startswith('error: ')
    assert captured.err.count('\n') == 1
    assert message in captured.err
    assert not captured.out


def test_run_command(monkeypatch, capsys):
    monkeypatch.setattr('sys.argv', ['command', SMOKE, '--workdir=w', '--config.seed=4'])
    grpo_config.run_command(lambda config, workdir: print(config.seed, workdir))
    assert capsys.readouterr().out == '4 w\n'

    def fail(config, workdir):
        raise OSError('two\n  lines')

    with pytest.raises(SystemExit):
        grpo_config.run_command(fail)
    assert_one_line(capsys.readouterr(), 'error: two lines\n')
    monkeypatch.setenv('GRPO_JAX_TRACEBACK', '1')
    with pytest.raises(OSError, match='two'):
        grpo_config.run_command(fail)

    def mistake(config, workdir):
        raise TypeError('of the program, not of the user')

    monkeypatch.delenv('GRPO_JAX_TRACEBACK')
    with pytest.raises(TypeError):
        grpo_config.run_command(mistake)


def test_the_command_ends_with_one_line(tmp_path):
    command = [sys.executable, '-m', 'grpo_jax.train', SMOKE, f'--workdir={tmp_path}/run']
    found = subprocess.run(
        [*command, '--config.grpo.group_sizes=4'], capture_output=True, text=True, cwd=ROOT
    )
    assert (found.returncode, found.stdout) == (2, '')
    expected = "unknown config key 'grpo.group_sizes': did you mean 'grpo.group_size'?"
    assert found.stderr == f'error: {expected}\n'


@pytest.mark.parametrize('path', sorted((ROOT / 'configs').glob('*.py')), ids=lambda p: p.stem)
def test_configs_name_their_command(path):
    command = re.search(
        rf'python -m grpo_jax.train --config=configs/({path.name}\S*) --workdir=', path.read_text()
    )
    config, _ = grpo_config.parse([f'--config={path.parent}/{command[1]}', '--workdir=w'])
    assert config.is_locked
