"""The folder of a run's checkpoints, and its stages: sft, reward, grpo, reward-2, grpo-2, ..."""

import os
import re

from etils import epath

from grpo_jax.run.buckets import open_folder


def checkpoints(workdir: str | os.PathLike[str], folder: str = '') -> epath.Path:
    """The folder of a run's checkpoints, which are `STAGE/STEP` in it.

    Args:
      workdir: the run's folder.
      folder: the key `checkpoint.folder`: a folder, or `gs://BUCKET/FOLDER`; empty: `checkpoints`
        in the run's folder.

    Raises:
      ValueError: a bucket that cannot be read, see `buckets.open_folder`.
    """
    if re.match(r'\w+:/', folder):
        return open_folder(folder)
    return epath.Path(os.path.abspath(folder or os.path.join(workdir, 'checkpoints')))


def stage_order(name: str) -> tuple[int, int]:
    """A sort key of stage names."""
    kind, _, iteration = name.partition('-')
    return (0 if kind == 'sft' else int(iteration or 1), ('sft', 'reward', 'grpo').index(kind))


def is_stage(name: str) -> bool:
    """Whether a name is that of a stage; folders may hold other files."""
    return re.fullmatch(r'sft|(reward|grpo)(-[1-9]\d*)?', name) is not None
