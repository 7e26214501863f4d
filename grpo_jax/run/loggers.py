"""Other places that metrics are logged to: Weights & Biases, Trackio, MLflow, or a function.

`config.log.to` names them. They get the metrics of every step and evaluation as TensorBoard does,
with steps counted over the stages of the run; the names of metrics begin with the stage unless it
is GRPO's. A run that is resumed continues the same run there: its id is kept in the workdir.
"""

import contextlib
import importlib
import importlib.util
import json
import logging
import os
import pathlib
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple, Protocol, runtime_checkable

from ml_collections import ConfigDict

from grpo_jax import plugins
from grpo_jax.run import hosts
from grpo_jax.run.errors import ConfigError, caught, naming_file, reading

log = logging.getLogger('grpo_jax')

IDS = 'loggers.json'  # {logger: id of the run there}, in the workdir


@runtime_checkable
class Logger(Protocol):
    """A place to log to."""

    id: str  # with which the run is continued

    def log(self, step: int, metrics: Mapping[str, float]) -> None: ...

    def close(self) -> None: ...


class _Run(NamedTuple):
    """What a logger has to know of the run."""

    project: str
    name: str
    id: str  # empty for a new run
    workdir: pathlib.Path
    config: dict[str, Any]


class _Wandb:
    def __init__(self, run: _Run) -> None:
        wandb = importlib.import_module('wandb')
        self._run = wandb.init(
            project=run.project,
            name=run.name,
            id=run.id or None,
            resume='allow',
            dir=str(run.workdir),
            config=run.config,
        )
        self.id: str = self._run.id

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        self._run.log(dict(metrics), step=step)

    def close(self) -> None:
        self._run.finish()


class _Trackio:
    """Trackio continues the run of the same name."""

    def __init__(self, run: _Run) -> None:
        self._trackio = importlib.import_module('trackio')
        started = self._trackio.init(
            project=run.project,
            name=run.id or run.name,
            config=run.config,
            resume='allow' if run.id else 'never',
        )
        self.id: str = started.name  # another one than `run.name` where that is taken

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        self._trackio.log(dict(metrics), step=step)

    def close(self) -> None:
        self._trackio.finish()


class _Mlflow:
    """Characters that MLflow does not allow in names of metrics are replaced by `_`."""

    def __init__(self, run: _Run) -> None:
        self._mlflow = importlib.import_module('mlflow')
        self._mlflow.set_experiment(run.project)
        started = self._mlflow.start_run(run_id=run.id or None, run_name=run.name)
        self.id: str = started.info.run_id
        self._mlflow.log_dict(run.config, 'config.json')

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        named = {_mlflow_name(name): value for name, value in metrics.items()}
        self._mlflow.log_metrics(named, step=step)

    def close(self) -> None:
        self._mlflow.end_run()


class _Function:
    id = ''

    def __init__(self, function: Callable[..., Any]) -> None:
        self._function = function

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        self._function(step, dict(metrics))

    def close(self) -> None:
        pass


_LOGGERS: dict[str, Callable[[_Run], Logger]] = {
    'wandb': _Wandb,
    'trackio': _Trackio,
    'mlflow': _Mlflow,
}


class Loggers:
    """All loggers of a run. One that fails costs its own records, not the run.

    Args:
      loggers: by name.
    """

    def __init__(self, loggers: Mapping[str, Logger]) -> None:
        self._loggers = dict(loggers)
        self._calls: dict[str, int] = dict.fromkeys(loggers, 0)
        self._failures: dict[str, int] = dict.fromkeys(loggers, 0)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Logs metrics everywhere; the first failure of each logger is a warning."""
        for name, logger in self._loggers.items():
            self._calls[name] += 1
            try:
                logger.log(step, metrics)
            except Exception as error:
                self._failures[name] += 1
                if self._failures[name] == 1:
                    log.warning(
                        'log.to: %s failed at step %d (%s: %s); training continues, and further '
                        'failures are counted', name, step, type(error).__name__, error,
                    )  # fmt: skip

    def close(self) -> None:
        """Ends the runs there; a warning tells how many calls failed."""
        for name, logger in self._loggers.items():
            try:
                logger.close()
            except Exception as error:
                log.warning('log.to: closing %s failed (%s: %s)', name, type(error).__name__, error)
            if self._failures[name]:
                counts = self._failures[name], self._calls[name]
                log.warning('log.to: %s failed in %d of %d calls', name, *counts)


def check(config: ConfigDict) -> None:
    """Checks that all loggers of a config can be imported.

    Raises:
      ConfigError: libraries that are not installed, or paths that lead to no function.
    """
    problems: list[str] = []
    for name in config.log.to:
        with caught(problems):
            _check(name)
    if problems:
        raise ConfigError(problems)


def _check(name: str) -> None:
    if name in _LOGGERS:
        if importlib.util.find_spec(name) is None:
            raise ValueError(
                f'log.to names {name!r}, which is not installed: pip install {name}, or in the '
                f"folder of grpo_jax's source pip install -e '.[{name}]'"
            )
    elif ':' not in name:
        hint = plugins.did_you_mean(name, _LOGGERS, cutoff=0.5)
        raise ValueError(
            f'log.to names {name!r}, which is unknown{hint}: use {", ".join(_LOGGERS)}, or '
            "'package.module:function'"
        )
    else:
        _function(name)


@contextlib.contextmanager
def opened(config: ConfigDict, workdir: pathlib.Path) -> Iterator[Loggers]:
    """Starts or continues the runs of all loggers of a config, and ends them after the block.

    Raises:
      ValueError: one of them cannot be started.
    """
    if not hosts.is_first():
        with hosts.together('starting the loggers'):
            pass
        yield Loggers({})
        return
    with hosts.together('starting the loggers'):
        together = Loggers(_started(config, workdir))
    try:
        yield together
    finally:
        together.close()


def _started(config: ConfigDict, workdir: pathlib.Path) -> dict[str, Logger]:
    path = workdir / IDS
    ids: dict[str, str] = {}
    with reading(path, 'restore it, or remove it to begin new runs of the loggers'):
        ids |= json.loads(path.read_bytes()) if path.exists() else {}
        if not all(isinstance(value, str) for value in ids.values()):
            raise TypeError('it holds ids that are no texts')
    described = _Run(
        config.log.project, config.log.name or workdir.name, '', workdir, config.to_dict()
    )
    loggers = {
        name: _start(name, described._replace(id=ids.get(name, ''))) for name in config.log.to
    }
    ids |= {name: logger.id for name, logger in loggers.items() if logger.id}
    if ids:
        partial = path.with_suffix('.partial')
        with naming_file(path):
            partial.write_text(json.dumps(ids) + '\n')
        os.replace(partial, path)
    return loggers


def _start(name: str, run: _Run) -> Logger:
    if name not in _LOGGERS:
        return _Function(_function(name))
    try:
        return _LOGGERS[name](run)
    except Exception as error:
        raise ValueError(
            f'log.to: {name} cannot be started ({type(error).__name__}: {error}): fix its '
            'settings, or remove it from log.to'
        ) from error


def _function(path: str) -> Callable[..., Any]:
    try:
        return plugins.load(path)
    except plugins.PluginError as error:
        raise ValueError(f'log.to: {error}') from error


def _mlflow_name(name: str) -> str:
    parts = re.sub(r'[^\w\-. :/]', '_', name, flags=re.ASCII).split('/')
    return '/'.join(part for part in parts if part not in ('', '.', '..'))
