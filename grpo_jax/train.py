"""Trains a policy: supervised fine-tuning on demonstrations, then GRPO or another method.

    python -m grpo_jax.train --config=configs/arithmetic.py --workdir=FOLDER [--config.key=value
    ...]

The same command resumes a run that was stopped in any way. The batch and the random numbers of a
step are functions of the seed and the step, so a resumed run computes the same numbers as one that
was never stopped.
"""

import logging

from grpo_jax.run.arguments import run_command
from grpo_jax.run.training import train


def run() -> None:
    """The console entry point."""
    logging.basicConfig(format='%(levelname)s %(message)s')
    run_command(train, usage=__doc__)


if __name__ == '__main__':
    run()
