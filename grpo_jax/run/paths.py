"""Paths in a config: relative to the folder of the config file, on the command line to the current.

They are made absolute when a config is read, so that a saved run finds the same files from any
folder. A name that is not a file or folder there stays as it is: it is one of the Hugging Face hub
or, for the files of a data set, relative to $GRPO_JAX_DATA_DIR.
"""

import glob
import os
import re
from collections.abc import Iterable
from typing import Any

from ml_collections import ConfigDict

FOLDERS = ('tokenizer', 'pretrained', 'reward_model.pretrained', 'start')  # or names of the hub
_NAMES = ('', 'bytes')  # of tokenizers that are in no folder


def make_absolute(config: ConfigDict, folder: str, keys: Iterable[str] | None = None) -> None:
    """Makes relative paths of a config absolute, in place.

    What is missing or of another type is left for the checks of keys and values.

    Args:
      config: the config.
      folder: what they are relative to.
      keys: the keys to look at; None: all.

    Raises:
      ValueError: a path is relative to the working directory and not to `folder`.
    """

    def chosen(key: str) -> bool:
        return keys is None or key in keys

    for key in filter(chosen, FOLDERS):
        parent, _, name = key.rpartition('.')
        section = _section(config, parent) if parent else config
        if isinstance(section.get(name), str):
            section[name] = _folder(key, section[name], folder)
    data = _section(config, 'data')
    if chosen('data.cache_dir') and data.get('cache_dir'):
        data.cache_dir = _join(folder, data.cache_dir)
    where = _section(config, 'checkpoint').get('folder')
    if chosen('checkpoint.folder') and isinstance(where, str) and where and not _is_address(where):
        config.checkpoint.folder = _join(folder, where)
    options = _section(data, 'options')
    if chosen('data.options') or chosen('data.options.folder'):
        where = options.get('folder')
        if isinstance(where, str) and (_is_path(where) or os.path.isdir(_join(folder, where))):
            options['folder'] = _join(folder, where)
    if chosen('data.options') or chosen('data.options.file'):
        file = options.get('file')
        if isinstance(file, str) and 'folder' not in options:
            pattern = file.replace('{split}', '*')
            if _is_path(file) or glob.glob(pattern, root_dir=folder):
                options['file'] = _join(folder, file)


def same_path(key: str, one: Any, other: Any) -> bool:
    """Whether two values of a key name one folder; earlier versions saved relative paths."""
    if key not in (*FOLDERS, 'data.cache_dir', 'checkpoint.folder') or not (one and other):
        return False
    return os.path.abspath(one) == os.path.abspath(other)


def absolute_modules(value: Any, folder: str) -> Any:
    """Makes './file.py:name' absolute, in a value or in the keys and values of a dictionary."""
    if isinstance(value, dict):
        return {absolute_modules(k, folder): absolute_modules(v, folder) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(absolute_modules(item, folder) for item in value)
    if isinstance(value, str) and _is_path(value) and '.py:' in value:
        return _join(folder, value)
    return value


def _section(config: ConfigDict, name: str) -> ConfigDict:
    """A section of a config; an empty one if it has none of this name."""
    section = config.get(name)
    return section if isinstance(section, ConfigDict) else ConfigDict()


def _folder(key: str, value: str, folder: str) -> str:
    if value in _NAMES:
        return value
    path, colon, rest = value.partition(':') if key == 'start' else (value, '', '')
    absolute = _join(folder, path)
    if _is_path(path) or os.path.isdir(absolute):
        return absolute + colon + rest
    if os.path.isdir(path):
        raise ValueError(
            f'{key}={value!r} is a folder in the working directory, but paths in a config file are '
            f'relative to the folder of that file, {folder}: write '
            f"'{os.path.relpath(path, folder)}{colon}{rest}', or --config.{key}={value}"
        )
    return value


def _is_address(text: str) -> bool:
    """Whether it names a folder in a bucket, or was meant to."""
    return re.match(r'\w+:/', text) is not None


def _is_path(text: str) -> bool:
    return text.startswith(('./', '../', '/', '~')) or text in ('.', '..')


def _join(folder: str, path: str) -> str:
    return os.path.normpath(os.path.join(folder, os.path.expanduser(path)))
