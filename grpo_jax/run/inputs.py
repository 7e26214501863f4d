"""What a run reads beside its config: data, tokenizer and code, whose digests are kept with it.

A run that is resumed with others would go on with other numbers, and nobody would know.
"""

import base64
import dataclasses
import hashlib
import json
import os
import pathlib
import re
import zlib
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from grpo_jax import data, plugins
from grpo_jax.run import changes
from grpo_jax.run.config import flatten
from grpo_jax.run.errors import ConfigError
from grpo_jax.run.output_file import replaced
from grpo_jax.run.sources import file_of, source_digest

FILE = 'inputs.json'  # in the run's folder

# Keys that may name code of the user's own, and what they name.
_CODE = re.compile(
    r'grpo\.(rewards|step_rewards|algorithm)\b|eval\.(correct|extract)$|.*optimizer\.name$'
    r'|reward_model\.loss$|environment\.name$'
)


@dataclasses.dataclass(frozen=True)
class Inputs:
    """Digests of what a run reads.

    Attributes:
      digests: {what it is: hexadecimal digest of 64 bits}.
      rows: {what it is: a short digest of each of its rows, in text}.
    """

    digests: Mapping[str, str]
    rows: Mapping[str, str]


def digest_inputs(
    config: ConfigDict, tokenizer: Any, training: data.Rows, heldout: data.Rows | None
) -> Inputs:
    """Makes the digests of a run's inputs.

    Args:
      config: of the run.
      tokenizer: of the run.
      training: all rows of the training split.
      heldout: all rows of the held-out split, if there is one.
    """
    digests, rows = dict[str, str](), dict[str, str]()
    for split, found in (('train', training), ('heldout', heldout)):
        if found is not None:
            name = f'data.{split}_split={config.data[f"{split}_split"]!r}'
            digests[name], rows[name] = _digest_rows(found)
    digests |= {f'the {name} of the tokenizer': _short(x) for name, x in _parts(tokenizer)}
    for key, path in _paths(config):
        digests[f'the code of {key}={path!r}'] = _digest_code(path)
    for text in _texts_in(config.environment.options.to_dict()):
        if file := _file_beside(text):
            digests[f'the file {text!r} of environment.options'] = _digest_file(file)
    return Inputs({name: text for name, text in digests.items() if text}, rows)


def check_inputs(inputs: Inputs, workdir: pathlib.Path, *, override: bool) -> None:
    """Checks that a run in a folder that has checkpoints is resumed with the inputs that it had.

    Args:
      inputs: those that are there now.
      workdir: the run's folder.
      override: whether they may be others.

    Raises:
      ConfigError: they are others; names each, and the first row that differs.
    """
    different = _differences(inputs, _read(workdir))
    if different and not override:
        raise ConfigError([
            f'{name} has changed since the run in {str(workdir)!r} was started ({text}): restore '
            'it, use another --workdir, or continue with it by --override'
            for name, (_, _, text) in different.items()
        ])  # fmt: skip


def keep_inputs(inputs: Inputs, workdir: pathlib.Path, steps: Mapping[str, list[int]]) -> None:
    """Writes the digests into the run's folder, and records those that have changed.

    Args:
      inputs: those that the run goes on with.
      workdir: the run's folder.
      steps: the steps of its checkpoints, by stage; without any, nothing has changed.
    """
    different = _differences(inputs, _read(workdir)) if any(steps.values()) else {}
    if different:
        changed = {name: {'from': a, 'to': b} for name, (a, b, _) in different.items()}
        changes.append_record(changed, workdir, steps)
    with replaced(workdir / FILE) as file:
        file.write(json.dumps(dataclasses.asdict(inputs), indent=1) + '\n')


def _differences(inputs: Inputs, saved: Inputs | None) -> dict[str, tuple[str, str, str]]:
    """The inputs that both have and that differ: (digest there, digest here, what is told)."""
    if saved is None:
        return {}
    found = {}
    for name, here in inputs.digests.items():
        there = saved.digests.get(name, here)
        if there != here:
            rows = _first_difference(saved.rows.get(name, ''), inputs.rows.get(name, ''))
            found[name] = there, here, f'{rows}digest {there} there, {here} here'
    return found


