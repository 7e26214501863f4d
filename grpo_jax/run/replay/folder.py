"""What a replay reads of a run's folder, in a temporary folder of its own.

So nothing that a stage writes, such as prepared data, compiled programs or the samples that a
reward model is trained on, can change the run.
"""

import contextlib
import pathlib
import shutil
import tempfile
from collections.abc import Iterator

from grpo_jax.run.compute_plans import FILE as COMPUTE_PLANS
from grpo_jax.run.episodes.recorded import FOLDER as REPLIES

_LINKED = ('cache', 'data', 'pretrained', 'replay')


@contextlib.contextmanager
def mirrored(workdir: pathlib.Path) -> Iterator[pathlib.Path]:
    """A temporary folder with links to the files that the stages of a run read.

    The compiled programs are among them, so that a replay runs the programs of the run.

    Args:
      workdir: the run's folder.
    """
    with tempfile.TemporaryDirectory(prefix='grpo-jax-replay-') as name:
        folder = pathlib.Path(name)
        for part in _LINKED:
            for path in sorted((workdir / part).rglob('*')):
                target = folder / path.relative_to(workdir)
                if path.is_dir():
                    target.mkdir(parents=True, exist_ok=True)
                else:
                    target.parent.mkdir(parents=True, exist_ok=True)
                    target.symlink_to(path.resolve())
        if (workdir / REPLIES).is_dir():  # to which a replay may add
            shutil.copytree(workdir / REPLIES, folder / REPLIES)
        if (workdir / COMPUTE_PLANS).is_file():
            shutil.copyfile(workdir / COMPUTE_PLANS, folder / COMPUTE_PLANS)
        yield folder
