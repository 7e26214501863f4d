"""All data sets by name, and the builder for a name and its options."""

import dataclasses
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import tensorflow_datasets as tfds

from grpo_jax.data.datasets.arithmetic import Arithmetic, ArithmeticConfig
from grpo_jax.data.datasets.countdown import Countdown, CountdownConfig
from grpo_jax.data.datasets.files import Files, FilesConfig
from grpo_jax.data.datasets.sources import SOURCES, find_files
from grpo_jax.data.rows import OptionError

GENERATED = {
    'arithmetic': (Arithmetic, ArithmeticConfig),
    'countdown': (Countdown, CountdownConfig),
}

_LOCATION = ('folder', 'file')  # options that locate the files


def resolve(
    name: str, split: str, options: Mapping[str, Any]
) -> tuple[type[tfds.core.DatasetBuilder], tfds.core.BuilderConfig, str]:
    """Return the builder of a data set.

    Args:
      name: data set.
      split: name of the split, without a slice.
      options: see `grpo_jax.data.load`.

    Returns:
      The builder's class, its config, and the builder's name for the split.

    Raises:
      ValueError: the name is unknown, an option is unknown or out of range, or a file is missing or
        begins with a malformed row.
    """
    if name in GENERATED:
        builder, config = GENERATED[name]
        _check_options(name, options, _option_names(config))
        return builder, config(**options), split
    if name not in SOURCES:
        known = ', '.join([*GENERATED, *SOURCES])
        raise ValueError(
            f"unknown data set {name!r}: choose {known}, or your own function, 'module:function'"
        )
    _check_types(name, options)
    names = [option for option in _option_names(FilesConfig) if option not in ('source', 'paths')]
    _check_options(name, options, [*_LOCATION, *names])
    location = {option: options[option] for option in _LOCATION if option in options}
    others = {option: value for option, value in options.items() if option not in location}
    source = SOURCES[name]
    patterns = [location['file']] if location.get('file') else source.files
    one_file = not any('{split}' in pattern for pattern in patterns)
    holds_out = bool(others.get('heldout')) and (one_file or split in ('train', 'heldout'))
    if not holds_out:
        others.pop('heldout', None)
    paths = find_files(source, 'train' if holds_out else split, **location)
    config = FilesConfig(source=source, paths=paths, **others)
    return Files, config, split if holds_out else 'rows'


def _check_types(name: str, options: Mapping[str, Any]) -> None:
    """Raise OptionError for options of a data set in files that have the wrong type."""

    def is_name(value: object) -> bool:
        return isinstance(value, str)

    def are_names(values: object) -> bool:
        return isinstance(values, list | tuple) and all(map(is_name, values))

    kinds: dict[str, tuple[Callable[[Any], bool], str]] = {
        'folder': (lambda x: isinstance(x, str | os.PathLike), 'the path of a folder'),
        'file': (is_name, 'the name of a file'),
        'columns': (
            lambda x: isinstance(x, Mapping) and are_names([*x, *x.values()]),
            "names, such as {'question': 'problem'}",
        ),
        'required': (are_names, "a list of names, such as ['question']"),
    }
    wrong = {
        option: f'{name}: {option} is {options[option]!r:.80}: make it {remedy}'
        for option, (fits, remedy) in kinds.items()
        if option in options and not fits(options[option])
    }
    if wrong:
        raise OptionError(wrong)


def _option_names(config_class: Any) -> list[str]:
    fields = dataclasses.fields(config_class)
    return [field.name for field in fields if field.init and field.kw_only]


def _check_options(name: str, options: Mapping[str, Any], known: Sequence[str]) -> None:
    remedy = f'it has {", ".join(known)}'
    wrong = {o: f'{name} has no option {o!r}: {remedy}' for o in options if o not in known}
    if wrong:
        raise OptionError(wrong)
