"""A digest of the source code of a function: of what it uses in its file and in those beside it."""

import ast
import functools
import hashlib
import importlib.util
import os
import pathlib
from collections.abc import Callable, Iterator

from grpo_jax import plugins

Parse = Callable[[pathlib.Path], list[ast.stmt]]

_PACKAGES = {'site-packages', 'dist-packages'}


def file_of(path: str) -> pathlib.Path | None:
    """The file of the user's own that a path as in `plugins.load` leads into.

    Returns:
      The file; None if the text is no such path, or leads into Python or an installed package.
    """
    module = path.rpartition(':' if ':' in path else '.')[0]
    folders = [pathlib.Path(folder) for folder in plugins.folders()]
    if module.endswith('.py'):
        file = (folders or [pathlib.Path.cwd()])[0] / pathlib.Path(module).expanduser()
    else:
        places = [folder.joinpath(*module.split('.')) for folder in folders]
        inside = [(base.with_name(f'{base.name}.py'), base / '__init__.py') for base in places]
        here = [file for pair in inside for file in pair if file.is_file()]
        file = here[0] if here else _installed(module)
    others = (pathlib.Path(os.__file__).parent, pathlib.Path(plugins.__file__).parent)
    packaged = not _PACKAGES.isdisjoint(file.parts) or any(f in file.parents for f in others)
    return file.resolve() if file.is_file() and not packaged else None


def _installed(module: str) -> pathlib.Path:
    """The file of a module where Python looks for it; one that does not exist if there is none."""
    try:
        spec = importlib.util.find_spec(module)
    except Exception:  # of a package that it is in, or of a text that is no name
        spec = None
    return pathlib.Path((spec and spec.origin) or os.devnull)


def source_digest(file: pathlib.Path, name: str) -> str:
    """A digest of a function and of all that it uses, directly or not, in files of the user's own.

    Comments, the layout of the code, and what else is in its file do not change it: a config may
    stand beside the reward functions that it names. Modules of installed packages do not count.

    Args:
      file: where it is defined.
      name: its name there; a dotted one is of something in a class.
    """
    parse = functools.cache(lambda path: ast.parse(path.read_bytes()).body)
    total, seen = hashlib.sha256(), set[tuple[pathlib.Path, str]]()
    waiting = [(file.resolve(), name.partition('.')[0])]
    while waiting:
        place = waiting.pop()
        if place in seen:
            continue
        seen.add(place)
        for node in _definitions(parse(place[0]), place[1]):
            total.update(f'{place[1]} {ast.dump(node)}\n'.encode())
            waiting += sorted(_used(place[0], node, parse))
    return total.hexdigest()


def _definitions(body: list[ast.stmt], name: str) -> list[ast.stmt]:
    """The statements of a file that bind a name; all of them if none does, or the name is '*'."""
    found = [node for node in body if name in _bound(node)]
    return found or body


def _bound(node: ast.stmt) -> set[str]:
    """The names that a statement at the top of a file binds."""
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
        return {node.name}
    if isinstance(node, ast.Import | ast.ImportFrom):
        return {(alias.asname or alias.name).partition('.')[0] for alias in node.names}
    inner = [n for n in ast.walk(node) if isinstance(n, ast.Name | ast.FunctionDef | ast.ClassDef)]
    return {
        n.id if isinstance(n, ast.Name) else n.name
        for n in inner
        if not (isinstance(n, ast.Name) and isinstance(n.ctx, ast.Load))
    }


def _used(file: pathlib.Path, node: ast.stmt, parse: Parse) -> Iterator[tuple[pathlib.Path, str]]:
    """The places of what a statement uses: names of its file, and of files that it imports."""
    here = {name for other in parse(file) for name in _bound(other)}
    for inner in ast.walk(node):
        if isinstance(inner, ast.Name) and isinstance(inner.ctx, ast.Load) and inner.id in here:
            yield file, inner.id
        elif isinstance(inner, ast.Import):
            for alias in inner.names:
                if imported := _file_of(file, alias.name, 0):
                    yield imported, '*'
        elif isinstance(inner, ast.ImportFrom):
            for alias in inner.names:
                module = f'{inner.module or ""}.{alias.name}'.strip('.')
                if submodule := _file_of(file, module, inner.level):
                    yield submodule, '*'
                elif imported := _file_of(file, inner.module or '', inner.level):
                    yield imported, alias.name


def _file_of(file: pathlib.Path, module: str, level: int) -> pathlib.Path | None:
    """The file of a module that a file imports from beside it, or from its own package."""
    root = file.parent
    while (root / '__init__.py').exists():
        root = root.parent
    folders = [root, file.parent]
    if level:
        folders = [file.parents[level - 1]]
    for folder in folders:
        base = folder.joinpath(*module.split('.')) if module else folder
        for path in (base.with_name(f'{base.name}.py'), base / '__init__.py'):
            if path.is_file() and _PACKAGES.isdisjoint(path.parts):
                return path.resolve()
    return None
