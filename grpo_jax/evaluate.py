"""Accuracy, pass@k, maj@k, avg@k and rm@k with 95 % intervals over problems, as one JSON object.

Evaluate the newest checkpoint of a run, on its held-out problems or on others:
  python -m grpo_jax.evaluate --workdir=FOLDER [--config.eval.samples=64 "--config.eval.k=(1,64)"]
      [--config.data.name=NAME --config.data.heldout_split=SPLIT --config.data.prompt=TEMPLATE]

Grade completions produced elsewhere, without a model (see `grpo_jax.run.completions`):
  python -m grpo_jax.evaluate --completions=FILE.jsonl --dataset=NAME [--k=1,8] [--output=FILE]
"""

import json
import pathlib
import sys
from typing import TYPE_CHECKING

from grpo_jax.run import completions
from grpo_jax.run.command import one_line_errors
from grpo_jax.run.statistics import with_intervals

if TYPE_CHECKING:
    from ml_collections import ConfigDict


def main(config: 'ConfigDict', workdir: str) -> None:
    """Evaluate the newest checkpoint of a run, print the metrics and write the answers."""
    # Not at the top of the file: completions produced elsewhere are graded without JAX.
    from grpo_jax.run import compiled, evaluation, graders, parameters, problems, setup

    run_setup = setup.prepare(config, pathlib.Path(workdir).absolute())
    options = evaluation.evaluation_options(config.eval)
    heldout = problems.heldout_problems(run_setup)
    with compiled.kept_in(run_setup.workdir / 'cache'), compiled.trimmed():
        policy = parameters.newest_policy(run_setup)
        rank = graders.make_ranker(run_setup, heldout)
        answers = evaluation.answer_problems(
            run_setup.sampler, policy.params, heldout, rank=rank, **options
        )
    with (run_setup.workdir / 'evaluation.jsonl').open('w') as file:
        for record in evaluation.answer_records(answers):
            file.write(json.dumps(record, ensure_ascii=False) + '\n')
    summary = {'checkpoint': policy.name, 'problems': len(answers.correct)}
    print(json.dumps(summary | with_intervals(answers.values)))


def run() -> None:
    """Run the console command."""
    arguments = sys.argv[1:]
    if '--help' in arguments:
        print(__doc__)
    elif any(argument.startswith(('--completions', '--dataset')) for argument in arguments):
        with one_line_errors():
            completions.main(arguments)
    else:
        from grpo_jax.run.arguments import run_command

        run_command(main, saved=True)


if __name__ == '__main__':
    run()
