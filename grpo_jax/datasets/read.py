"""Reads files of records: JSON lines, JSON, Parquet and Hugging Face datasets on disk.

Every column is text: a string is served as it is, and any other value (number, truth value, null,
list, object) as its JSON text.
"""

import gzip
import hashlib
import importlib
import json
import pathlib
import zlib
from collections.abc import Iterable, Iterator
from typing import Any

Row = dict[str, str]

SAVED_DATASET = 'state.json'  # what `datasets.Dataset.save_to_disk` writes into its folder


def read(path: pathlib.Path) -> Iterator[tuple[str, Row]]:
    """Yields (where it stands, columns as text) for every record of a file.

    The name decides: `.jsonl` and `.jsonl.gz` hold an object per line, and blank lines do not
    count; `.json` holds an object or a list of them; `.parquet` rows; `state.json` stands for the
    Hugging Face dataset that is saved in its folder.

    Raises:
        ValueError: the file or a record is malformed, with file and line (or row) number, or the
            package that reads such files is absent.
    """
    if path.name == SAVED_DATASET:
        records = _numbered(path.parent, _saved_dataset(path.parent))
    elif path.suffix == '.parquet':
        records = _numbered(path, _parquet(path))
    elif path.suffix == '.json':
        value = _parse(path.read_bytes(), str(path))
        records = _numbered(path, value) if isinstance(value, list) else iter([(str(path), value)])
    else:
        records = _lines(path)
    for where, record in records:
        yield where, _row(record, where)


def digest(paths: Iterable[pathlib.Path]) -> str:
    """A digest of the bytes of the files, each folder of a saved dataset with all its files."""
    total = hashlib.sha256()
    for path in paths:
        inside = sorted(path.parent.iterdir()) if path.name == SAVED_DATASET else [path]
        for file in inside:
            with open(file, 'rb') as handle:
                total.update(hashlib.file_digest(handle, 'sha256').digest())
    return total.hexdigest()


def _lines(path: pathlib.Path) -> Iterator[tuple[str, Any]]:
    with gzip.open(path, 'rb') if path.suffix == '.gz' else path.open('rb') as file:
        try:
            for number, line in enumerate(file, 1):
                if line.strip():
                    yield f'{path}:{number}', _parse(line, f'{path}:{number}')
        except (EOFError, gzip.BadGzipFile, zlib.error) as error:
            raise ValueError(f'{path}: not a whole gzip file ({error}): fetch it again') from error


def _numbered(path: pathlib.Path, records: Iterable[Any]) -> Iterator[tuple[str, Any]]:
    for number, record in enumerate(records, 1):
        yield f'{path}: row {number}', record


def _parquet(path: pathlib.Path) -> Iterator[Any]:
    arrow = _package('pyarrow', f'to read {path}')
    parquet = importlib.import_module('pyarrow.parquet')
    try:
        with parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(1024):
                yield from batch.to_pylist()
    except arrow.ArrowException as error:
        raise ValueError(f'{path}: not a Parquet file: {error}') from error


def _saved_dataset(folder: pathlib.Path) -> Iterable[Any]:
    return _package('datasets', f'to read {folder}').load_from_disk(str(folder))


def _package(name: str, purpose: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ValueError(f'{purpose}, {name} has to be there: pip install {name}') from error


def _parse(text: bytes, where: str) -> Any:
    try:
        return json.loads(text.strip())
    except json.JSONDecodeError as error:
        place = f'line {error.lineno}, ' if error.lineno > 1 else ''
        message = f'{where}: not valid JSON: {error.msg} at {place}column {error.colno}'
        raise ValueError(message) from error
    except ValueError as error:
        raise ValueError(f'{where}: not JSON in UTF-8: {error}') from error


def _row(record: Any, where: str) -> Row:
    if not isinstance(record, dict) or not record:
        text = json.dumps(record, ensure_ascii=False, default=str)[:40]
        raise ValueError(f'{where}: {text} is not a JSON object with columns: make it one')
    row = {column: _text(value, f'{where}, {column}') for column, value in record.items()}
    try:
        ''.join([*row, *row.values()]).encode()
    except UnicodeEncodeError as error:  # JSON can spell half a surrogate pair, which is no text
        raise ValueError(f'{where}: not JSON in UTF-8: {error}') from error
    return row


def _text(value: Any, where: str) -> str:
    if isinstance(value, str):
        return value
    try:
        return json.dumps(value, ensure_ascii=False)
    except TypeError as error:
        raise ValueError(f'{where}: {error}: leave the column out or make it text') from error
