"""The command line: from arguments to a config and a workdir."""

import ast
import functools
import json
import operator
import os
import pathlib
import re
import sys
from collections.abc import Callable, Sequence
from typing import Any

from ml_collections import ConfigDict

from grpo_jax import plugins
from grpo_jax.run import hosts, saved_config
from grpo_jax.run.buckets import check_local
from grpo_jax.run.command import one_line_errors
from grpo_jax.run.config import flatten, read, set_value
from grpo_jax.run.config_checks import check_keys
from grpo_jax.run.config_problems import problems_of_options
from grpo_jax.run.defaults import FREE, defaults
from grpo_jax.run.errors import ConfigError, caught
from grpo_jax.run.key_help import help_text
from grpo_jax.run.paths import absolute_modules, make_absolute
from grpo_jax.run.sections import preset_hint, type_name
from grpo_jax.run.suggestions import suggest

Check = Callable[[ConfigDict, str, Sequence[str]], list[str]]

_BOOLEANS = {'true': True, 't': True, '1': True, 'false': False, 'f': False, '0': False}


def run_command(
    main: Callable[..., Any],
    *,
    usage: str | None = None,
    sections: Sequence[str] = ('',),
    saved: bool = False,
    flags: Sequence[str] = (),
    options: Sequence[str] = (),
    check: Check | None = None,
) -> None:
    """Calls `main(config, workdir, **taken)` with the config and folder of the command line.

    `--config=FILE` names a config file and `--config.key=value` changes a key of it; with `saved`
    the config is that of the run in the workdir. An error that the user can fix ends the program
    with one line on standard error for each problem (`command.one_line_errors`). `--help` prints
    the usage and config keys with their defaults, `--help=SECTION` the keys of a section.

    `--coordinator`, `--num_processes` and `--process_id` start one of several processes, see
    `hosts.start_from`; where the environment describes them, they are found without.

    Args:
      main: the command. Where it returns False, as for a plan that does not fit, the program ends
        with status 1.
      usage: what `--help` prints before the keys.
      sections: the sections whose keys follow the usage; '' stands for all.
      saved: take the config from the workdir.
      flags: names of options that are true if they are given; passed to `main`.
      options: names of options with a text; passed to `main`, empty if they are not given.
      check: see `parse`.
    """
    arguments = with_two_dashes(sys.argv[1:])
    with hosts.stopped_by_signal(), one_line_errors():
        if usage is not None and _print_help(arguments, usage, sections):
            return
        taken: dict[str, Any] = {name: take_flag(arguments, name) for name in flags}
        taken |= {name: take(arguments, name) for name in options}
        processes = hosts.start_from(*(take(arguments, name) for name in hosts.OPTIONS))
        with hosts.ending_together():
            hosts.start(processes)
            with hosts.together('reading the command line'):
                config, workdir = parse(arguments, saved=saved, check=check)
            result = main(config, workdir, **taken)
    if result is False:
        sys.exit(1)


def _print_help(arguments: Sequence[str], usage: str, sections: Sequence[str]) -> bool:
    """Prints what `--help` asks for, if it is there; returns whether it is."""
    for argument in arguments:
        option, _, section = argument.partition('=')
        if option in ('--help', '--h'):
            parts = [help_text(section)] if section else [usage, *map(help_text, sections)]
            print('\n\n'.join(part.strip('\n') for part in parts))
            return True
    return False


