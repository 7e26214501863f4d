"""Common base of the builders of generated problems: sizes, a seed, and disjoint splits."""

import abc
import dataclasses
import hashlib
import itertools
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, ClassVar

import tensorflow_datasets as tfds

from grpo_jax.data.datasets.prepared import encode_row
from grpo_jax.data.rows import OptionError

_MOST_ROWS = 10**7  # of a split, which is held in memory


@dataclasses.dataclass(eq=False, kw_only=True)
class GeneratedConfig(tfds.core.BuilderConfig):
    """Options of a generated data set.

    The config's name is a digest of all options, so each set of options has its own data.

    Attributes:
      train_size: problems in the train split.
      test_size: problems in the test split.
      seed: seed of the problems.

    Raises:
      ValueError: an option is out of range.
    """

    KIND: ClassVar[str]  # name of the data set in error messages
    LARGEST: ClassVar[Mapping[str, int]]  # upper bounds of options, so that problems can be made

    name: str = dataclasses.field(init=False, default='')
    train_size: int = 20_000
    test_size: int = 500
    seed: int = 0

    def __post_init__(self) -> None:
        messages = {
            option: f'{self.KIND}: {option} is {getattr(self, option)!r}: make it {remedy}'
            for option, valid, remedy in self._checked()
            if not valid
        }
        if messages:
            raise OptionError(messages)
        self.description = repr(dataclasses.asdict(self))
        self.name = hashlib.sha256(self.description.encode()).hexdigest()[:16]

    def _checked(self) -> Iterator[tuple[str, bool, str]]:
        """Yields options, whether they are valid, and what they have to be."""
        kinds = {f.name: type(f.default) for f in dataclasses.fields(self) if f.init and f.kw_only}
        of_type = {option: _is_a(getattr(self, option), kind) for option, kind in kinds.items()}
        for option, kind in kinds.items():
            yield option, of_type[option], f'a value of type {kind.__name__}'
        if not all(of_type.values()):  # they cannot be compared
            return
        yield 'train_size', self.train_size >= 1, 'at least 1'
        yield 'test_size', self.test_size >= 1, 'at least 1'
        yield 'seed', 0 <= self.seed < 2**63, 'at least 0 and below 2^63'
        for option in (option for option, kind in kinds.items() if kind is int):
            most = self.LARGEST.get(option, _MOST_ROWS if option.endswith('_size') else None)
            if most is not None:
                yield option, getattr(self, option) <= most, f'at most {most:,}'
        yield from self._own_checks()

    def _own_checks(self) -> Iterator[tuple[str, bool, str]]:
        """Yields the options of one data set, as `_checked` does."""
        yield from ()


def _is_a(value: object, kind: type) -> bool:
    """Return whether an option of type `kind` takes a value."""
    return isinstance(value, int | float if kind is float else kind) and type(value) is not bool


class Generated(tfds.core.GeneratorBasedBuilder):
    """Splits `train` and `test` of problems that are drawn without replacement.

    The test problems are drawn first, so they are the same for any `train_size`.

    Preparing raises ValueError if fewer problems exist than the sizes ask for.
    """

    COLUMNS: ClassVar[tuple[str, ...]]

    @abc.abstractmethod
    def _problems(self) -> Iterable[Any]:
        """Return distinct problems in random order."""

    @abc.abstractmethod
    def _row(self, problem: Any) -> dict[str, str]:
        """Return the columns of one problem."""

    def _info(self) -> tfds.core.DatasetInfo:
        return tfds.core.DatasetInfo(
            builder=self,
            description=type(self).__doc__,
            features=tfds.features.FeaturesDict(dict.fromkeys(self.COLUMNS, tfds.features.Text())),
            disable_shuffling=True,
        )

    def _split_generators(
        self, dl_manager: tfds.download.DownloadManager
    ) -> dict[str, Iterator[tuple[int, dict[str, str]]]]:
        config = self.builder_config
        size = config.train_size + config.test_size
        problems = list(itertools.islice(self._problems(), size))
        if len(problems) < size:
            message = (
                f'{config.KIND}: train_size + test_size is {size}, but with these options only '
                f'{len(problems)} problems exist: lower the sizes, or allow more digits or numbers'
            )
            raise OptionError({'train_size': message})
        return {
            'train': self._generate_examples(problems[config.test_size :]),
            'test': self._generate_examples(problems[: config.test_size]),
        }

    def _generate_examples(self, problems: list[Any]) -> Iterator[tuple[int, dict[str, str]]]:
        for number, problem in enumerate(problems):
            yield number, encode_row(self._row(problem))
