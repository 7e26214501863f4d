"""Checksums of the files of a checkpoint, written into it before it counts as written."""

import asyncio
import concurrent.futures
import hashlib
import json
import os
from collections.abc import Collection, Iterator
from typing import Any

from etils import epath
from orbax.checkpoint.path import atomicity

FILE = 'checksums.json'

_THREADS = 4  # SHA-256 of different files at the same time; Python's releases its lock
_CHUNK = 1 << 22


def damage(folder: epath.Path, items: Collection[str] = ()) -> str:
    """What is wrong with the files of a checkpoint.

    Files that are not of the checkpoint do not count.

    Args:
      folder: of the checkpoint.
      items: the items to check, such as 'params'; empty: all.

    Returns:
      A description that names the files; empty if nothing is.
    """
    try:
        expected = json.loads((folder / FILE).read_text())
        names = [n for n in expected if not items or '/' not in n or n.split('/')[0] in items]
    except FileNotFoundError:
        return '' if folder.is_dir() else 'it is missing'
    except (OSError, ValueError, AttributeError, TypeError) as error:
        return f'{FILE} cannot be read ({error})'
    problems = []
    with concurrent.futures.ThreadPoolExecutor(_THREADS) as threads:
        found = threads.map(lambda name: _found(folder / name, expected[name]), names)
        problems = [f'{name} {what}' for name, what in zip(names, found, strict=True) if what]
    more = f' and {len(problems) - 3} more files' if len(problems) > 3 else ''
    return ', '.join(problems[:3]) + more


def has_checksums(folder: epath.Path) -> bool:
    """Whether there are any; earlier versions wrote none."""
    return (folder / FILE).exists()


def _found(path: epath.Path, expected: Any) -> str:
    """What is wrong with a file of which [size, digest] is expected."""
    try:
        size, digest = expected
        found = path.stat().length
        if found != size:
            return f'has {found} bytes in place of {size}'
        return '' if _digest(path) == digest else 'has other content than was written'
    except FileNotFoundError:
        return 'is missing'
    except (OSError, TypeError, ValueError) as error:
        return f'cannot be read ({error})'


def _digest(path: epath.Path) -> str:
    total = hashlib.sha256()
    with path.open('rb') as file:
        while chunk := file.read(_CHUNK):
            total.update(chunk)
    return total.hexdigest()


def _write(folder: epath.Path) -> None:
    """Writes the checksums of all files in the folders of a folder."""
    files = [path for path in _files(folder) if path.parent != folder]
    with concurrent.futures.ThreadPoolExecutor(_THREADS) as threads:
        found = list(threads.map(lambda path: [path.stat().length, _digest(path)], files))
    names = [str(path.relative_to(folder)) for path in files]
    text = json.dumps(dict(zip(names, found, strict=True)), indent=0)
    partial = folder / f'{FILE}.partial'
    partial.write_text(text)
    partial.replace(folder / FILE)


def _files(folder: epath.Path) -> Iterator[epath.Path]:
    for path in sorted(folder.iterdir()):
        if path.is_dir():
            yield from _files(path)
        else:
            yield path


class _Checksums:
    """Adds checksums to a folder before and after Orbax makes a checkpoint of it.

    Before, so that none counts as written without them. After, because Orbax writes the time and a
    note of the success at last. Orbax calls it in the background, in the first process.
    """

    async def finalize(self: Any) -> None:
        final = self.get_final()
        if not final.name.isdigit():  # one of the items of the checkpoint
            await super().finalize()  # type: ignore[misc]
            return
        await asyncio.to_thread(_write, self.get())
        await super().finalize()  # type: ignore[misc]
        await asyncio.to_thread(_write_last, final)


def _write_last(folder: epath.Path) -> None:
    """Adds the checksums of the files that Orbax has written since."""
    known = json.loads((folder / FILE).read_text())
    last = [path for path in folder.iterdir() if not path.is_dir() and path.name != FILE]
    known |= {path.name: [path.stat().length, _digest(path)] for path in last}
    partial = folder / f'{FILE}.partial'
    partial.write_text(json.dumps(known, indent=0))
    partial.replace(folder / FILE)


class Renamed(_Checksums, atomicity.AtomicRenameTemporaryPath):
    """A checkpoint with checksums in a folder that is renamed when it is complete."""


class Committed(_Checksums, atomicity.CommitFileTemporaryPath):
    """A checkpoint with checksums on an object store, where a file says that it is complete."""


def temporary_path_class(path: epath.PathLike) -> type[Any]:
    """The class with which Orbax writes checkpoints below a path."""
    return Committed if os.fspath(path).startswith('gs://') else Renamed
