"""Tells before a run what it needs: memory and time of its programs, on devices that it describes.

    python -m grpo_jax.plan --config=FILE.py --topology=v5e:4x4 [--config.KEY=VALUE ...]

It needs no weights and no accelerator: every program of the run is compiled ahead of time from
abstract arrays. The config and the data set are checked as `grpo_jax.train` does. A pretrained
checkpoint needs only its config.json and its tokenizer.

  --topology=NAME  'local' (the default), a slice of TPUs such as v5e:4x4, v5p:4x4x4 or v6e:8x8
                   (needs `pip install libtpu`), or GPUs such as h100:8, which are estimated
  --memory=16GiB   of a device, instead of what its kind has
  --workdir=FOLDER of the run: the plan is kept there, and the run warns of programs that it does
                   not list; default: a temporary folder
  --json           print one JSON object

Exits with status 1 if the run does not fit.
"""

import sys
import tempfile
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ml_collections import ConfigDict


def main(
    config: 'ConfigDict', workdir: str, *, topology: str = '', memory: str = '', json: bool = False
) -> bool:
    """Print the plan of a run; return whether it fits, as far as that is known."""
    from grpo_jax.run.plan.printing import print_plan

    plan = print_plan(config, workdir, topology=topology, memory=memory, json=json)
    return plan.fits is not False


def run() -> None:
    """Run the console command."""
    from grpo_jax.run.arguments import run_command

    with tempfile.TemporaryDirectory() as folder:
        if not any(argument.lstrip('-').startswith('workdir') for argument in sys.argv[1:]):
            sys.argv.append(f'--workdir={folder}')
        run_command(main, usage=__doc__, flags=('json',), options=('topology', 'memory'))


if __name__ == '__main__':
    run()
