"""Writes a run's newest checkpoint as a Hugging Face folder that `transformers` and vLLM load.

python -m grpo_jax.export --workdir=FOLDER --output=FOLDER [--dtype=bfloat16] [--adapter]

If the run trains adapters, the folder holds the merged weights or, with --adapter, a PEFT adapter
for the pretrained checkpoint.
"""

import sys

from grpo_jax.run.arguments import parse, take
from grpo_jax.run.command import one_line_errors
from grpo_jax.run.export import export, export_adapter


def run() -> None:
    """Runs the console command."""
    arguments = sys.argv[1:]
    if '--help' in arguments:
        print(__doc__)
        return
    with one_line_errors():
        adapter = '--adapter' in arguments
        arguments = [argument for argument in arguments if argument != '--adapter']
        output, dtype = take(arguments, 'output'), take(arguments, 'dtype')
        if not output:
            raise ValueError('--output=FOLDER is missing: name the folder to write')
        if adapter and dtype:
            raise ValueError('--dtype has no effect with --adapter, which is float32: remove it')
        config, workdir = parse(arguments, saved=True)
        if adapter:
            export_adapter(config, workdir, output)
        else:
            export(config, workdir, output, dtype=dtype)


if __name__ == '__main__':
    run()
