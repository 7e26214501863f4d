"""Export of a run's newest checkpoint as a Hugging Face folder.

Everything is written to a temporary folder first and moved to its place at the end.
"""

import contextlib
import json
import logging
import os
import pathlib
from collections.abc import Iterator
from typing import Any

from ml_collections import ConfigDict

from grpo_jax.data import load_tokenizer
from grpo_jax.models import hf
from grpo_jax.models.config import DTYPES
from grpo_jax.run import hosts
from grpo_jax.run.buckets import check_local
from grpo_jax.run.checkpoint import find_checkpoint
from grpo_jax.run.config_checks import check_values
from grpo_jax.run.errors import ConfigError
from grpo_jax.run.output_file import new_folder
from grpo_jax.run.parameters import merged, newest_policy
from grpo_jax.run.repairs import Finder
from grpo_jax.run.setup import Setup, prepare_policy

log = logging.getLogger('grpo_jax')


def export(
    config: ConfigDict, workdir: str, output: str, *, dtype: str = '', checkpoint: str = ''
) -> None:
    """Writes all weights, with the adapters merged in.

    Args:
      config: the config of the run.
      workdir: the run's folder.
      output: a folder that does not exist yet, or is empty.
      dtype: dtype of the weights; if empty, that of the pretrained checkpoint or the parameters.
      checkpoint: 'STAGE/STEP', STAGE or STEP; empty: the newest.

    Raises:
      ValueError: there is no such checkpoint, no Hugging Face architecture fits the model, or the
        output folder is not empty.
    """
    setup = _prepare(config, workdir, output, checkpoint, dtype)
    fields = _fields(setup)
    dtype = dtype or fields.get('dtype') or fields.get('torch_dtype') or config.model.param_dtype
    with _folder(output) as folder:
        policy = newest_policy(setup, checkpoint)
        params = policy.base
        if policy.adapters:
            params = merged(setup, params, policy.adapters)
        stated = {name: dtype for name in ('dtype', 'torch_dtype') if name in {'dtype', *fields}}
        if hosts.is_first():
            _describe(setup, fields | stated, folder)
        size = hf.save(params, setup.model.config.base, fields, folder, dtype=dtype)
    hosts.say(f'{policy.name}: {size / 1e6:.1f} MB of {dtype} weights in {output}')


def export_adapter(config: ConfigDict, workdir: str, output: str, *, checkpoint: str = '') -> None:
    """Writes the adapters alone, as PEFT reads them; arguments as in `export`.

    Raises:
      ValueError: as in `export`, or no adapters apply to the unchanged pretrained checkpoint.
    """
    setup = _prepare(config, workdir, output, checkpoint)
    fields = _fields(setup)
    with _folder(output) as folder:
        policy = newest_policy(setup, checkpoint)
        if not policy.pretrained:
            raise ValueError(
                'the run has no adapters of a pretrained checkpoint: it trained all weights, or '
                'merged the adapters of its first stage. Remove --adapter to export all weights'
            )
        base = config.pretrained  # a folder, whose absolute path is written, or a name on the hub
        base = os.path.abspath(base) if os.path.isdir(base) else base
        hf.save_adapter(policy.adapters, setup.model.config, fields, base, folder)
        if hosts.is_first():
            _tokenizer(setup).save_pretrained(folder)
    hosts.say(f'{policy.name}: adapters of {config.pretrained} in {output}')


def _prepare(
    config: ConfigDict, workdir: str, output: str, checkpoint: str, dtype: str = ''
) -> Setup:
    """The setup of the run; all that the user has to fix is one error."""
    finder, path = Finder(config), pathlib.Path(workdir).absolute()
    with hosts.together('checking the config'):
        finder.run(check_values)
        setup = finder.run(lambda c: prepare_policy(c, path))
        folder = config.checkpoint.folder
        finder.run(lambda _: find_checkpoint(path, ('sft', 'grpo'), checkpoint, folder))
        finder.run(lambda _: _check_empty(output))
        if dtype and dtype not in DTYPES:
            finder.add([f'--dtype={dtype}: use one of {", ".join(DTYPES)}'])
        if setup is None or finder.problems:
            raise ConfigError(finder.problems)
    return setup


def _check_empty(output: str) -> None:
    check_local('--output', output)
    target = pathlib.Path(output)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ValueError(f'--output={output} is not empty: name a new folder')


def _fields(setup: Setup) -> dict[str, Any]:
    """The `config.json` to write."""
    if setup.source is not None:
        return hf.read_config(setup.source)
    tokenizer = setup.tokenizer
    ends = {'eos_token_id': tokenizer.eos_token_id, 'pad_token_id': tokenizer.pad_token_id}
    return hf.hugging_face_fields(setup.model.config.base) | ends


def _describe(setup: Setup, fields: dict[str, Any], folder: pathlib.Path) -> None:
    """Writes everything but the weights: config, generation config and tokenizer."""
    generation = folder / 'generation_config.json'
    own = setup.source is None or bool(setup.config.tokenizer)
    if setup.source:
        hf.copy_description(setup.source, folder, generation.name if own else '*')
    (folder / 'config.json').write_text(json.dumps(fields, indent=2, sort_keys=True) + '\n')
    if own:
        _save_tokenizer(setup, folder)
    settings = hf.read_json(generation) if generation.exists() else {}
    settings.setdefault('pad_token_id', fields.get('pad_token_id'))
    # Other programs have to stop where the policy learned to stop, as at the end of a chat turn.
    known = settings.get('eos_token_id')
    known = known if isinstance(known, list) else [known]
    ends = [end for end in dict.fromkeys([*known, *setup.ends.tolist()]) if end is not None]
    settings['eos_token_id'] = ends if len(ends) > 1 else ends[0]
    generation.write_text(json.dumps(settings, indent=2) + '\n')


def _tokenizer(setup: Setup) -> Any:
    """The run's tokenizer with its own chat template, without the run's variables and date."""
    return load_tokenizer(setup.config.tokenizer or str(setup.source or 'bytes'))


def _save_tokenizer(setup: Setup, folder: pathlib.Path) -> None:
    """Writes the run's tokenizer; `config.json` in `folder` decides how transformers loads it."""
    tokenizer = _tokenizer(setup)
    tokenizer.save_pretrained(folder)
    try:
        again = load_tokenizer(str(folder)).backend_tokenizer.to_str()
    except ValueError:  # it encodes texts differently
        again = ''
    if again != tokenizer.backend_tokenizer.to_str():
        log.warning(
            'transformers loads another tokenizer from the exported folder than the run used, '
            'because of the architecture: load the tokenizer with PreTrainedTokenizerFast'
        )


@contextlib.contextmanager
def _folder(output: str) -> Iterator[pathlib.Path]:
    """A folder to write into, which is moved to `output` if nothing fails."""
    if not hosts.is_first():
        yield pathlib.Path(output)  # nothing is written
        return
    with new_folder(pathlib.Path(output)) as folder:
        yield folder
