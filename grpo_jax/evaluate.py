"""Accuracy, pass@k, maj@k, avg@k and rm@k, or the mean reward, with 95 % intervals over problems.

Evaluate the newest checkpoint of a run, on its held-out problems or on others:
  python -m grpo_jax.evaluate --workdir=FOLDER [--checkpoint=STAGE/STEP] [--config.KEY=VALUE ...]
  --data=NAME                      another data set; also --config.data.heldout_split=SPLIT,
                                   --config.data.options={...}, --config.data.prompt=TEMPLATE
  --config.eval.samples=64 "--config.eval.k=(1,64)"
  --checkpoint=sft/60              or grpo/40, sft (its newest), 40; default: the newest of all
  --output=FILE                    of the answers; default: evaluation.jsonl in the folder

Grade completions produced elsewhere, without a model (see `grpo_jax.run.completions`):
  python -m grpo_jax.evaluate --completions=FILE.jsonl --dataset=NAME [--k=1,8] [--output=FILE]

Prints one JSON object.
"""

import json
import pathlib
import re
import sys
from typing import TYPE_CHECKING

from grpo_jax.run import completions
from grpo_jax.run.command import one_line_errors
from grpo_jax.run.statistics import with_intervals

if TYPE_CHECKING:
    from ml_collections import ConfigDict


def main(config: 'ConfigDict', workdir: str, *, checkpoint: str = '', output: str = '') -> None:
    """Evaluate a checkpoint of a run, print the metrics and write the answers."""
    # Not at the top of the file: completions produced elsewhere are graded without JAX.
    from grpo_jax.run import heldout, hosts

    name, answers = heldout.answer(config, pathlib.Path(workdir).absolute(), checkpoint, output)
    summary = {'checkpoint': name, 'problems': len(answers.prompts)}
    metrics = with_intervals(answers.values) | heldout.spread(answers)
    hosts.say(json.dumps(summary | metrics))


def run() -> None:
    """Run the console command."""
    arguments = [re.sub('^--?', '--', argument) for argument in sys.argv[1:]]
    if any(argument.startswith(('--completions', '--dataset')) for argument in arguments):
        with one_line_errors():
            completions.main(arguments)
        return
    from grpo_jax.run.arguments import run_command
    from grpo_jax.run.heldout import problems_of_evaluation as check

    sys.argv[1:] = [re.sub('^--data=', '--config.data.name=', text) for text in arguments]
    options = ('checkpoint', 'output')
    sections = ('eval', 'data')
    run_command(main, usage=__doc__, sections=sections, saved=True, options=options, check=check)


if __name__ == '__main__':
    run()
