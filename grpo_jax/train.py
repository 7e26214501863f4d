"""Trains a policy: supervised fine-tuning on demonstrations, then GRPO or another method.

    python -m grpo_jax.train --config=FILE.py --workdir=FOLDER [--config.KEY=VALUE ...]

The same command resumes an interrupted run. The batch and the random numbers of a step depend only
on the seed and the step, so a resumed run computes the same numbers as an uninterrupted one.

  --extend    continue the run in the folder for more steps (sft.steps, grpo.steps, ...)
  --override  continue it with other steps, learning rates, or keys of eval, log, checkpoint, health
  --coordinator=HOST:PORT --num_processes=N --process_id=K
              one of N processes, where JAX does not find the others by itself
  --help=KEY  the keys of a section, such as --help=grpo.algorithm
  --help=presets, --help=rewards, --help=formats  what a config can name
"""

import logging

from grpo_jax.run.arguments import run_command
from grpo_jax.run.preparation import problems_of_run
from grpo_jax.run.training import train


def run() -> None:
    """Runs the console command."""
    logging.basicConfig(format='%(levelname)s %(message)s')
    run_command(train, usage=__doc__, flags=('extend', 'override'), check=problems_of_run)


if __name__ == '__main__':
    run()
