"""The folder of a process whose machine does not have the workdir of the first one.

Machines without a shared file system have a folder of the same name each. The records are in that
of the first process; with the checkpoints in a bucket, the others read its config alone, and keep
in theirs what is prepared anew elsewhere: compiled programs, data sets, replies of environments.
"""

import pathlib

from ml_collections import ConfigDict

from grpo_jax.run import hosts
from grpo_jax.run.layout import checkpoints


def own_folder(config: ConfigDict, workdir: str) -> str:
    """The workdir, or a folder in it for a process that does not see that of the first one.

    All processes call it. It has to be shared unless the checkpoints are elsewhere.

    Args:
      config: of the run.
      workdir: the run's folder, which the first process has made.

    Raises:
      ConfigError: what all processes have to see is not in a folder that they share.
    """
    folder = config.checkpoint.folder
    if hosts.count() == 1 or not folder:
        return workdir
    path = pathlib.Path(workdir).absolute()
    text = hosts.from_first(lambda: _text(path / 'config.json'), 'reading the config')
    seen = hosts.is_seen(path)
    with hosts.together('checking the workdir'):
        replayed = config.reward_model.steps and config.reward_model.replay
        if not seen and replayed and config.grpo.iterations > 1:
            raise ValueError(
                f'reward_model.replay={config.reward_model.replay} reads the samples of earlier '
                f'iterations from workdir {str(path)!r}, which is another folder than that of '
                'process 0: name a folder that all hosts share, or set it to 0'
            )
        if not seen:
            path = path / f'process-{hosts.index()}'
            path.mkdir(parents=True, exist_ok=True)
            (path / 'config.json').unlink(missing_ok=True)
            if text:
                (path / 'config.json').write_text(text)
    return str(path)


def check_shared(config: ConfigDict, workdir: pathlib.Path) -> None:
    """Checks that all processes see the folder that the checkpoints are in.

    Raises:
      ConfigError: one of them does not.
    """
    folder = config.checkpoint.folder
    if folder:
        hosts.check_shared(checkpoints(workdir, folder), 'checkpoint.folder')
    else:
        hosts.check_shared(workdir)


def _text(path: pathlib.Path) -> str:
    return path.read_text() if path.is_file() else ''
