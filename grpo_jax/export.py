"""Writes a run's newest checkpoint as a Hugging Face folder that `transformers` and vLLM load.

python -m grpo_jax.export --workdir=FOLDER --output=FOLDER [--dtype=bfloat16] [--adapter]

With adapters the folder holds the merged weights, or with --adapter a PEFT adapter for the
pretrained checkpoint. Everything is written beside the folder first and moved there at the end.
"""

import contextlib
import json
import logging
import pathlib
import shutil
import sys
from collections.abc import Iterator
from typing import Any

from ml_collections import ConfigDict

from grpo_jax import setup
from grpo_jax.arguments import parse, take
from grpo_jax.command import one_line_errors
from grpo_jax.models import families, folders, hf
from grpo_jax.models.config import DTYPES
from grpo_jax.tokens import load_tokenizer

log = logging.getLogger('grpo_jax')


def export(config: ConfigDict, workdir: str, output: str, *, dtype: str = '') -> None:
    """Writes all weights, the adapters folded in.

    Args:
      config: the run's.
      workdir: its folder.
      output: a folder that does not exist yet, or is empty.
      dtype: of the weights; empty for that of the pretrained checkpoint, or of the parameters.

    Raises:
      ValueError: there is no checkpoint, no Hugging Face architecture is like the model, or the
        output folder is not empty.
    """
    made = _prepare(config, workdir)
    fields = _fields(made)
    dtype = dtype or fields.get('dtype') or fields.get('torch_dtype') or config.model.param_dtype
    if dtype not in DTYPES:
        raise ValueError(f'--dtype={dtype}: use one of {", ".join(DTYPES)}')
    with _folder(output) as folder:
        policy = setup.newest_policy(made)
        params = policy.base
        if policy.adapters:
            params = setup.merged(made, params, policy.adapters)
        told = {name: dtype for name in ('dtype', 'torch_dtype') if name in {'dtype', *fields}}
        _describe(made, fields | told, folder)
        size = hf.save(params, made.model.config.base, fields, folder, dtype=dtype)
    print(f'{policy.name}: {size / 1e6:.1f} MB of {dtype} weights in {output}')


def export_adapter(config: ConfigDict, workdir: str, output: str) -> None:
    """Writes the adapters alone, as PEFT reads them.

    Arguments are those of `export`.

    Raises:
      ValueError: as `export`; or the adapters do not belong to a pretrained checkpoint as it is.
    """
    made = _prepare(config, workdir)
    fields = _fields(made)
    with _folder(output) as folder:
        policy = setup.newest_policy(made)
        if not policy.pretrained:
            raise ValueError(
                'the run has no adapters of a pretrained checkpoint: it trained all weights, or '
                'merged the adapters of its first stage. Leave --adapter away to export all weights'
            )
        hf.save_adapter(policy.adapters, made.model.config, fields, config.pretrained, folder)
        made.tokenizer.save_pretrained(folder)
    print(f'{policy.name}: adapters of {config.pretrained} in {output}')


def _fields(made: setup.Setup) -> dict[str, Any]:
    """The `config.json` to write."""
    if made.source is not None:
        return folders.read_json(made.source / 'config.json')
    tokenizer = made.tokenizer
    ends = {'eos_token_id': tokenizer.eos_token_id, 'pad_token_id': tokenizer.pad_token_id}
    return families.hugging_face_fields(made.model.config.base) | ends


def _describe(made: setup.Setup, fields: dict[str, Any], folder: pathlib.Path) -> None:
    """Everything but the weights: config, generation config and tokenizer."""
    generation = folder / 'generation_config.json'
    own = made.source is None or bool(made.config.tokenizer)
    for path in folders.description(made.source) if made.source else ():
        if not own or path.name == generation.name:
            shutil.copyfile(path, folder / path.name)
    (folder / 'config.json').write_text(json.dumps(fields, indent=2, sort_keys=True) + '\n')
    if own:
        _save_tokenizer(made, folder)
    settings = folders.read_json(generation) if generation.exists() else {}
    settings.setdefault('pad_token_id', fields.get('pad_token_id'))
    # What the policy learnt to end with, such as the end of a chat's turn, has to end it elsewhere.
    known = settings.get('eos_token_id')
    known = known if isinstance(known, list) else [known]
    ends = [end for end in dict.fromkeys([*known, *made.ends.tolist()]) if end is not None]
    settings['eos_token_id'] = ends if len(ends) > 1 else ends[0]
    generation.write_text(json.dumps(settings, indent=2) + '\n')


def _save_tokenizer(made: setup.Setup, folder: pathlib.Path) -> None:
    """Writes the run's tokenizer beside a `config.json`, which decides how it is read again."""
    made.tokenizer.save_pretrained(folder)
    again = load_tokenizer(str(folder))
    if again.backend_tokenizer.to_str() != made.tokenizer.backend_tokenizer.to_str():
        log.warning(
            'transformers reads the exported folder with another tokenizer than the run had, '
            'because of the architecture: load the tokenizer with PreTrainedTokenizerFast'
        )


def _prepare(config: ConfigDict, workdir: str) -> setup.Setup:
    """Without what only running it would need: a reward model's folder, a platform's kernel."""
    config = config.copy_and_resolve_references()
    config.reward_model.weight = 0.0
    config.model.attention = 'auto'
    return setup.prepare(config, pathlib.Path(workdir).absolute())


@contextlib.contextmanager
def _folder(output: str) -> Iterator[pathlib.Path]:
    """A folder to write into, which takes the place of `output` when all went well."""
    target = pathlib.Path(output).absolute()
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ValueError(f'--output={output} is not empty: name a new folder')
    partial = target.with_name(f'{target.name}.partial')
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        yield partial
        if target.exists():
            target.rmdir()
        partial.rename(target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def run() -> None:
    """The console entry point."""
    given = sys.argv[1:]
    if '--help' in given:
        print(__doc__)
        return
    with one_line_errors():
        adapter = '--adapter' in given
        given = [argument for argument in given if argument != '--adapter']
        output, dtype = take(given, 'output'), take(given, 'dtype')
        if not output:
            raise ValueError('--output=FOLDER is missing: name the folder to write')
        if adapter and dtype:
            raise ValueError(
                '--dtype does nothing with --adapter, which are float32: leave it away'
            )
        config, workdir = parse(given, saved=True)
        if adapter:
            export_adapter(config, workdir, output)
        else:
            export(config, workdir, output, dtype=dtype)


if __name__ == '__main__':
    run()
