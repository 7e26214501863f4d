"""Read files of records: JSON lines, JSON, Parquet and Hugging Face datasets on disk.

A value keeps its type, see `values`.
"""

import gzip
import hashlib
import importlib
import json
import pathlib
import zlib
from collections.abc import Iterable, Iterator
from typing import Any

from grpo_jax.data.values import json_text, parse_json

Row = dict[str, Any]  # column -> value

SAVED_DATASET = 'state.json'  # a file that `datasets.Dataset.save_to_disk` writes into its folder


def read_records(path: pathlib.Path) -> Iterator[tuple[str, Row]]:
    """Read every record of a file, whose name decides its format.

    `.jsonl` and `.jsonl.gz` contain one object per line, and blank lines are skipped; `.json`
    contains an object or a list of objects; `.parquet` contains rows; `state.json` stands for the
    Hugging Face dataset that is saved in its folder.

    Yields:
      The location of the record (file with line or row number) and its columns.

    Raises:
      ValueError: the file or a record is malformed, or the package that reads such files is not
        installed.
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
    for location, record in records:
        yield location, checked_row(record, location)


def digest_files(paths: Iterable[pathlib.Path]) -> str:
    """Return a digest of the content of files. A saved dataset counts with its whole folder."""
    total = hashlib.sha256()
    for path in paths:
        files = sorted(path.parent.iterdir()) if path.name == SAVED_DATASET else [path]
        for file in files:
            with open(file, 'rb') as handle:
                total.update(hashlib.file_digest(handle, 'sha256').digest())
    return total.hexdigest()


def _lines(path: pathlib.Path) -> Iterator[tuple[str, object]]:
    with gzip.open(path, 'rb') if path.suffix == '.gz' else path.open('rb') as file:
        try:
            for number, line in enumerate(file, 1):
                if line.strip():
                    yield f'{path}:{number}', _parse(line, f'{path}:{number}')
        except (EOFError, gzip.BadGzipFile, zlib.error) as error:
            raise ValueError(
                f'{path}: not a complete gzip file ({error}): download it again'
            ) from error


def _numbered(path: pathlib.Path, records: Iterable[object]) -> Iterator[tuple[str, object]]:
    for number, record in enumerate(records, 1):
        yield f'{path}: row {number}', record


def _parquet(path: pathlib.Path) -> Iterator[object]:
    arrow = _import_package('pyarrow', f'to read {path}')
    parquet = importlib.import_module('pyarrow.parquet')
    try:
        with parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(1024):
                yield from batch.to_pylist()
    except arrow.ArrowException as error:
        raise ValueError(f'{path}: not a Parquet file: {error}') from error


def _saved_dataset(folder: pathlib.Path) -> Iterable[object]:
    rows: Iterable[object] = _import_package('datasets', f'to read {folder}').load_from_disk(folder)
    return rows


def _import_package(name: str, purpose: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ValueError(f'{purpose}, install {name}: pip install {name}') from error


def _parse(text: bytes, location: str) -> object:
    try:
        return parse_json(text.strip())
    except json.JSONDecodeError as error:
        line = f'line {error.lineno}, ' if error.lineno > 1 else ''
        raise ValueError(
            f'{location}: not valid JSON: {error.msg} at {line}column {error.colno}'
        ) from error
    except ValueError as error:
        raise ValueError(f'{location}: not JSON in UTF-8: {error}') from error


def checked_row(record: object, location: str) -> Row:
    """Return a record as a row.

    Raises:
      ValueError: it is not a dictionary with columns, or a value is none that JSON has.
    """
    if not isinstance(record, dict) or not record:
        text = json.dumps(record, ensure_ascii=False, default=str)[:40]
        raise ValueError(f'{location}: {text} is not a JSON object with columns: make it one')
    for column, value in record.items():
        try:
            f'{column}{json_text(value)}'.encode()
        except TypeError as error:
            raise ValueError(
                f'{location}, {column}: {error}: remove the column or convert it to text'
            ) from error
        except UnicodeEncodeError as error:  # JSON can escape half a surrogate pair
            raise ValueError(f'{location}: not JSON in UTF-8: {error}') from error
    return record
