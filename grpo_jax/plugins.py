"""Load objects that a config names by their path, such as a loss in the user's own file.

A path is `'package.module:name'` or `'package.module.name'`, as in `'optax.contrib:muon'` or
`'my_rewards:bonus'`. Python has to find the module: it is installed, in the working directory of
`python -m`, or in a folder on `PYTHONPATH`.
"""

import difflib
import importlib
import pkgutil
import sys
from collections.abc import Callable, Iterable, Mapping
from typing import Any


class PluginError(ValueError):
    """No callable has this name or path; the message says why and suggests a similar name."""


def load(path: str) -> Callable[..., Any]:
    """Import the callable at `path`.

    Args:
        path: 'package.module:name' or 'package.module.name'.

    Returns:
        The function, class or other callable. Its signature is not checked here: callers check the
        arguments and the result.

    Raises:
        PluginError: the path is malformed, the module cannot be imported (suggests the nearest
            module), or it has no such name (suggests the nearest) or one that is not callable.
    """
    module_name, _, name = path.rpartition(':' if ':' in path else '.')
    if not all(part.isidentifier() for part in [*module_name.split('.'), name]):
        raise PluginError(f"{path!r} is not of the form 'package.module:name'")
    try:
        module = importlib.import_module(module_name)
    except Exception as error:
        hint = _hint_for_missing_module(module_name, error)
        raise PluginError(
            f'{path!r}: importing {module_name} raised {type(error).__name__}: {error}{hint}'
        ) from error
    if not hasattr(module, name):
        hint = did_you_mean(name, dir(module))
        raise PluginError(f'{path!r}: {module_name} has no {name!r}{hint}')
    value: Callable[..., Any] = getattr(module, name)
    if not callable(value):
        raise PluginError(f'{path!r} is {value!r}, which cannot be called')
    return value


def lookup(kind: str, name: str, builtin: Mapping[str, Callable[..., Any]]) -> Callable[..., Any]:
    """Return the built-in called `name`, or import `name` where it is a path.

    Args:
        kind: what the config names, such as 'reward'; error messages begin with it.
        name: a key of `builtin`, or a path as in `load`.
        builtin: the objects that the package provides, by name.

    Raises:
        PluginError: as in `load`, or there is no such built-in (suggests the nearest).
    """
    if '.' in name or ':' in name:
        try:
            return load(name)
        except PluginError as error:
            raise PluginError(f'{kind} {error}') from error.__cause__
    if name not in builtin:
        raise PluginError(
            f'unknown {kind} {name!r}{did_you_mean(name, builtin)} '
            f'(built in are {", ".join(sorted(builtin))}; '
            "for your own write 'package.module:function')"
        )
    return builtin[name]


def did_you_mean(name: str, known: Iterable[str], *, cutoff: float = 0.0) -> str:
    """Return `, did you mean '…'?` with the nearest public name in `known`.

    Args:
        name: the name that is not known.
        known: the names to choose from; those that begin with `_` are left out.
        cutoff: similarity from 0 to 1 below which nothing is suggested.

    Returns:
        Text to append to an error message, empty where nothing is near.
    """
    public = [key for key in known if not key.startswith('_')]
    nearest = difflib.get_close_matches(name, public, n=1, cutoff=cutoff)
    return f', did you mean {nearest[0]!r}?' if nearest else ''


def _hint_for_missing_module(module_name: str, error: Exception) -> str:
    """Return a suggestion where the module itself is missing, not one that it imports."""
    missing = error.name if isinstance(error, ModuleNotFoundError) else None
    if missing is None or not f'{module_name}.'.startswith(f'{missing}.'):
        return ''
    parent, _, name = missing.rpartition('.')
    folders = getattr(sys.modules[parent], '__path__', []) if parent else None  # None: sys.path
    modules = [module.name for module in pkgutil.iter_modules(folders)]
    nearest = did_you_mean(name, modules, cutoff=0.6)
    return nearest or ('' if parent else ': is the folder of its file on PYTHONPATH?')
