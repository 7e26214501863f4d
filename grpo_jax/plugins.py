"""Load objects that a config names by their path, such as a loss in the user's own file.

A path is `'package.module:name'` or `'package.module.name'`, as in `'optax.contrib:muon'` or
`'my_rewards:bonus'`, or the path of a file, as in `'./my_rewards.py:bonus'`. A module is looked for
in the folders of `set_folders` first, the first of which is that of the config file, and then where
Python looks. A relative file is relative to the first of these folders.
"""

import contextlib
import difflib
import hashlib
import importlib
import importlib.util
import os
import pathlib
import pkgutil
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from types import ModuleType
from typing import Any

_folders: list[pathlib.Path] = []
# Folder -> names in `sys.modules` of the modules that its files have imported from beside them.
_siblings: dict[pathlib.Path, set[str]] = {}


class PluginError(ValueError):
    """No callable has this name or path; the message says why and suggests a similar name."""


def set_folders(folders: Sequence[str | os.PathLike[str]]) -> None:
    """Set the folders where `load` looks for modules before it looks where Python does.

    They are not added to `sys.path`: no other import finds what is in them.
    """
    _folders[:] = [pathlib.Path(folder).resolve() for folder in folders]


def folders() -> list[str]:
    """Return the folders that were set."""
    return list(map(str, _folders))


def load(path: str) -> Callable[..., Any]:
    """Import the callable at `path`.

    Args:
        path: 'package.module:name', 'package.module.name' or 'folder/file.py:name'.

    Returns:
        The function, class or other callable. Its signature is not checked here: callers check the
        arguments and the result.

    Raises:
        PluginError: the path is malformed, the module cannot be imported (suggests the nearest
            module), or it has no such name (suggests the nearest) or one that is not callable.
    """
    module_name, _, name = path.rpartition(':' if ':' in path else '.')
    is_file = module_name.endswith('.py')
    parts = name.split('.') if is_file else [*module_name.split('.'), *name.split('.')]
    if not all(part.isidentifier() for part in parts):
        raise PluginError(f"{path!r} is not of the form 'package.module:name' or './file.py:name'")
    try:
        module = import_file(_locate(module_name)) if is_file else _import_module(module_name)
    except (Exception, SystemExit) as error:
        hint = _hint_for_missing_module(module_name, error)
        raise PluginError(
            f'{path!r}{place_of(error)}: importing {module_name} raised '
            f'{type(error).__name__}: {error}{hint}'
        ) from error
    value: Any = module
    for part in name.split('.'):
        if not hasattr(value, part):
            hint = did_you_mean(part, _names_in(value))
            raise PluginError(f'{path!r}: {module_name} has no {name!r}{hint}')
        value = getattr(value, part)
    if not callable(value):
        raise PluginError(f'{path!r} is {value!r}, which cannot be called')
    return value


def path_of(function: Callable[..., Any]) -> str:
    """Return the path with which `load` finds a function again, from any folder.

    Raises:
        PluginError: no path leads to it: a lambda, a function inside another one, an object without
            a name such as a `functools.partial`, or one that is defined in a notebook.
    """
    name = getattr(function, '__qualname__', '')
    module = sys.modules.get(getattr(function, '__module__', None) or '')
    reached: Any = module
    for part in name.split('.'):
        reached = getattr(reached, part, None)
    file = getattr(module, '__file__', None)
    in_file = module is not None and module.__name__.partition('.')[0].startswith(_PREFIX)
    in_script = module is not None and module.__name__ == '__main__'
    if reached is not function or module is None or (in_script and file is None):
        raise PluginError(
            f'{function!r} cannot be saved with the run, because no path leads to it: define it at '
            "the top level of a file, with a name, and use it or its path './file.py:name'"
        )
    if not (in_file or in_script):
        return f'{module.__name__}:{name}'
    location = pathlib.Path(str(file)).resolve()
    if _folders and location.parent == _folders[0]:
        return f'./{location.name}:{name}'
    return f'{location}:{name}'


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
            "for your own write 'package.module:function' or './file.py:function')"
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


def place_of(error: BaseException) -> str:
    """Return ` (file.py:14)`, the last line of the user's own code that an exception passed.

    It is empty where the traceback has only files of Python, of packages and of this one.
    """
    others = tuple(f'{pathlib.Path(file).parent}{os.sep}' for file in (__file__, os.__file__))
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        path = pathlib.Path(frame.filename)
        packaged = not {'site-packages', 'dist-packages'}.isdisjoint(path.parts)
        if not packaged and not frame.filename.startswith(('<', *others)):
            return f' ({path.name}:{frame.lineno})'
    return ''


