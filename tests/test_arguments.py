"""The command line: what it sets, and one line for what is wrong with it."""

import ast
import pathlib
import re
import subprocess
import sys
from types import SimpleNamespace

import pytest
import runs

from grpo_jax import evaluate, export, plan, replay, train
from grpo_jax.run import arguments, saved_config, sections
from grpo_jax.run.config import defaults, flatten

ROOT = pathlib.Path(__file__).parents[1]
SMOKE = f'--config={ROOT}/configs/smoke.py'


def test_a_saved_config_takes_changes(tmp_path):
    (tmp_path / 'config.json').write_text(saved_config.to_json(runs.get_config()))
    changes = ('--config.eval.k=(2,)', '--config.eval.samples=2', '--config.seed=3')
    config, workdir = arguments.parse([f'--workdir={tmp_path}', *changes], saved=True)
    assert (config.eval.k, config.eval.samples, config.seed) == ((2,), 2, 3)
    assert workdir == str(tmp_path)


def test_parse():
    changes = {
        'seed': '3',
        'grpo.algorithm.beta': '1',  # an int where a float is meant
        'sft.optimizer.learning_rate': '1e-3',
        'model.tied_head': 'false',
        'eval.k': '(2,)',
        'data.prompt': 'a={question} ',
        'data.options.train_size': '80',
        'grpo.rewards.chain_format': '0.25',
    }
    given = [f'--config.{name}={value}' for name, value in changes.items()]
    config, workdir = arguments.parse([SMOKE, '--workdir=a', *given, '-workdir=b=c'])
    assert workdir == 'b=c'
    assert (config.seed, config.grpo.algorithm.beta) == (3, 1.0)
    assert isinstance(config.grpo.algorithm.beta, float)
    assert config.sft.optimizer.learning_rate == 1e-3
    assert (config.model.tied_head, config.eval.k) == (False, (2,))
    assert config.data.prompt == 'a={question} '
    assert config.data.options.train_size == 80
    assert config.grpo.rewards.to_dict() == {'exact_answer': 1.0, 'chain_format': 0.25}
    assert config.is_locked


FREE = {
    'data.options': "{'train_size': 80, 'operations': '+'}",
    'data.chat_template_kwargs': '{"enable_thinking": false}',
    'environment.options': "{'seconds': 2.5}",
    'grpo.rewards': "{'my_package.my_module:bonus': 1.0, 'chain_format': {'weight': 2}}",
    'grpo.step_rewards': '{"right_steps": 1.0}',
    'model.rope_scaling': "{'rope_type': 'linear', 'factor': 2.0}",
    **{
        f'{name}.optimizer.options': '{"nesterov": false, "beta": 0.9}'
        for name in ('sft', 'grpo', 'critic', 'reward_model')
    },
}


@pytest.mark.parametrize('key', FREE)
def test_dictionaries_are_replaced_as_a_whole(key):
    config, _ = arguments.parse([SMOKE, '--workdir=w', f'--config.{key}={FREE[key]}'])
    text = FREE[key].replace('false', 'False')
    assert flatten(config.to_dict())[key] == ast.literal_eval(text)
    assert list(FREE) == list(dict.fromkeys([*FREE, *sections.FREE]))


def test_entries_of_dictionaries():
    config, _ = arguments.parse([
        SMOKE,
        '--workdir=w',
        f'--config.grpo.rewards={FREE["grpo.rewards"]}',
        '--config.grpo.rewards.my_package.my_module:bonus=0.5',
        '--config.grpo.rewards.chain_format.weight=3',
    ])  # fmt: skip
    assert config.grpo.rewards.to_dict() == {
        'my_package.my_module:bonus': 0.5, 'chain_format': {'weight': 3},
    }  # fmt: skip


def test_automatic_choices():
    given = ['--config.grpo.compute.microbatch=4', '--config.sft.microbatch=None']
    config, _ = arguments.parse([SMOKE, '--workdir=w', *given, '--config.grpo.compute.rows=8'])
    assert (config.grpo.compute.microbatch, config.sft.microbatch) == (4, None)
    assert config.grpo.compute.rows == 8
    config, _ = arguments.parse([SMOKE, '--workdir=w', '--config.grpo.compute.microbatch=None'])
    assert config.grpo.compute.microbatch is None


