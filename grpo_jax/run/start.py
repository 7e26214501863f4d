"""The key `start`: another run and a stage of it that a run begins from."""

import pathlib
from typing import NamedTuple

from ml_collections import ConfigDict

from grpo_jax.run import buckets, saved_config
from grpo_jax.run.checkpoint import find_checkpoint, steps_of_stages
from grpo_jax.run.config import flatten, set_value
from grpo_jax.run.defaults import defaults

# Keys of `model` that do not determine parameters, and are those of each run.
_OWN = ('model.attention', 'model.remat', 'model.lora')


class Start(NamedTuple):
    """A checkpoint of another run."""

    workdir: pathlib.Path
    checkpoint: str  # stage/step

    @classmethod
    def parse(cls, text: str) -> 'Start':
        """The start that a config names.

        Raises:
          ValueError: it is not of the form FOLDER:STAGE or FOLDER:STAGE/STEP.
        """
        folder, _, name = text.rpartition(':')
        if not folder or not name:
            raise ValueError(f"start={text!r}: name a run and a stage of it, as in 'runs/a:sft'")
        buckets.check_local('start', folder)
        return cls(pathlib.Path(folder).absolute(), name)

    def __str__(self) -> str:
        return f'{self.workdir}:{self.checkpoint}'


def with_start(config: ConfigDict, workdir: str) -> ConfigDict:
    """The config with the model of the run that it starts from, and the step of the checkpoint.

    The keys `model`, `pretrained` and `tokenizer` are copied where they have their defaults. A run
    that is resumed keeps the step it started from.

    Args:
      config: of the run.
      workdir: the run's folder.

    Returns:
      A copy; the config itself without `start`.

    Raises:
      ValueError: there is no such run or checkpoint.
    """
    if not config.start:
        return config
    start = Start.parse(config.start)
    saved = pathlib.Path(workdir, 'config.json').absolute()
    folder = config.checkpoint.folder
    resumed = saved.is_file() and any(steps_of_stages(saved.parent, folder).values())
    before = saved_config.read(saved, quiet=True).start if resumed else ''
    if before.startswith(f'{start}/') or before == str(start):
        start = Start.parse(before)
    path = start.workdir / 'config.json'
    if not path.is_file():
        raise ValueError(f'start={config.start!r}: {path} does not exist: name the folder of a run')
    other = saved_config.read(path)
    try:
        stage, step = find_checkpoint(
            start.workdir, ('sft', 'grpo'), start.checkpoint, other.checkpoint.folder
        )
    except ValueError as error:
        raise ValueError(f'start={config.start!r}: {error}') from error
    config = config.copy_and_resolve_references()
    config.start = str(start._replace(checkpoint=f'{stage}/{step}'))
    default_values, values = flatten(defaults()), flatten(config)
    for key, value in flatten(other).items():
        model = key.startswith('model.') and not key.startswith(_OWN)
        if (model or key in ('pretrained', 'tokenizer')) and values[key] == default_values[key]:
            set_value(config, key, value)
    return config