def import_file(file: str | os.PathLike[str], *, fresh: bool = False) -> ModuleType:
    """Import a Python file, which may import modules beside it while it is imported.

    Neither it nor its folder is left where other imports find them.

    Args:
        file: its path.
        fresh: import it again even if it was imported before.

    Raises:
        FileNotFoundError: there is no such file.
    """
    path = pathlib.Path(file).resolve()
    name = f'{_package_of(path.parent)}.{path.stem.replace(".", "_")}'
    if name in sys.modules and not fresh:
        return sys.modules[name]
    if not path.is_file():
        raise FileNotFoundError(f'no such file: {path}')
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise ImportError(f'{path} is not a Python file')
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        with _importing_from(path.parent):
            spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


def _names_in(value: Any) -> list[str]:
    """Return the callables that a module defines, without what it imports from elsewhere.

    Of anything else, and of a module that defines none or makes them when asked, all names.
    """
    if type(value) is not ModuleType or hasattr(value, '__getattr__'):
        return dir(value)
    inside = f'{value.__name__}.'
    own = [
        name
        for name, item in vars(value).items()
        if callable(item) and f'{getattr(item, "__module__", "")}.'.startswith(inside)
    ]
    return own or dir(value)


_PREFIX = 'grpo_jax_files_of_'  # of the packages that stand for folders


def _locate(file: str) -> pathlib.Path:
    """Return a file's path; a relative one is relative to the first of the folders."""
    base = _folders[0] if _folders else pathlib.Path.cwd()
    return base / pathlib.Path(file).expanduser()


def _import_module(name: str) -> ModuleType:
    """Import a module from the folders, or else from where Python looks."""
    for folder in _folders:
        base = folder.joinpath(*name.split('.'))
        files = (base.with_name(f'{base.name}.py'), base / '__init__.py')
        file = next((file for file in files if file.is_file()), None)
        if file is not None and not _finds(name, file):
            with _importing_from(folder):
                return importlib.import_module(f'{_package_of(folder)}.{name}')
    return importlib.import_module(name)


def _finds(name: str, file: pathlib.Path) -> bool:
    """Return whether Python itself finds this file as the module `name`."""
    try:
        spec = importlib.util.find_spec(name)
    except (ImportError, AttributeError, ValueError):
        return False
    return spec is not None and spec.has_location and os.path.samefile(str(spec.origin), file)


def _package_of(folder: pathlib.Path) -> str:
    """Return the name of a package whose modules are the files of a folder.

    The name is one that no other import uses.
    """
    name = _PREFIX + hashlib.sha256(str(folder).encode()).hexdigest()[:12]
    if name not in sys.modules:
        package = ModuleType(name)
        package.__path__ = [str(folder)]
        sys.modules[name] = package
    return name


@contextlib.contextmanager
def _importing_from(folder: pathlib.Path) -> Iterator[None]:
    """Let imports find the modules in a folder, as if a file there were run as a script.

    Modules of the same name from another folder, imported in this way before, are not used again.
    """
    for other, names in _siblings.items():
        if other != folder:
            for name in names:
                sys.modules.pop(name, None)
    before = set(sys.modules)
    sys.path.insert(0, str(folder))
    importlib.invalidate_caches()
    try:
        yield
    finally:
        sys.path.remove(str(folder))
        files = {name: getattr(sys.modules[name], '__file__', None) for name in sys.modules}
        _siblings.setdefault(folder, set()).update(
            name
            for name, file in files.items()
            if name not in before
            and not name.startswith(_PREFIX)
            and file is not None
            and folder in pathlib.Path(file).parents
        )


def _hint_for_missing_module(module_name: str, error: BaseException) -> str:
    """Return a suggestion where the module itself is missing, not one that it imports."""
    missing = error.name if isinstance(error, ModuleNotFoundError) else None
    if missing is None or not f'{module_name}.'.startswith(f'{missing}.'):
        return ''
    parent, _, name = missing.rpartition('.')
    folders = getattr(sys.modules[parent], '__path__', []) if parent else None  # None: sys.path
    modules = [module.name for module in pkgutil.iter_modules(folders)]
    if not parent:
        modules += [module.name for module in pkgutil.iter_modules(map(str, _folders))]
    nearest = did_you_mean(name, modules, cutoff=0.6)
    return nearest or (
        ''
        if parent
        else ': is the folder of its file on PYTHONPATH, or the file beside the config file?'
    )
