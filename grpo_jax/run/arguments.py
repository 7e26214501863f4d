"""The command line: from arguments to a config and a workdir."""

import ast
import functools
import json
import operator
import pathlib
import re
import sys
from collections.abc import Callable, Sequence
from typing import Any

from ml_collections import ConfigDict

from grpo_jax.run import saved_config
from grpo_jax.run.command import one_line_errors
from grpo_jax.run.config import FREE, defaults, flatten, load, nearest, set_value
from grpo_jax.run.config_checks import check_keys

_BOOLEANS = {'true': True, 't': True, '1': True, 'false': False, 'f': False, '0': False}


def run_command(
    main: Callable[[ConfigDict, str], Any], *, usage: str | None = None, saved: bool = False
) -> None:
    """Calls `main(config, workdir)` with the config and folder of the command line.

    `--config=FILE` names a config file and `--config.key=value` changes a key of it; with `saved`
    the config is that of the run in the workdir. An error that the user can fix ends the program
    with one line on standard error (`command.one_line_errors`).

    Args:
      main: the command.
      usage: what `--help` prints.
      saved: take the config from the workdir.
    """
    if usage is not None and '--help' in sys.argv:
        print(usage)
        return
    with one_line_errors():
        main(*parse(sys.argv[1:], saved=saved))


def parse(arguments: Sequence[str], *, saved: bool = False) -> tuple[ConfigDict, str]:
    """Returns the config and the workdir that command-line arguments describe.

    Args:
      arguments: such as `sys.argv[1:]`.
      saved: take the config from the workdir.

    Raises:
      ValueError: an argument or key that does not exist, a value of the wrong type, a missing file.
    """
    rest = [re.sub('^--?', '--', argument) for argument in arguments]
    workdir = take(rest, 'workdir')
    if not workdir:
        raise ValueError('--workdir=FOLDER is missing: name the folder of the run')
    if saved:
        path = pathlib.Path(workdir, 'config.json')
        if not path.is_file():
            raise ValueError(f'{path}: no such file: --workdir has to name the folder of a run')
        config = saved_config.read(path)
    else:
        config = load(take(rest, 'config'))
        check_keys(config)
    for argument in rest:
        match = re.fullmatch(r'--config\.([^=]+)=(.*)', argument, re.DOTALL)
        if not match:
            raise ValueError(
                f'unexpected argument {argument!r}: options are --config=FILE, '
                '--config.key=value and --workdir=FOLDER'
            )
        _change(config, match[1], match[2])
    return config, workdir


def take(arguments: list[str], name: str) -> str:
    """Removes `--name=value` or `--name value`; returns the last value, or an empty string."""
    value = ''
    for i in reversed(range(len(arguments))):
        option, equals, text = arguments[i].partition('=')
        if option == f'--{name}':
            after = arguments[i + 1 : i + 2]
            separate = not equals and after and not after[0].startswith('--')
            value = value or (after[0] if separate else text)
            del arguments[i : i + 1 + bool(separate)]
    return value


def _change(config: ConfigDict, key: str, text: str) -> None:
    """Sets a key to the value that `text` has as the key's type."""
    *parents, name = key.split('.')
    section = next((path for path in FREE if key.startswith(f'{path}.')), '')
    if section:
        entries = functools.reduce(operator.getitem, section.split('.'), config)
        _change_entry(entries, key.removeprefix(f'{section}.'), key, text)
        return
    default_values = flatten(defaults())
    if key not in default_values:
        raise ValueError(f'unknown config key {key!r}: {nearest(key)}')
    if text == 'None' and default_values[key] is None:
        set_value(config, key, None)
        return
    kind = functools.reduce(operator.getitem, parents, config).get_type(name)
    set_value(config, key, _parse(text, kind, key))


def _change_entry(entries: ConfigDict, name: str, key: str, text: str) -> None:
    """Changes one entry of a dictionary in `FREE`, whose keys may have dots."""
    if name in entries:
        entries[name] = _parse(text, type(entries[name]), key)
        return
    for parent, value in entries.items():
        if name.startswith(f'{parent}.') and isinstance(value, ConfigDict):
            _change_entry(value, name.removeprefix(f'{parent}.'), key, text)
            return
    known = ', '.join(map(repr, entries)) or 'no keys'
    raise ValueError(
        f'unknown config key {key!r}: the dictionary has {known}; give a new dictionary to add one'
    )


def _parse(text: str, kind: type, key: str) -> Any:
    """Converts `text` to a value of type `kind`; the error names the key."""
    parsers: dict[type, Callable[[str], Any]] = {
        str: str, int: int, float: float, bool: _boolean, tuple: _tuple, ConfigDict: _dictionary,
    }  # fmt: skip
    try:
        return parsers.get(kind, _literal)(text)
    except ValueError as error:
        expected = {ConfigDict: 'dictionary'}.get(kind, kind.__name__)
        raise ValueError(
            f'--config.{key}={text}: {error}; give a value of type {expected}'
        ) from error


def _boolean(text: str) -> bool:
    if text.lower() not in _BOOLEANS:
        raise ValueError('neither true nor false')
    return _BOOLEANS[text.lower()]


def _tuple(text: str) -> tuple[Any, ...]:
    value = _literal(text)
    return tuple(value) if isinstance(value, list | tuple) else (value,)


def _dictionary(text: str) -> dict[str, Any]:
    value = _literal(text)
    if not isinstance(value, dict):
        raise ValueError("not of the form {'name': value}")
    return value


def _literal(text: str) -> Any:
    """Parses a Python or JSON literal; returns the text itself if it is neither."""
    for parse_text in (ast.literal_eval, json.loads):
        try:
            return parse_text(text)
        except (ValueError, SyntaxError, TypeError):
            continue
    return text
