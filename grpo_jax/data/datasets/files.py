"""The builder of all data sets that are read from files."""

import dataclasses
import hashlib
import json
import math
import pathlib
from collections.abc import Iterator, Mapping, Sequence

import tensorflow_datasets as tfds

from grpo_jax.data.datasets.prepared import encode_row
from grpo_jax.data.datasets.records import Row, digest_files, read_records
from grpo_jax.data.datasets.sources import Source
from grpo_jax.data.questions import key_of, question_column, select_heldout
from grpo_jax.data.rows import OptionError
from grpo_jax.data.values import text_of


@dataclasses.dataclass(eq=False, kw_only=True)
class FilesConfig(tfds.core.BuilderConfig):
    """Options of a data set in files.

    The config's name is a digest of the options and the files, so a changed file is prepared again.

    Attributes:
      source: what the columns of the files mean.
      paths: the files, in their order.
      columns: new column name -> name in the files, in addition to `source.columns`.
      required: columns that must exist and not be empty, in addition to `source.required`.
      heldout: fraction (below 1) or number of the distinct questions to hold out; 0 for none.
      served: the columns of the rows, as in the first row.

    Raises:
      ValueError: the files are empty, the first row is malformed or lacks a column, or `heldout` is
        out of range.
    """

    name: str = dataclasses.field(init=False, default='')
    source: Source
    paths: tuple[pathlib.Path, ...]
    columns: Mapping[str, str] = dataclasses.field(default_factory=dict)
    required: Sequence[str] = ()
    heldout: float = 0
    served: tuple[str, ...] = dataclasses.field(init=False, default=())

    def __post_init__(self) -> None:
        if not _is_share_or_count(self.heldout):
            message = f'heldout is {self.heldout!r}: make it a fraction below 1 or a whole number'
            raise OptionError({'heldout': message})
        self.columns = {**self.source.columns, **self.columns}
        self.required = (*self.source.required, *self.required)
        first = next(self.rows(), ('', {}))[1]
        if not first:
            raise ValueError(f'{self.paths[0]}: the file is empty: write one JSON object per line')
        if self.heldout:
            self.required = (*self.required, question_column(first) or 'question')
            next(self.rows())  # checks that the first row has it
        self.served = tuple(first)
        derive = getattr(self.source.derive, '__name__', '')
        options = json.dumps([self.columns, self.required, derive, self.heldout])
        content = f'{options} {digest_files(self.paths)}'
        self.name = hashlib.sha256(content.encode()).hexdigest()[:16]
        self.description = f'The file {self.paths[0]}'

    def rows(self) -> Iterator[tuple[str, Row]]:
        """Yield the location and the columns of every row of the files.

        Raises:
          ValueError: a row is malformed or lacks a column, with file and line number.
        """
        for path in self.paths:
            for location, record in read_records(path):
                yield location, self._row(record, location)

    def _row(self, record: Row, location: str) -> Row:
        row = _rename_columns(record, self.columns, location)
        for column in self.required:
            if column not in row:
                raise ValueError(
                    f'{location}: column {column!r} is missing, there are {", ".join(row)}: rename '
                    "one by the option columns={'new name': 'name in the file'}, or use another "
                    'file'
                )
            if row[column] is None or not text_of(row[column]).strip():
                raise ValueError(
                    f'{location}: column {column!r} is empty: fill it, or remove the row'
                )
        try:
            if self.source.derive is None:
                return row
            return row | self.source.derive({name: text_of(x) for name, x in row.items()})
        except ValueError as error:
            raise ValueError(f'{location}: {error}: fix the row, or remove it') from error


class Files(tfds.core.GeneratorBasedBuilder):
    """Split `rows`, in the order of the files; with `heldout`, splits `train` and `heldout`.

    All rows with one question are in the same split, see `questions.select_heldout`.

    Preparing raises ValueError, with file and line number, if a row is malformed or has other
    columns than the first one.
    """

    VERSION = tfds.core.Version('2.0.0')  # increase it if the same file would give other rows

    def _info(self) -> tfds.core.DatasetInfo:
        columns = self.builder_config.served
        return tfds.core.DatasetInfo(
            builder=self,
            description=__doc__,
            features=tfds.features.FeaturesDict({name: tfds.features.Text() for name in columns}),
            disable_shuffling=True,
        )

    def _split_generators(
        self, dl_manager: tfds.download.DownloadManager
    ) -> dict[str, Iterator[tuple[int, dict[str, str]]]]:
        config = self.builder_config
        if not config.heldout:
            return {'rows': self._generate_examples()}
        keys = [key_of(row) for _, row in config.rows()]
        heldout = select_heldout(keys, config.heldout)
        return {
            'train': self._generate_examples(set(keys) - heldout),
            'heldout': self._generate_examples(heldout),
        }

    def _generate_examples(
        self, keys: set[str] | None = None
    ) -> Iterator[tuple[int, dict[str, str]]]:
        """Yield the number and the columns of every row, or of those with certain questions."""
        columns = set(self.builder_config.served)
        for number, (location, row) in enumerate(self.builder_config.rows()):
            if row.keys() != columns:
                raise ValueError(
                    f'{location}: the columns are {", ".join(row)} where the first line has '
                    f'{", ".join(self.builder_config.served)}: give every line the same columns'
                )
            if keys is None or key_of(row) in keys:
                yield number, encode_row(row)


def _is_share_or_count(heldout: object) -> bool:
    """Return whether it is a fraction below 1 or a whole number; True and False are neither."""
    if isinstance(heldout, bool) or not isinstance(heldout, int | float):
        return False
    return 0 <= heldout < 1 or (1 <= heldout < math.inf and heldout % 1 == 0)


def _rename_columns(record: Row, columns: Mapping[str, str], location: str) -> Row:
    """Rename columns by `new name -> old name`; the others keep their names."""
    others = {name: text for name, text in record.items() if name not in columns.values()}
    for new, old in columns.items():
        if old not in record:
            raise ValueError(
                f'{location}: column {old!r} is missing, there are {", ".join(record)}: fix '
                f"the option columns={{{new!r}: 'name in the file'}}"
            )
        if new in others:
            raise ValueError(
                f'{location}: column {old!r} is to be renamed {new!r}, but the file has a column '
                f"of that name: rename that one too, columns={{'other name': {new!r}}}"
            )
    return {new: record[old] for new, old in columns.items()} | others
