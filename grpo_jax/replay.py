"""Runs a step of a run again, bit for bit, and shows what its update did with each token.

    python -m grpo_jax.replay --workdir=FOLDER --step=K [--stage=grpo] [--output=FOLDER]

The batch and the random numbers of a step depend on the seed and the step alone, so the steps from
the newest checkpoint before it are run again by the same loop. Nothing is written into the run.
A table has a line for each token of one completion: its log-prob under the policy, before the
update and under the reference, ratio, advantage, KL, and the gradient coefficient, which is the
derivative of the loss in the token's log-prob.

  --step=K           number of the step, from 0 as in metrics.jsonl
  --stage=NAME       sft, grpo, grpo-2, reward, ...; default: grpo
  --prompt=I         number of a prompt in the batch, from 0
  --completion=J     of its completions; default: the one that the update changes most
  --update=U         with several inner updates per step: which one, from 0
  --output=FOLDER    write page.html, arrays.npz and replay.json

Completions, rewards, metrics and parameters are compared with those of the run. Exits with status 1
if they differ.
"""

import pathlib
from typing import TYPE_CHECKING

from grpo_jax.run.arguments import run_command

if TYPE_CHECKING:
    from ml_collections import ConfigDict

OPTIONS = ('step', 'stage', 'prompt', 'completion', 'update', 'output')


def main(config: 'ConfigDict', workdir: str, **options: str) -> bool:
    """Replay a step; return whether it is equal to that of the run."""
    from grpo_jax.run.replay.output import replay

    return replay(config, pathlib.Path(workdir).absolute(), **options)


def run() -> None:
    """Run the console command."""
    run_command(main, usage=__doc__, sections=(), saved=True, options=OPTIONS)


if __name__ == '__main__':
    run()
