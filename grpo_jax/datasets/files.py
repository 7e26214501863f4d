"""The builder of all data sets that are read from files."""

import dataclasses
import hashlib
import json
import pathlib
from collections.abc import Iterable, Iterator, Mapping

import tensorflow_datasets as tfds

from grpo_jax.datasets.read import Row, digest, read
from grpo_jax.datasets.sources import Source
from grpo_jax.prompts import question_key


@dataclasses.dataclass(eq=False, kw_only=True)
class FilesConfig(tfds.core.BuilderConfig):
    """Which files to serve, and how. The config's name is a digest of both: no data are stale.

    Attributes:
        source: what the columns of the files mean.
        paths: the files, in their order.
        columns: new name -> name in the files, beside those of the source.
        required: columns that the rows must have and fill, beside those of the source.
        heldout: share (below 1) or number of the different questions that are held out; 0 for none.
        served: the columns of the rows, found in the first one.

    Raises:
        ValueError: the files are empty, the first row is malformed or lacks a column, or `heldout`
            is out of its range.
    """

    name: str = dataclasses.field(init=False, default='')
    source: Source
    paths: tuple[pathlib.Path, ...]
    columns: Mapping[str, str] = dataclasses.field(default_factory=dict)
    required: tuple[str, ...] = ()
    heldout: float = 0
    served: tuple[str, ...] = dataclasses.field(init=False, default=())

    def __post_init__(self) -> None:
        whole = self.heldout in (0, False) or (self.heldout >= 1 and self.heldout % 1 == 0)
        if not (whole or 0 < self.heldout < 1):
            raise ValueError(f'heldout is {self.heldout}: make it a share below 1 or a number')
        self.columns = {**self.source.columns, **self.columns}
        questions = ('question',) if self.heldout else ()
        self.required = (*self.source.required, *self.required, *questions)
        self.served = tuple(next(self.rows(), ('', {}))[1])
        if not self.served:
            raise ValueError(f'{self.paths[0]}: the file is empty: write one JSON object per line')
        finish = getattr(self.source.finish, '__name__', '')
        options = json.dumps([self.columns, self.required, finish, self.heldout])
        content = f'{options} {digest(self.paths)}'
        self.name = hashlib.sha256(content.encode()).hexdigest()[:16]
        self.description = f'The file {self.paths[0]}'

    def rows(self) -> Iterator[tuple[str, Row]]:
        """Yields (where it stands, columns) for every row of the files.

        Raises:
            ValueError: a row is malformed or lacks a column, with file and line number.
        """
        for path in self.paths:
            for where, record in read(path):
                yield where, self._finished(record, where)

    def _finished(self, record: Row, where: str) -> Row:
        row = _rename(record, self.columns, where)
        for column in self.required:
            if column not in row:
                raise ValueError(
                    f'{where}: column {column!r} is missing, there are {", ".join(row)}: rename '
                    "one by the option columns={'new name': 'name in the file'}, or use another "
                    'file'
                )
            if row[column].strip() in ('', 'null'):
                raise ValueError(f'{where}: column {column!r} is empty: fill it, or take it out')
        try:
            return row | self.source.finish(row) if self.source.finish else row
        except ValueError as error:
            raise ValueError(f'{where}: {error}: mend the row, or take it out') from error


class Files(tfds.core.GeneratorBasedBuilder):
    """Split `rows`, in the order of the files; with `heldout`, splits `train` and `heldout`.

    A question that stands in the files more than once is on one side only, see `held_out`.

    Preparing raises ValueError, with file and line number, where a row is malformed or has other
    columns than the first one.
    """

    VERSION = tfds.core.Version('1.0.0')  # raise it whenever the same file gives other text

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
    ) -> dict[str, Iterator[tuple[int, Row]]]:
        config = self.builder_config
        if not config.heldout:
            return {'rows': self._generate_examples()}
        keys = [question_key(row['question']) for _, row in config.rows()]
        chosen = held_out(keys, config.heldout)
        return {
            'train': self._generate_examples(set(keys) - chosen),
            'heldout': self._generate_examples(chosen),
        }

    def _generate_examples(self, chosen: set[str] | None = None) -> Iterator[tuple[int, Row]]:
        columns = set(self.builder_config.served)
        for place, (where, row) in enumerate(self.builder_config.rows()):
            if row.keys() != columns:
                raise ValueError(
                    f'{where}: the columns are {", ".join(row)} where the first line has '
                    f'{", ".join(self.builder_config.served)}: give every line the same columns'
                )
            if chosen is None or question_key(row['question']) in chosen:
                yield place, row


def held_out(keys: Iterable[str], heldout: float) -> set[str]:
    """The keys of the questions to hold out: a share below 1, or a number, of the different ones.

    A key is chosen by its hash: equal keys are always on one side, and the order of rows does not
    matter. With a share, neither does what other questions there are.

    Raises:
        ValueError: no key would be held out, or none left.
    """
    hashes = {key: hashlib.sha256(key.encode()).digest() for key in keys}
    if heldout < 1:
        chosen = {k for k, h in hashes.items() if int.from_bytes(h[:8]) < heldout * 2**64}
    else:
        chosen = set(sorted(hashes, key=hashes.__getitem__)[: int(heldout)])
    if not 0 < len(chosen) < len(hashes):
        raise ValueError(
            f'heldout={heldout} holds out {len(chosen)} of {len(hashes)} different questions: '
            'choose a value that leaves some on either side'
        )
    return chosen


def _rename(record: Row, columns: Mapping[str, str], where: str) -> Row:
    """The record with the columns `new name -> old name`, and the others under their names."""
    others = {name: text for name, text in record.items() if name not in columns.values()}
    for new, old in columns.items():
        if old not in record:
            raise ValueError(
                f'{where}: column {old!r} is missing, there are {", ".join(record)}: mend '
                f"the option columns={{{new!r}: 'name in the file'}}"
            )
        if new in others:
            raise ValueError(
                f'{where}: there is a column {new!r} beside {old!r}, which is to take its name: '
                f"give it another one by the option columns={{'other name': {new!r}}}"
            )
    return {new: record[old] for new, old in columns.items()} | others
