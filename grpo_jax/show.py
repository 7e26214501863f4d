"""Shows sampled completions of a step, by reward, with their turns, tool calls and replies.

    python -m grpo_jax.show --workdir=FOLDER [--step=K] [--prompt=I]

It reads completions.jsonl, which has the first `log.completions` completions of each step, and
prints every prompt once, with its completions from the best reward to the worst. White space is
visible: · a space, ↵ the end of a line, → a tab.

  --step=K      number of the step, as in completions.jsonl; default: the newest
  --stage=NAME  grpo, grpo-2, ...; default: the newest
  --prompt=I    of the prompts of the step, from 0; default: all
"""

from typing import TYPE_CHECKING

from grpo_jax.run.arguments import run_command

if TYPE_CHECKING:
    from ml_collections import ConfigDict

OPTIONS = ('step', 'stage', 'prompt')


def main(config: 'ConfigDict', workdir: str, **options: str) -> None:
    """Print the completions of a step."""
    from grpo_jax.run.show import shown

    for text in shown(config, workdir, **options):
        print(text)


def run() -> None:
    """Run the console command."""
    run_command(main, usage=__doc__, sections=(), saved=True, options=OPTIONS)


if __name__ == '__main__':
    run()
