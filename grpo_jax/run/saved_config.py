"""The config that is saved in a run's folder, by this version or an earlier one.

The saved text has a schema number. `from_json` migrates an older layout and sets keys that were
added since to their defaults, so that older runs can be evaluated, exported and resumed.
"""

import json
import logging
import pathlib
from collections.abc import Callable
from typing import Any

from ml_collections import ConfigDict

from grpo_jax.run.config import flatten, set_value
from grpo_jax.run.defaults import compute_fields, defaults
from grpo_jax.run.paths import same_path
from grpo_jax.run.suggestions import suggest

log = logging.getLogger('grpo_jax')

SCHEMA = 2  # 1, without a number: `grpo.objective`, and in `grpo.algorithm` what `compute` is now

# Keys that no longer exist -> whether a value can be dropped because it did not affect results.
_REMOVED: dict[str, Callable[[Any], bool]] = {
    'grpo.algorithm.entropy_mask': lambda value: value is False,
    'grpo.sample_batch': lambda value: True,  # how many prompts were sampled at a time
}


def to_json(config: ConfigDict) -> str:
    """The config as text that `from_json` reads."""
    values = {'schema': SCHEMA, **config.to_dict()}
    return json.dumps(values, indent=2, sort_keys=True) + '\n'


def from_json(text: str, *, quiet: bool = False) -> ConfigDict:
    """A locked config from the text that a run saved; logs what differs from this version's keys.

    Args:
      text: from `to_json`.
      quiet: do not log it, because it has been logged already.

    Raises:
      ValueError: the text is not JSON, was written by a later version, or has an unknown key.
    """
    try:
        values = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f'not valid JSON: {error}') from error
    if not isinstance(values, dict):
        raise ValueError(f'holds {type(values).__name__}, not a JSON object')
    schema = values.pop('schema', 1)
    if type(schema) is not int or schema < 1:
        raise ValueError(f'schema={schema!r:.80} is no number of a schema')
    if schema > SCHEMA:
        raise ValueError(
            f'schema={schema} was written by a later version of grpo_jax, and this one reads up to '
            f'{SCHEMA}: update grpo_jax'
        )
    if schema == 1:
        _move_keys_of_schema_1(values)
    config = defaults()
    known, saved = flatten(config), flatten(values)
    removed = [path for path in saved if path in _REMOVED]
    for path in removed:
        if not _REMOVED[path](saved[path]):
            raise ValueError(
                f'config key {path!r} no longer exists, and {path}={saved[path]!r} has no '
                'equivalent: use the version of grpo_jax that wrote it'
            )
    for path in saved.keys() - removed:
        if path not in known:
            raise ValueError(f'unknown config key {path!r}: {suggest(path)}')
        set_value(config, path, saved[path])
    added = sorted(known.keys() - saved.keys())
    if (added or removed) and not quiet:
        log.warning('%s', _describe_changes(added, sorted(removed)))
    return config


def read(path: pathlib.Path, *, quiet: bool = False) -> ConfigDict:
    """The config in a file; `from_json` with the file's name in its errors."""
    try:
        return from_json(path.read_text(), quiet=quiet)
    except ValueError as error:
        raise ValueError(f'{path}: {error}') from error


def folder_of_checkpoints(workdir: pathlib.Path) -> str:
    """The key `checkpoint.folder` of the run in a folder; empty of one without a config."""
    path = workdir / 'config.json'
    folder: str = read(path, quiet=True).checkpoint.folder if path.is_file() else ''
    return folder


def differences(config: ConfigDict, saved: ConfigDict) -> dict[str, tuple[Any, Any]]:
    """The keys whose values differ, with their (saved, present) values as JSON types.

    A value that is None in `config` fits any. `module_folders` may differ: the folder of the config
    file may have moved.
    """
    # As JSON, where tuples are lists.
    ours, theirs = (json.loads(to_json(c)) for c in (config, saved))
    automatic = [path for path, value in flatten(defaults()).items() if value is None]

    def compare(a: Any, b: Any, path: str) -> dict[str, tuple[Any, Any]]:
        if isinstance(a, dict) and isinstance(b, dict):
            pairs = [(a.get(k), b.get(k), f'{path}.{k}') for k in sorted({*a, *b})]
            return {key: value for pair in pairs for key, value in compare(*pair).items()}
        key = path[1:]
        if a == b or key == 'module_folders' or (b is None and key in automatic):
            return {}
        return {} if same_path(key, a, b) else {key: (a, b)}

    return compare(theirs, ours, '')


def describe(key: str, values: tuple[Any, Any]) -> str:
    """An item of `differences` in words."""
    return f'{key} (there {values[0]!r}, here {values[1]!r})'


def with_saved_choices(config: ConfigDict, saved: ConfigDict) -> ConfigDict:
    """Sets keys that are None in `config` to their saved values, for a resumed run.

    Returns:
      A copy of the config, or `config` itself if there are no such keys.
    """
    theirs = flatten(saved.to_dict())
    missing = [path for path, value in flatten(config.to_dict()).items() if value is None]
    chosen = {path: theirs[path] for path in missing if theirs[path] is not None}
    if chosen:
        config = config.copy_and_resolve_references()
        for path, value in chosen.items():
            set_value(config, path, value)
    return config


def _move_keys_of_schema_1(values: dict[str, Any]) -> None:
    try:
        _move_keys(values['grpo'], values['reward_model'])
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f'it has no schema, and is not of the form that earlier versions wrote: {error}'
        ) from error


def _move_keys(grpo: dict[str, Any], reward_model: dict[str, Any]) -> None:
    algorithm = grpo['algorithm'] | grpo.pop('objective')
    names = [name for name in compute_fields() if name in algorithm]
    grpo['compute'] = {name: algorithm.pop(name) for name in names}
    grpo['algorithm'] = algorithm
    if algorithm['top_entropy'] < 1:  # which was also the condition for the mask
        algorithm.pop('entropy_mask', None)
    if not (reward_model['weight'] and reward_model['steps']):  # the number had no effect
        reward_model['microbatch'] = None


def _describe_changes(added: list[str], removed: list[str]) -> str:
    changes = [
        f'{verb}: {", ".join(paths)}'
        for verb, paths in (('added with their defaults', added), ('dropped', removed))
        if paths
    ]
    return f'this config was saved by an earlier version; keys {"; ".join(changes)}'
