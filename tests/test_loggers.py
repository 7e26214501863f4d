"""Loggers beside TensorBoard: with stand-ins that have the functions of the real libraries."""

import importlib.util
import json
import sys
import types

import pytest
import runs

from grpo_jax.run import errors, loggers, report
from grpo_jax.run.config import defaults


class Recorder:
    """The runs of a service: {id: {'settings': [...], 'points': [...], 'ended': count}}."""

    def __init__(self):
        self.runs, self.open = {}, None

    def start(self, run_id, **settings):
        self.open = run_id or f'run-{len(self.runs)}'
        run = self.runs.setdefault(self.open, {'settings': [], 'points': [], 'ended': 0})
        run['settings'].append(settings)
        return self.open

    def log(self, step, metrics):
        assert type(metrics) is dict
        self.runs[self.open]['points'].append((step, metrics))

    def end(self):
        self.runs[self.open]['ended'] += 1
        self.open = None


def fake_wandb(recorder):
    def init(*, project, name, id, resume, dir, config):
        assert resume == 'allow'
        run_id = recorder.start(id, project=project, name=name, config=config)
        return types.SimpleNamespace(
            id=run_id, log=lambda data, step: recorder.log(step, data), finish=recorder.end
        )

    return {'init': init}


def fake_trackio(recorder):
    def init(project, name=None, *, config=None, resume='never'):
        assert (resume == 'allow') == (name in recorder.runs)
        run_id = recorder.start(name, project=project, name=name, config=config)
        return types.SimpleNamespace(name=run_id)

    return {
        'init': init,
        'log': lambda data, step: recorder.log(step, data),
        'finish': recorder.end,
    }


def fake_mlflow(recorder):
    experiments = []

    def start_run(run_id=None, run_name=None):
        started = recorder.start(run_id, project=experiments[-1], name=run_name)
        return types.SimpleNamespace(info=types.SimpleNamespace(run_id=started))

    return {
        'set_experiment': experiments.append,
        'start_run': start_run,
        'log_dict': lambda config, name: recorder.runs[recorder.open].update(config=config),
        'log_metrics': lambda data, step: recorder.log(step, data),
        'end_run': recorder.end,
    }


FAKES = {'wandb': fake_wandb, 'trackio': fake_trackio, 'mlflow': fake_mlflow}


@pytest.fixture
def services(monkeypatch):
    """A recorder for each of the libraries, which seem to be installed."""
    recorders = {name: Recorder() for name in FAKES}
    for name, fake in FAKES.items():
        module = types.ModuleType(name)
        module.__spec__ = types.SimpleNamespace()
        vars(module).update(fake(recorders[name]))
        monkeypatch.setitem(sys.modules, name, module)
    return recorders


def config_of(*names, **options):
    config = defaults()
    config.log.update(to=names, **options)
    return config


@pytest.mark.parametrize('name', FAKES)
def test_a_resumed_run_continues_the_run_there(name, services, tmp_path):
    config = config_of(name, project='sums')
    workdir = tmp_path / 'adding'
    workdir.mkdir()
    loggers.check(config)
    for steps in ((0, 1), (2,)):
        with loggers.opened(config, workdir) as everywhere:
            for step in steps:
                everywhere.log(step, {'loss': 1.0 / (1 + step), 'eval/pass@1': 0.5})
    pass_at_1 = 'eval/pass_1' if name == 'mlflow' else 'eval/pass@1'
    ((run_id, run),) = services[name].runs.items()
    assert run['points'] == [
        (step, {'loss': 1.0 / (1 + step), pass_at_1: 0.5}) for step in range(3)
    ]
    assert run['ended'] == 2
    assert [s['project'] for s in run['settings']] == ['sums', 'sums']
    assert run['settings'][0]['name'] == 'adding'
    saved = run['config'] if name == 'mlflow' else run['settings'][0]['config']
    assert saved['log']['to'] == (name,)
    assert json.loads((workdir / loggers.IDS).read_text()) == {name: run_id}


def test_names_that_mlflow_accepts():
    expected = {
        'eval/pass@8': 'eval/pass_8',
        'rewards/./my_reward.py:f/mean': 'rewards/my_reward.py:f/mean',
        'rewards/a.b:c/std': 'rewards/a.b:c/std',
        'kl-é': 'kl-_',
    }
    assert {name: loggers._mlflow_name(name) for name in expected} == expected


POINTS = []


def collect(step, metrics):
    POINTS.append((step, metrics))


def fail_at_odd_steps(step, metrics):
    if step % 2:
        raise OSError('no connection')
    POINTS.append((step, metrics))


def test_a_logger_that_fails_costs_its_records_only(services, tmp_path, caplog):
    POINTS.clear()
    config = config_of('test_loggers:fail_at_odd_steps', 'wandb')
    with loggers.opened(config, tmp_path) as everywhere:
        for step in range(6):
            everywhere.log(step, {'loss': 1.0})
    assert [step for step, _ in POINTS] == [0, 2, 4]
    ((_, run),) = services['wandb'].runs.items()
    assert [step for step, _ in run['points']] == [*range(6)]
    name = 'log.to: test_loggers:fail_at_odd_steps failed'
    assert [record.message for record in caplog.records] == [
        f'{name} at step 1 (OSError: no connection); training continues, and further failures are '
        'counted',
        f'{name} in 3 of 6 calls',
    ]


@pytest.mark.parametrize(
    ('name', 'message'),
    [
        ('wandb', "names 'wandb', which is not installed: pip install wandb, or in the folder of"),
        ('wandbb', "names 'wandbb', which is unknown, did you mean 'wandb'?: use wandb, trackio"),
        (
            'test_loggers:colect',
            "'test_loggers:colect': test_loggers has no 'colect', did you",
        ),
    ],
)
def test_loggers_that_cannot_be_used(name, message, monkeypatch, tmp_path):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, 'find_spec', lambda name, *a: None if name == 'wandb' else find(name, *a)
    )
    config = runs.get_config()
    config.log.to = (name,)
    with pytest.raises(errors.ConfigError) as error:
        runs.train(config, tmp_path)
    assert message in str(error.value)
    assert len(error.value.problems) == 1


def test_a_service_that_refuses_is_an_error_at_the_start(services, monkeypatch, tmp_path):
    def init(**settings):
        raise RuntimeError('api_key not configured')

    monkeypatch.setattr(sys.modules['wandb'], 'init', init)
    message = r'log.to: wandb cannot be started \(RuntimeError: api_key not configured\): fix its'
    with pytest.raises(ValueError, match=message), loggers.opened(config_of('wandb'), tmp_path):
        pass


@pytest.mark.slow
def test_steps_are_counted_over_the_stages(tmp_path):
    POINTS.clear()
    config = runs.get_config()
    config.sft.steps, config.grpo.steps = 2, 2
    config.eval.update(every=2)
    config.log.to = ('test_loggers:collect',)
    runs.train(config, tmp_path)
    sft, grpo = (report.read(tmp_path / 'metrics.jsonl', stage) for stage in ('sft', 'grpo'))
    tests = runs.lines(tmp_path / 'heldout.jsonl')

    def metrics(row, prefix=''):
        return {prefix + k: v for k, v in row.items() if k not in ('stage', 'step')}

    assert [
        (0, metrics(sft[0], 'sft/')),
        (1, metrics(sft[1], 'sft/')),
        (2, tests[0]['metrics']),
        (2, metrics(grpo[0])),
        (3, metrics(grpo[1])),
        (4, tests[1]['metrics']),
    ] == POINTS
    assert not (tmp_path / loggers.IDS).exists()
