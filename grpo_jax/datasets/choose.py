"""From the name of a data set and its options to a builder."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import tensorflow_datasets as tfds

from grpo_jax.datasets.arithmetic import Arithmetic, ArithmeticConfig
from grpo_jax.datasets.countdown import Countdown, CountdownConfig
from grpo_jax.datasets.files import Files, FilesConfig
from grpo_jax.datasets.sources import SOURCES, find

GENERATED = {
    'arithmetic': (Arithmetic, ArithmeticConfig),
    'countdown': (Countdown, CountdownConfig),
}

_PLACE = ('folder', 'file')  # options that say where files are

Choice = tuple[type[tfds.core.DatasetBuilder], tfds.core.BuilderConfig, str]


def choose(name: str, split: str, options: Mapping[str, Any]) -> Choice:
    """The builder's class and config, and what the builder calls the split.

    Raises:
        ValueError: the name is unknown, an option is unknown or out of range, or a file is absent
            or begins with a malformed row.
    """
    if name in GENERATED:
        builder, config = GENERATED[name]
        _check(name, options, _options(config))
        return builder, config(**options), split
    if name not in SOURCES:
        raise ValueError(f'unknown data set {name!r}: choose {", ".join([*GENERATED, *SOURCES])}')
    columns = [option for option in _options(FilesConfig) if option not in ('source', 'paths')]
    _check(name, options, [*_PLACE, *columns])
    source = SOURCES[name]
    place = {option: options[option] for option in _PLACE if option in options}
    rest = {option: value for option, value in options.items() if option not in place}
    patterns = [place['file']] if place.get('file') else source.files
    one_file = not any('{split}' in pattern for pattern in patterns)
    cut = bool(rest.get('heldout')) and (one_file or split in ('train', 'heldout'))
    if not cut:
        rest.pop('heldout', None)
    paths = find(source, 'train' if cut else split, **place)
    return Files, FilesConfig(source=source, paths=paths, **rest), split if cut else 'rows'


def _options(config: Any) -> list[str]:
    return [field.name for field in dataclasses.fields(config) if field.init and field.kw_only]


def _check(name: str, options: Mapping[str, Any], known: list[str]) -> None:
    for option in options:
        if option not in known:
            raise ValueError(f'{name} has no option {option!r}: it has {", ".join(known)}')
