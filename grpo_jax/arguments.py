"""From the command line to a config and a workdir."""

import os
import re
import sys
from collections.abc import Callable, Sequence
from typing import Any

from absl import flags
from ml_collections import ConfigDict, config_flags

from grpo_jax.command import one_line_errors
from grpo_jax.config import check_keys, flat, from_json, load, nearest


def run_command(main: Callable[[ConfigDict, str], Any], *, saved: bool = False) -> None:
    """Calls main(config, workdir) with what the command line says.

    `--config=FILE` names a config file and `--config.key=value` changes a key of it; with `saved`
    the config is that of the run in the workdir. What the user can mend ends the program with one
    line on standard error (`command.one_line_errors`).

    Args:
      main: the command. `--help` prints the docstring of its module.
      saved: take the config from the workdir.
    """
    if '--help' in sys.argv:
        print(sys.modules[main.__module__].__doc__)
        return
    with one_line_errors():
        main(*parse(sys.argv[1:], saved=saved))


def parse(arguments: Sequence[str], *, saved: bool = False) -> tuple[ConfigDict, str]:
    """The config and the workdir from command-line arguments.

    Raises:
      ValueError: an argument or key that does not exist, a value of the wrong type, a missing file.
    """
    rest = [re.sub('^--?', '--', argument) for argument in arguments]
    workdir = take(rest, 'workdir')
    if not workdir:
        raise ValueError('--workdir=FOLDER is missing: name the folder of the run')
    if saved:
        path = os.path.join(workdir, 'config.json')
        if not os.path.isfile(path):
            raise ValueError(f'{path}: no such file: --workdir has to name the folder of a run')
        with open(path) as file:
            config = from_json(file.read())
    else:
        path = take(rest, 'config')
        config = load(path)
        check_keys(config)
    for argument in rest:
        match = re.match(r'--config\.([\w.]+)=', argument)
        if not match:
            raise ValueError(
                f'unexpected argument {argument!r}: options are --config=FILE, '
                '--config.key=value and --workdir=FOLDER'
            )
        if match[1] not in flat(config, free=()):
            raise ValueError(f'unknown config key {match[1]!r}: {nearest(match[1])}')
    holder = flags.FlagValues()
    config_flags.DEFINE_config_dict(
        'config', config, flag_values=holder, sys_argv=['command', *rest]
    )
    try:
        holder(['command', *rest])
    except (flags.Error, TypeError) as error:
        raise ValueError(f'{error}: give a value of the same type as the default') from error
    return config, workdir


def take(arguments: list[str], name: str) -> str:
    """Removes `--name=value` or `--name value`; returns the value of the last one, or nothing."""
    value = ''
    for i in reversed(range(len(arguments))):
        given, equals, text = arguments[i].partition('=')
        if given == f'--{name}':
            after = arguments[i + 1 : i + 2]
            apart = not equals and after and not after[0].startswith('--')
            value = value or (after[0] if apart else text)
            del arguments[i : i + 1 + bool(apart)]
    return value
