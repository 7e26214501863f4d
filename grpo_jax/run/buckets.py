"""Folders in buckets of Google Cloud Storage, `gs://BUCKET/FOLDER`.

Orbax and TensorStore write and read the checkpoints there, and `etils.epath` lists them by gcsfs.
What neither tells is asked of the client of Google Cloud Storage.
"""

import contextlib
import functools
import importlib
import os
import re
import secrets
from collections.abc import Iterator
from typing import Any

from etils import epath

CRC = 'crc32c:'  # begins a digest of this kind

_SCHEME = 'gs://'


def in_bucket(path: str | os.PathLike[str]) -> bool:
    """Whether a path is one of a bucket."""
    return os.fspath(path).startswith(_SCHEME)


def check_local(name: str, path: str) -> None:
    """Checks that a path is not the address of a bucket, which `pathlib` takes for a folder `gs:`.

    Args:
      name: of the option, for the error.
      path: its value.

    Raises:
      ValueError: it is one.
    """
    if re.match(r'\w+:/', path):
        raise ValueError(
            f'{name}={path!r} has to be a path of this machine: only checkpoint.folder can be in a '
            "bucket, 'gs://BUCKET/FOLDER'"
        )


def open_folder(address: str) -> epath.Path:
    """A folder in a bucket that can be read.

    Args:
      address: `gs://BUCKET/FOLDER`.

    Raises:
      ValueError: it is of another form or service, a package is not installed, there are no
        credentials, or the bucket does not exist or cannot be read.
    """
    if not re.fullmatch(r'gs://[^/]+/+[^/].*', address):
        raise ValueError(
            f'checkpoint.folder={address!r}: name a folder, or one in a bucket of Google Cloud '
            "Storage, 'gs://BUCKET/FOLDER'"
        )
    path = epath.Path(address)
    _bucket(_split(path)[0])
    return path


def check_writable(folder: epath.Path) -> None:
    """Writes and removes an object.

    Raises:
      ValueError: it could not be written or removed.
    """
    name, prefix = _split(folder)
    blob = _bucket(name).blob(f'{prefix}/writable-{secrets.token_hex(8)}')
    with _clear_errors(name):
        blob.upload_from_string(b'')
        blob.delete()


def digests(folder: epath.Path) -> dict[str, list[Any]]:
    """The size and the CRC32C of each object in a folder, which the store has computed.

    Nothing is downloaded.

    Returns:
      {path in the folder: [bytes, 'crc32c:' and the checksum in base 64]}.

    Raises:
      ValueError: the bucket cannot be read.
    """
    name, prefix = _split(folder)
    with _clear_errors(name):
        blobs = [b for b in _bucket(name).list_blobs(prefix=f'{prefix}/') if b.name[-1] != '/']
    return {b.name.removeprefix(f'{prefix}/'): [b.size, f'{CRC}{b.crc32c}'] for b in blobs}


def crc32c() -> Any:
    """An object like those of `hashlib` that computes the CRC32C of a file.

    Raises:
      ValueError: the package that does is not installed.
    """
    try:
        google_crc32c: Any = importlib.import_module('google_crc32c')
    except ImportError as error:
        raise ValueError(
            f'checksums of a bucket cannot be computed ({error}): pip install gcsfs'
        ) from error
    return google_crc32c.Checksum()


def _split(path: epath.Path) -> tuple[str, str]:
    """The name of the bucket, and that of the folder in it."""
    bucket, _, name = os.fspath(path).removeprefix(_SCHEME).partition('/')
    return bucket, name


@functools.cache
def _bucket(name: str) -> Any:
    """A bucket; cached, so that it is looked for once."""
    try:
        fsspec: Any = importlib.import_module('fsspec')
        importlib.import_module('gcsfs')
        from google.cloud import storage
    except ImportError as error:
        raise ValueError(f'gs://{name} cannot be used ({error}): pip install gcsfs') from error
    # gcsfs would remember listings, and not see what TensorStore and other machines have written.
    for protocol in ('gs', 'gcs'):
        fsspec.config.conf.setdefault(protocol, {})['use_listings_cache'] = False
    with _clear_errors(name):
        return storage.Client().get_bucket(name)


@contextlib.contextmanager
def _clear_errors(name: str) -> Iterator[None]:
    """Raises ValueError with a remedy in place of the client's errors about a bucket."""
    from google.api_core import exceptions
    from google.auth.exceptions import GoogleAuthError

    remedies: dict[type[Exception], str] = {
        exceptions.NotFound: 'it does not exist: name another bucket, or create it by `gcloud '
        f'storage buckets create gs://{name}`',
        exceptions.Unauthorized: _NO_ACCESS,
        exceptions.Forbidden: _NO_ACCESS,
        GoogleAuthError: 'there are no credentials: run `gcloud auth application-default login`, '
        'or give the machine a service account',
    }
    try:
        yield
    except (exceptions.GoogleAPIError, GoogleAuthError, OSError) as error:
        text = ' '.join(str(error).split())
        remedy = next((r for kind, r in remedies.items() if isinstance(error, kind)), 'try again')
        raise ValueError(f'the bucket gs://{name} cannot be used: {remedy} ({text})') from error


_NO_ACCESS = (
    'this account may not read and write it: give it the roles storage.bucketViewer and '
    'storage.objectUser on the bucket'
)