@pytest.mark.parametrize(
    ('given', 'message'),
    [
        ([], '--workdir=FOLDER is missing: name the folder of the run'),
        ([SMOKE, '--workdir='], '--workdir=FOLDER is missing'),
        (['--workdir=w'], '--config=FILE is missing: name a config file'),
        (['--workdir', SMOKE], '--workdir=FOLDER is missing'),
        (
            [f'--config={ROOT}/configs/variants.py', '--workdir=w'],
            'the file has several configs: name one, as in',
        ),
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
            "unknown config key 'zzz': see grpo_jax.run.config.defaults() for all keys",
        ),
        (
            [SMOKE, '--workdir=w', '--config.grpo.algorithm=dappo'],
            '--config.grpo.algorithm=dappo: it is a section: give one of its keys',
        ),
        (
            [SMOKE, '--workdir=w', '--config.data.options.sizes=4'],
            "unknown config key 'data.options.sizes'",
        ),
        (
            [SMOKE, '--workdir=w', '--config.seed=1.5'],
            "--config.seed=1.5: invalid literal for int() with base 10: '1.5'; give a value of "
            'type int',
        ),
        ([SMOKE, '--workdir=w', '--config.grpo.algorithm.beta=x'], 'could not convert string'),
        (
            [SMOKE, '--workdir=w', '--config.model.tied_head=x'],
            '.tied_head=x: neither true nor false',
        ),
        (
            [SMOKE, '--workdir=w', '--config.grpo.rewards=exact_answer'],
            "--config.grpo.rewards=exact_answer: not of the form {'name': value}; give a value of "
            'type dictionary',
        ),
        (
            [SMOKE, '--workdir=w', '--config.grpo.compute.microbatch=many'],
            '--config.grpo.compute.microbatch=many: invalid literal for int()',
        ),
        ([SMOKE, '--workdir=w', '--config.seed=None'], '--config.seed=None: invalid literal'),
        (
            [SMOKE, '--workdir=w', '--config.grpo.rewards.chain_formt=1'],
            "unknown config key 'grpo.rewards.chain_formt': the dictionary has 'chain_format', "
            "'exact_answer'; give a new dictionary to add one",
        ),
    ],
)
def test_parse_refuses(given, message):
    with pytest.raises(ValueError) as error:  # noqa: PT011 the message follows
        arguments.parse(given)
    assert message in str(error.value)
    assert '\n' not in str(error.value)


@pytest.mark.parametrize(
    ('body', 'message'),
    [
        (
            'config.grpo.sampling.temperatur = 1.0',
            "unknown config key 'grpo.sampling.temperatur': did you mean "
            "'grpo.sampling.temperature'?",
        ),
        (
            'config.checkpoint.update(kept=1)',
            "unknown config key 'checkpoint.kept': did you mean 'checkpoint.keep'?",
        ),
        (
            'config.unlock(); config.grpo.sampling.temperatur = 1.0',
            "key 'grpo.sampling.temperatur': did you mean 'grpo.sampling.temperature'?",
        ),
        (
            "config.grpo.steps = 'ten'",
            "config key 'grpo.steps' is 'ten': give a value of type int\n",
        ),
        ("raise ValueError('no preset of that name')", 'mine.py: no preset of that name\n'),
        (
            "raise TypeError('no')",
            'TypeError: no: fix the file (GRPO_JAX_TRACEBACK=1',
        ),
        ('config = None', 'get_config() returned None: return a ConfigDict'),
        ('import no_such_module', "ModuleNotFoundError: No module named 'no_such_module'"),
        ('1 +', 'SyntaxError: invalid syntax'),
    ],
)
def test_a_config_file_refuses(tmp_path, monkeypatch, capsys, body, message):
    path = tmp_path / 'mine.py'
    lines = (
        'from grpo_jax.run.config import defaults',
        'def get_config():',
        '  config = defaults()',
        "  config.grpo.rewards = {'exact_answer': 1.0}",
        "  config.data.options = {'train_size': 300, 'test_size': 20}",
    )
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


@pytest.mark.parametrize('form', [['--workdir=b=c'], ['--workdir', 'b=c'], ['-workdir', 'b=c']])
def test_a_folder_after_an_equals_sign_or_a_space(form):
    config, workdir = arguments.parse([*form, *SMOKE.split('='), '--config.seed=5'])
    assert (config.seed, workdir) == (5, 'b=c')


def test_help(monkeypatch, capsys):
    monkeypatch.setattr('sys.argv', ['train', '--help'])
    train.run()
    assert '--config=FILE.py --workdir=FOLDER' in capsys.readouterr().out


