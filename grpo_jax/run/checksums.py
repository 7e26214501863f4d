"""Checksums of the files of a checkpoint, written into it before it counts as written.

They are SHA-256 of files, and in a bucket the CRC32C that the store itself computes of each object,
so that nothing is downloaded for them.
"""

import asyncio
import base64
import concurrent.futures
import hashlib
import json
from collections.abc import Collection, Iterator
from typing import Any

from etils import epath
from orbax.checkpoint.path import atomicity

from grpo_jax.run import buckets

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

    Raises:
      ValueError: a copy from a bucket cannot be checked, because no package computes CRC32C.
    """
    bucket = buckets.in_bucket(folder)
    try:
        text = (folder / FILE).read_text()
        expected = json.loads(text)
        names = [n for n in expected if not items or '/' not in n or n.split('/')[0] in items]
    except FileNotFoundError:
        return '' if folder.is_dir() else 'it is missing'
    except (OSError, ValueError, AttributeError, TypeError) as error:
        return f'{FILE} cannot be read ({error})'
    if buckets.CRC in text and not bucket:  # a copy of one that was written to a bucket
        buckets.crc32c()
    stored = buckets.digests(folder) if bucket else None

    def problem(name: str) -> str:
        return _problem(folder / name, expected[name], None if stored is None else stored.get(name))

    with concurrent.futures.ThreadPoolExecutor(_THREADS) as threads:
        found = threads.map(problem, names)
        problems = [f'{name} {what}' for name, what in zip(names, found, strict=True) if what]
    more = f' and {len(problems) - 3} more files' if len(problems) > 3 else ''
    return ', '.join(problems[:3]) + more


def has_checksums(folder: epath.Path) -> bool:
    """Whether there are any; earlier versions wrote none."""
    return (folder / FILE).exists()


def _problem(path: epath.Path, expected: Any, stored: list[Any] | None) -> str:
    """What is wrong with a file.

    Args:
      path: of the file.
      expected: [size, digest].
      stored: those that the object store has of it; None: it has no such object, or is none.
    """
    try:
        size, digest = expected
        found = stored[0] if stored else path.stat().length
        if found != size:
            return f'has {found} bytes in place of {size}'
        same = stored[1] if stored and digest.startswith(buckets.CRC) else _digest(path, digest)
        return '' if same == digest else 'has other content than was written'
    except FileNotFoundError:
        return 'is missing'
    except (AttributeError, OSError, TypeError, ValueError) as error:
        return f'cannot be read ({error})'


def _digest(path: epath.Path, like: str = '') -> str:
    """The digest of a file; SHA-256, or of the kind of another one."""
    crc = like.startswith(buckets.CRC)
    total: Any = buckets.crc32c() if crc else hashlib.sha256()
    with path.open('rb') as file:
        while chunk := file.read(_CHUNK):
            total.update(chunk)
    return buckets.CRC + base64.b64encode(total.digest()).decode() if crc else total.hexdigest()


def _digests(folder: epath.Path, *, nested: bool) -> dict[str, list[Any]]:
    """The size and the digest of each file in the folders of a folder, or of those beside them."""
    if buckets.in_bucket(folder):
        stored = buckets.digests(folder)
        return {name: found for name, found in stored.items() if ('/' in name) == nested}
    files = [path for path in _files(folder) if (path.parent != folder) == nested]
    with concurrent.futures.ThreadPoolExecutor(_THREADS) as threads:
        found = list(threads.map(lambda path: [path.stat().length, _digest(path)], files))
    return dict(zip([str(path.relative_to(folder)) for path in files], found, strict=True))


def _files(folder: epath.Path) -> Iterator[epath.Path]:
    for path in sorted(folder.iterdir()):
        if path.is_dir():
            yield from _files(path)
        else:
            yield path


def _write(folder: epath.Path) -> None:
    """Writes the checksums of all files in the folders of a folder."""
    _put(folder, _digests(folder, nested=True))


def _write_last(folder: epath.Path) -> None:
    """Adds the checksums of the files that Orbax has written since."""
    last = _digests(folder, nested=False)
    last.pop(FILE, None)
    _put(folder, json.loads((folder / FILE).read_text()) | last)


def _put(folder: epath.Path, values: dict[str, list[Any]]) -> None:
    """Writes the file of checksums, all at once."""
    text = json.dumps(values, indent=0)
    if buckets.in_bucket(folder):  # where an object is whole or absent
        (folder / FILE).write_text(text)
        return
    partial = folder / f'{FILE}.partial'
    partial.write_text(text)
    partial.replace(folder / FILE)


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


class Renamed(_Checksums, atomicity.AtomicRenameTemporaryPath):
    """A checkpoint with checksums in a folder that is renamed when it is complete."""


class Committed(_Checksums, atomicity.CommitFileTemporaryPath):
    """A checkpoint with checksums on an object store, where a file says that it is complete."""


def temporary_path_class(path: epath.PathLike) -> type[Any]:
    """The class with which Orbax writes checkpoints below a path."""
    return Committed if buckets.in_bucket(path) else Renamed
