"""Accuracy, pass@k, maj@k, avg@k and rm@k with 95 % intervals over problems, as one JSON object.

The newest checkpoint of a run, on its held-out problems or on any others:
  python -m grpo_jax.evaluate --workdir=FOLDER [--config.eval.samples=64 "--config.eval.k=(1,64)"]
      [--config.data.name=NAME --config.data.heldout_split=SPLIT --config.data.prompt=TEMPLATE]

Completions produced elsewhere, without a model (see `grpo_jax.completions`):
  python -m grpo_jax.evaluate --completions=FILE.jsonl --dataset=NAME [--k=1,8] [--output=FILE]
"""

import json
import pathlib
import sys
from typing import TYPE_CHECKING

from grpo_jax import completions
from grpo_jax.command import one_line_errors
from grpo_jax.estimates import with_intervals

if TYPE_CHECKING:
    from ml_collections import ConfigDict


def main(config: 'ConfigDict', workdir: str) -> None:
    """Evaluates the newest checkpoint of a run and writes what it answered."""
    # Not at the top of the file: completions produced elsewhere are scored without JAX.
    from grpo_jax import compiled, judging, setup, stages

    made = setup.prepare(config, pathlib.Path(workdir).absolute())
    settings = judging.settings(config.eval)
    heldout = setup.heldout_problems(made)
    with compiled.kept_in(made.workdir / 'cache'), compiled.trimmed():
        policy = setup.newest_policy(made)
        answers = judging.answer(
            made.sampler, policy.params, heldout, rank=stages.ranking(made, heldout), **settings
        )
    with (made.workdir / 'evaluation.jsonl').open('w') as file:
        for row in judging.rows(answers):
            file.write(json.dumps(row, ensure_ascii=False) + '\n')
    found = {'checkpoint': policy.name, 'problems': len(answers.correct)}
    print(json.dumps(found | with_intervals(answers.values)))


def run() -> None:
    """The console entry point."""
    given = sys.argv[1:]
    if '--help' in given:
        print(__doc__)
    elif any(argument.startswith(('--completions', '--dataset')) for argument in given):
        with one_line_errors():
            completions.main(given)
    else:
        from grpo_jax.arguments import run_command

        run_command(main, saved=True)


if __name__ == '__main__':
    run()
