"""Reads a config file, and reads and sets keys of a config.

A config file defines `get_config()`, which takes `defaults()`, sets keys and returns the result.
"""

import inspect
import os
import sys
from collections.abc import Callable, Mapping
from typing import Any

from ml_collections import ConfigDict

from grpo_jax import plugins
from grpo_jax.run.defaults import FREE, at, defaults
from grpo_jax.run.errors import ConfigError, caught
from grpo_jax.run.paths import make_absolute
from grpo_jax.run.sections import UnknownKeyError, collecting, type_name

__all__ = ['defaults', 'flatten', 'load', 'read', 'set_value']


def flatten(config: Mapping[str, Any] | ConfigDict, prefix: str = '') -> dict[str, Any]:
    """Dotted paths and values of all keys; a dictionary in `FREE` is one value."""
    values: dict[str, Any] = {}
    for name, value in config.items():
        path = prefix + name
        if isinstance(value, Mapping | ConfigDict) and path not in FREE and len(value):
            values |= flatten(value, f'{path}.')
        else:
            values[path] = value
    return values


def set_value(config: ConfigDict, path: str, value: Any) -> None:
    """Sets the key at a dotted path; a dictionary in `FREE` is replaced as a whole.

    Raises:
      ValueError: the value is not of the key's type.
    """
    parent, _, name = path.rpartition('.')
    section = at(config, parent) if parent else config
    try:
        if path in FREE and value is None:
            raise TypeError
        section[name] = value
    except TypeError as error:
        kind = type_name(section.get_type(name), path, value)
        raise ValueError(f'{path}={value!r}: give a value of type {kind}') from error
    if path in FREE:
        section[name].unlock()


def load(path: str | os.PathLike[str]) -> ConfigDict:
    """Calls the `get_config()` of a config file; for `FILE.py:NAME` it is `get_config(NAME)`.

    Raises:
      ConfigError: the file does not exist, raises an error, returns no ConfigDict, or sets keys
        that do not exist or values of the wrong type, all of which are named.
    """
    config, problems = read(path)
    if config is None or problems:
        raise ConfigError(problems)
    return config


def read(path: str | os.PathLike[str]) -> tuple[ConfigDict | None, list[str]]:
    """Calls the `get_config()` of a config file as `load` does, without raising an error.

    Returns:
      The config without the keys that could not be set, or None if there is none, and what is wrong
      with it.
    """
    with collecting() as problems:
        try:
            config = _call_get_config(path)
        except ValueError as error:
            return None, [*(f'--config={path}: {text}' for text in problems), str(error)]
    with caught(problems):
        make_absolute(config, os.path.dirname(os.path.abspath(str(path).partition('.py:')[0])))
    return config, [f'--config={path}: {text}' for text in problems]


def _call_get_config(path: str | os.PathLike[str]) -> ConfigDict:
    if not path:
        raise ValueError('--config=FILE is missing: name a config file')
    file, colon, argument = str(path).partition('.py:')
    file += '.py' if colon else ''
    if not os.path.isfile(file):
        raise ValueError(f'--config={path}: no such file: give the path of a config file')
    folders = module_folders(os.path.dirname(os.path.abspath(file)))
    plugins.set_folders(folders)
    try:
        module = plugins.import_file(file, fresh=True)
        if not colon and _has_required_parameters(module.get_config):
            raise ValueError(f'the file has several configs: name one, as in {file}:NAME')
        config = module.get_config(argument) if colon else module.get_config()
    except (Exception, SystemExit) as error:
        raise ValueError(f'--config={path}: {_reason(error)}') from error
    if not isinstance(config, ConfigDict):
        raise ValueError(f'--config={path}: get_config() returned {config!r}: return a ConfigDict')
    if 'module_folders' in config and not config.module_folders:
        config.module_folders = folders
    return config


def module_folders(folder: str) -> tuple[str, ...]:
    """The folders of modules for a config in `folder`, with the working directory.

    The working directory counts where Python looks for modules there, as with `python -m`, so that
    a saved run finds the same modules when it is continued from somewhere else.
    """
    here = os.getcwd()
    searched = here in map(os.path.abspath, sys.path)
    return tuple(dict.fromkeys((folder, here) if searched else (folder,)))


def _reason(error: BaseException) -> str:
    text = str(error)
    if isinstance(error, ValueError | UnknownKeyError):
        return text
    return f'{type(error).__name__}: {error}: fix the file (GRPO_JAX_TRACEBACK=1 shows where)'


def _has_required_parameters(function: Callable[..., Any]) -> bool:
    parameters = inspect.signature(function).parameters.values()
    return any(p.default is p.empty for p in parameters)