def _read(workdir: pathlib.Path) -> Inputs | None:
    """What was kept; None where an earlier version has kept nothing.

    Raises:
      ValueError: the file cannot be read; names it.
    """
    path = workdir / FILE
    if not path.is_file():
        return None
    try:
        found = Inputs(**json.loads(path.read_bytes()))
        if not all(isinstance(text, str) for text in found.digests.values()):
            raise TypeError('it holds digests that are no texts')
        for text in found.rows.values():
            np.frombuffer(base64.b64decode(text), '<u4')
        return Inputs({**found.digests}, {**found.rows})
    except (AttributeError, TypeError, ValueError, RecursionError) as error:
        raise ValueError(
            f'{path} cannot be read ({error}): restore it, or remove it to go on without knowing '
            'whether data, tokenizer and rewards are those of the run'
        ) from error


def _digest_rows(rows: data.Rows) -> tuple[str, str]:
    """A digest of all rows in their order, and 32 bits for each of them."""
    total, each = hashlib.sha256(), np.zeros(len(rows), '<u4')
    for i, row in enumerate(rows):
        text = _text(row).encode() + b'\n'
        total.update(text)
        each[i] = zlib.crc32(text)
    return total.hexdigest()[:16], base64.b64encode(each.tobytes()).decode()


def _text(row: Mapping[str, Any]) -> str:
    def plain(value: Any) -> Any:
        return value.tolist() if hasattr(value, 'tolist') else repr(value)

    try:
        return json.dumps(row, sort_keys=True, default=plain)
    except TypeError:  # names in it that are no texts
        return repr(row)


def _first_difference(there: str, here: str) -> str:
    """What is told of the rows of a split; empty for what has none."""
    if not (there and here):
        return ''
    a, b = (np.frombuffer(base64.b64decode(text), '<u4') for text in (there, here))
    size = min(len(a), len(b))
    differing = np.flatnonzero(a[:size] != b[:size])
    first = f'row {differing[0]} from 0 is the first that differs, ' if differing.size else ''
    return f'{first}{len(a)} rows there, {len(b)} here, '


def _parts(tokenizer: Any) -> Iterator[tuple[str, Any]]:
    """What a tokenizer is made of, as JSON types."""
    backend = getattr(tokenizer, 'backend_tokenizer', None)
    if backend is not None:
        stored = json.loads(backend.to_str())
        # These are set by the calls of it.
        yield 'tokens and merges', {k: v for k, v in stored.items() if k not in _OF_CALLS}
    else:
        yield 'tokens', tokenizer.get_vocab()
    names = ('bos_token_id', 'eos_token_id', 'pad_token_id', 'add_bos_token')
    yield 'special tokens', [repr(getattr(tokenizer, name, None)) for name in names]
    yield 'chat template', repr(getattr(tokenizer, 'chat_template', None))


_OF_CALLS = ('truncation', 'padding')


def _short(value: Any) -> str:
    text = json.dumps(value, sort_keys=True, default=repr)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _paths(config: ConfigDict) -> Iterator[tuple[str, str]]:
    """Yields (key, path) of all code of the user's own that determines numbers of a run."""
    for key, value in flatten(config.to_dict()).items():
        names = _names(value) if _CODE.match(key) else ()
        if key == 'environment.options':
            names = _texts_in(value)
        yield from ((key, text) for text in names if '.' in text or ':' in text)


def _names(value: Any) -> Iterator[str]:
    """Yields the names of functions in a value: itself, or those of a dictionary of rewards."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for name, options in value.items():
            function = options.get('function', name) if isinstance(options, dict) else name
            yield from _names(function)


def _texts_in(value: Any) -> Iterator[str]:
    """Yields all texts in a value: keys and values of dictionaries, and items of lists."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        yield from _texts_in([*value.keys(), *value.values()])
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _texts_in(item)


def _file_beside(text: str) -> pathlib.Path | None:
    """The file of this name, relative to the folder of the config file, if there is one."""
    path = os.path.join((plugins.folders() or ['.'])[0], os.path.expanduser(text))
    return pathlib.Path(path) if os.path.isfile(path) else None


def _digest_file(path: pathlib.Path) -> str:
    with path.open('rb') as file:
        return hashlib.file_digest(file, 'sha256').hexdigest()[:16]


def _digest_code(path: str) -> str:
    """The digest of what a path leads to; empty for what is of an installed package."""
    file = file_of(path)
    if file is None:
        return ''
    return source_digest(file, path.rpartition(':' if ':' in path else '.')[2])[:16]
