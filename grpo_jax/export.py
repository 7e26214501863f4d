"""Writes a checkpoint of a run as a Hugging Face folder that `transformers` and vLLM load.

python -m grpo_jax.export --workdir=FOLDER --output=FOLDER

--checkpoint=sft/60  or grpo/40, sft (its newest), 40; default: the newest of all
--dtype=bfloat16     of the weights; default: that of the pretrained checkpoint or the parameters
--adapter            a PEFT adapter for the pretrained checkpoint, in place of merged weights
"""

from typing import Any

from grpo_jax.run.arguments import run_command
from grpo_jax.run.export import export, export_adapter


def main(
    config: Any, workdir: str, *, output: str, dtype: str, checkpoint: str, adapter: bool
) -> None:
    """Exports a checkpoint of a run."""
    if not output:
        raise ValueError('--output=FOLDER is missing: name the folder to write')
    if not adapter:
        export(config, workdir, output, dtype=dtype, checkpoint=checkpoint)
        return
    if dtype:
        raise ValueError('--dtype has no effect with --adapter, which is float32: remove it')
    export_adapter(config, workdir, output, checkpoint=checkpoint)


def run() -> None:
    """Runs the console command."""
    options = ('output', 'dtype', 'checkpoint')
    run_command(main, usage=__doc__, sections=(), saved=True, flags=('adapter',), options=options)


if __name__ == '__main__':
    run()
