"""Serves a file of JSON lines as it is."""

import dataclasses
import hashlib
import json
import os
import pathlib
from collections.abc import Iterator

import tensorflow_datasets as tfds


@dataclasses.dataclass(eq=False, kw_only=True)
class JsonlConfig(tfds.core.BuilderConfig):
    """Which file to serve. The config's name is a digest of its bytes: a changed file is new data.

    Attributes:
        path: the file.
        required: columns that the file must have.
        columns: the columns of the file, found in its first line.

    Raises:
        ValueError: the file is absent or empty, its first line is malformed or lacks a column.
    """

    name: str = dataclasses.field(init=False, default='')
    path: str | os.PathLike[str]
    required: tuple[str, ...] = ()
    columns: tuple[str, ...] = dataclasses.field(init=False, default=())

    def __post_init__(self) -> None:
        if not pathlib.Path(self.path).is_file():
            raise ValueError(f'{self.path}: no such file: put a file of JSON lines there')
        number, first = next(read(self.path), (0, {}))
        if not first:
            raise ValueError(f'{self.path}: the file is empty: write one JSON object per line')
        self.columns = tuple(first)
        for column in self.required:
            if column not in first:
                raise ValueError(
                    f'{self.path}:{number}: column {column!r} is missing, there are '
                    f'{", ".join(first)}: rename one, or use another file'
                )
        with open(self.path, 'rb') as file:
            self.name = hashlib.file_digest(file, 'sha256').hexdigest()[:16]
        self.description = f'The file {self.path}'


class Jsonl(tfds.core.GeneratorBasedBuilder):
    """One split, `rows`, in the order of the file, without its blank lines.

    Every column is text: a string is served as it is and any other JSON value (number, truth value,
    null, list, object) as its JSON text.

    Preparing raises ValueError, with file and line number, where a line is not a JSON object or has
    other columns than the first line.
    """

    VERSION = tfds.core.Version('1.0.0')  # raise it whenever the same file gives other text

    def _info(self) -> tfds.core.DatasetInfo:
        columns = self.builder_config.columns
        return tfds.core.DatasetInfo(
            builder=self,
            description=__doc__,
            features=tfds.features.FeaturesDict({name: tfds.features.Text() for name in columns}),
            disable_shuffling=True,
        )

    def _split_generators(
        self, dl_manager: tfds.download.DownloadManager
    ) -> dict[str, Iterator[tuple[int, dict[str, str]]]]:
        return {'rows': self._generate_examples()}

    def _generate_examples(self) -> Iterator[tuple[int, dict[str, str]]]:
        path, columns = self.builder_config.path, self.builder_config.columns
        for number, row in read(path):
            if row.keys() != set(columns):
                raise ValueError(
                    f'{path}:{number}: the columns are {", ".join(row)} where the first line has '
                    f'{", ".join(columns)}: give every line the same columns'
                )
            yield number, row


def read(path: str | os.PathLike[str]) -> Iterator[tuple[int, dict[str, str]]]:
    """Yields (line number from 1, columns as text) for every line of `path` that is not blank.

    Raises:
        ValueError: a line is not a JSON object in UTF-8, with file and line number.
    """
    with open(path, 'rb') as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                yield number, _row(line, f'{path}:{number}')


def _row(line: bytes, where: str) -> dict[str, str]:
    try:
        row = json.loads(line.strip())
        text = json.dumps(row, ensure_ascii=False)
        text.encode()  # JSON can spell half a surrogate pair, which is no text
    except json.JSONDecodeError as error:
        message = f'{where}: not valid JSON: {error.msg} at column {error.colno}'
        raise ValueError(message) from error
    except ValueError as error:
        raise ValueError(f'{where}: not JSON in UTF-8: {error}') from error
    if not isinstance(row, dict) or not row:
        raise ValueError(f'{where}: {text[:40]} is not a JSON object with columns: make it one')
    return {
        column: value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
        for column, value in row.items()
    }