def parse(
    arguments: Sequence[str], *, saved: bool = False, check: Check | None = None
) -> tuple[ConfigDict, str]:
    """Returns the config and the workdir that command-line arguments describe.

    Args:
      arguments: such as `sys.argv[1:]`.
      saved: take the config from the workdir.
      check: what else is wrong if an argument or a key is, (config, workdir, known problems) ->
        problems; by default what can be told without the data and the model.

    Raises:
      ConfigError: an argument or key that does not exist, a value of the wrong type, a missing
        file, and what else is wrong then.
    """
    rest = with_two_dashes(arguments)
    workdir = take(rest, 'workdir')
    problems: list[str] = []
    if not workdir:
        problems.append('--workdir=FOLDER is missing: name the folder of the run')
    check_local('workdir', workdir)
    if saved and workdir:
        config: ConfigDict | None = _saved(workdir)
    else:
        config, found = read('' if saved else take(rest, 'config'))
        problems += [] if saved else found
    if config is not None:
        with caught(problems):
            check_keys(config)
    changed = defaults() if config is None else _known_part(config) if problems else config
    if saved:
        _fit_to_changes(changed, rest)
    for argument in rest:
        with caught(problems):
            _change_by(changed, argument)
    if problems:
        plugins.set_folders(changed.module_folders)
        find = check or problems_of_options
        others = [] if config is None else find(changed, workdir, problems)
        raise ConfigError([*problems, *others])
    return changed, workdir


def with_two_dashes(arguments: Sequence[str]) -> list[str]:
    """The arguments with `--` where an option begins with one dash."""
    return [re.sub('^--?', '--', argument) for argument in arguments]


def _saved(workdir: str) -> ConfigDict:
    path = pathlib.Path(workdir, 'config.json')
    if not path.is_file():
        raise ValueError(f'{path}: no such file: --workdir has to name the folder of a run')
    return saved_config.read(path)


def _fit_to_changes(config: ConfigDict, changes: Sequence[str]) -> None:
    """Sets keys of a saved config that depend on those that are changed, if they are not given.

    Another data set has its own options and the usual names of splits. With fewer `eval.samples`
    than before, only those of `eval.k` are kept that they allow.
    """
    given = dict(re.findall(r'^--config\.([^=]+)=(.*)$', '\n'.join(changes), re.MULTILINE))
    if given.get('data.name', config.data.name) != config.data.name:
        for name in ('options', 'train_split', 'heldout_split'):
            set_value(config, f'data.{name}', defaults().data[name])
    if given.get('eval.samples', '').isdigit() and 'eval.k' not in given:
        samples = int(given['eval.samples'])
        kept = tuple(k for k in config.eval.k if k <= samples)
        config.eval.k = kept if kept or not samples else (1, samples)[: 1 + (samples > 1)]


def _change_by(config: ConfigDict, argument: str) -> None:
    """Sets the key that an argument names."""
    match = re.fullmatch(r'--config\.([^=]+)=(.*)', argument, re.DOTALL)
    if not match:
        raise ValueError(
            f'unexpected argument {argument!r}: options are --config=FILE, '
            '--config.key=value and --workdir=FOLDER'
        )
    _change(config, match[1], match[2])
    make_absolute(config, os.getcwd(), [match[1]])


def _known_part(config: ConfigDict) -> ConfigDict:
    """The config without keys that do not exist, and with defaults for those it lacks."""
    known = defaults()
    for path, value in flatten(config).items():
        if path in flatten(known):
            set_value(known, path, value)
    return known


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


def take_flag(arguments: list[str], name: str) -> bool:
    """Removes `--name` or `--name=true`; returns whether it is given and true."""
    given = [text for text in arguments if text.partition('=')[0] == f'--{name}']
    arguments[:] = [text for text in arguments if text not in given]
    values = [text.partition('=')[2] or 'true' for text in given]
    return bool(values) and bool(_parse(values[-1], bool, name))


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
        if any(path.startswith(f'{key}.') for path in default_values):
            hint = preset_hint(text) if key == 'grpo.algorithm' else ''
            raise ValueError(f'--config.{key}={text}: it is a section: give one of its keys{hint}')
        raise ValueError(f'unknown config key {key!r}: {suggest(key)}')
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
        parse_text = parsers.get(ConfigDict if issubclass(kind, ConfigDict) else kind, _literal)
        return absolute_modules(parse_text(text), os.getcwd())
    except ValueError as error:
        expected = type_name(kind, key, text)
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
