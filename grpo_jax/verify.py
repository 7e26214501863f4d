"""Checks the files of all checkpoints of a run against their checksums.

    python -m grpo_jax.verify --workdir=FOLDER

Prints a line for each checkpoint, and ends with status 1 if a file of one of them is damaged or
missing. Nothing is changed; `train`, `evaluate` and `export` pass over a damaged newest checkpoint.
"""

import pathlib
import sys

from grpo_jax.run.arguments import take, with_two_dashes
from grpo_jax.run.buckets import check_local
from grpo_jax.run.command import one_line_errors
from grpo_jax.run.intact import verified
from grpo_jax.run.saved_config import folder_of_checkpoints


def main(workdir: str) -> bool:
    """Prints what is wrong with each checkpoint; returns whether all are intact."""
    intact = True
    check_local('workdir', workdir)
    path = pathlib.Path(workdir).absolute()
    for name, problem in verified(path, folder_of_checkpoints(path)):
        print(f'{name}: {problem or "intact"}', flush=True)
        intact = intact and not problem
    return intact


def run() -> None:
    """Runs the console command."""
    arguments = with_two_dashes(sys.argv[1:])
    if {argument.partition('=')[0] for argument in arguments} & {'--help', '--h'}:
        print((__doc__ or '').strip())
        return
    with one_line_errors():
        workdir = take(arguments, 'workdir')
        if not workdir or arguments:
            unexpected = f'unexpected argument {arguments[0]!r}: ' if arguments else ''
            raise ValueError(f'{unexpected}give --workdir=FOLDER, the folder of a run')
        intact = main(workdir)
    sys.exit(0 if intact else 1)


if __name__ == '__main__':
    run()