def test_run_command(monkeypatch, capsys):
    monkeypatch.setattr('sys.argv', ['command', SMOKE, '--workdir=w', '--config.seed=4'])
    arguments.run_command(lambda config, workdir: print(config.seed, workdir))
    assert capsys.readouterr().out == '4 w\n'

    def fail(config, workdir):
        raise OSError('two\n  lines')

    with pytest.raises(SystemExit):
        arguments.run_command(fail)
    assert_one_line(capsys.readouterr(), 'error: two lines\n')
    monkeypatch.setenv('GRPO_JAX_TRACEBACK', '1')
    with pytest.raises(OSError, match='two'):
        arguments.run_command(fail)

    def mistake(config, workdir):
        raise TypeError('of the program, not of the user')

    monkeypatch.delenv('GRPO_JAX_TRACEBACK')
    with pytest.raises(TypeError):
        arguments.run_command(mistake)


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
    config, _ = arguments.parse([f'--config={path.parent}/{command[1]}', '--workdir=w'])
    assert config.is_locked


# Help


def helped(monkeypatch, capsys, command, *options):
    monkeypatch.setattr('sys.argv', ['command', *options])
    command.run()
    return capsys.readouterr().out


@pytest.mark.parametrize('option', ['--help', '-help', '-h'])
def test_help_lists_every_key_with_its_default(option, monkeypatch, capsys):
    printed = helped(monkeypatch, capsys, train, option)
    assert '--config=FILE.py --workdir=FOLDER' in printed
    for key, value in flatten(defaults().to_dict()).items():
        assert f'\n  {key}={value!r}' in printed
    assert '\n[grpo.algorithm]\n' in printed
    assert re.search(r'grpo.group_size=8 +G, completions per prompt\n', printed)


def test_help_of_a_section(monkeypatch, capsys):
    printed = helped(monkeypatch, capsys, train, '--help=grpo.sampling')
    lines = printed.splitlines()
    assert lines[0] == '[grpo.sampling]'
    assert {line.partition('=')[0] for line in lines if '=' in line[:40]} == {
        f'  grpo.sampling.{name}' for name in ('min_p', 'temperature', 'top_k', 'top_p')
    }
    with pytest.raises(SystemExit):
        helped(monkeypatch, capsys, train, '--help=grpo.algoritm')
    expected = "--help=grpo.algoritm: no such config key or section: did you mean 'grpo.algorithm'?"
    assert capsys.readouterr().err == f'error: {expected}\n'


def test_help_of_the_other_commands(monkeypatch, capsys):
    printed = helped(monkeypatch, capsys, evaluate, '--help')
    assert '--checkpoint=sft/60' in printed
    assert '\n  eval.samples=8 ' in printed
    assert '--adapter' in helped(monkeypatch, capsys, export, '-help')


def test_flags():
    rest = ['--extend', '--override=false', '--seed=1']
    assert arguments.take_flag(rest, 'extend')
    assert not arguments.take_flag(rest, 'override')
    assert not arguments.take_flag(rest, 'adapter')
    assert rest == ['--seed=1']
    with pytest.raises(ValueError, match='extend=maybe: neither true nor false'):
        arguments.take_flag(['--extend=maybe'], 'extend')


@pytest.mark.parametrize(
    ('command', 'function', 'failed', 'succeeded'),
    [
        (plan, 'grpo_jax.run.plan.printing.print_plan', SimpleNamespace(fits=False),
         SimpleNamespace(fits=None)),
        (replay, 'grpo_jax.run.replay.output.replay', False, True),
    ],
)  # fmt: skip
def test_status_of_a_command_that_finds_something(
    tmp_path, monkeypatch, capsys, command, function, failed, succeeded
):
    """A plan that does not fit and a replay that differs end with status 1 and no error line."""
    (tmp_path / 'config.json').write_text(saved_config.to_json(runs.get_config()))
    config = [] if command is replay else [SMOKE]
    monkeypatch.setattr('sys.argv', ['command', f'--workdir={tmp_path}', *config])
    monkeypatch.setattr(function, lambda *_, **__: succeeded)
    command.run()
    monkeypatch.setattr(function, lambda *_, **__: failed)
    with pytest.raises(SystemExit) as stopped:
        command.run()
    assert stopped.value.code == 1
    assert not capsys.readouterr().err


def test_the_command_prints_a_line_for_each_problem(monkeypatch, capsys):
    monkeypatch.setattr('sys.argv', ['train', SMOKE, '--config.lr=1', '--config.seed=x'])
    with pytest.raises(SystemExit) as stopped:
        train.run()
    assert stopped.value.code == 2
    assert [line.split(':')[:2] for line in capsys.readouterr().err.splitlines()] == [
        ['error', ' --workdir=FOLDER is missing'],
        ['error', " unknown config key 'lr'"],
        ['error', ' --config.seed=x'],
    ]
