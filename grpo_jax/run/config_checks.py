"""Checks of a whole config: its keys, its numbers, and options that have no effect."""

import functools
import math
from collections.abc import Iterator, Mapping

from ml_collections import ConfigDict

from grpo_jax.run.config import flatten
from grpo_jax.run.defaults import at, defaults
from grpo_jax.run.errors import ConfigError
from grpo_jax.run.suggestions import DEFAULTS, suggest

_AT_LEAST = {  # lower bounds of the numbers that nothing else checks before training
    0: (
        'sft.steps', 'grpo.steps', 'grpo.refill', 'reward_model.steps',
        'eval.samples', 'eval.temperature', 'log.completions',
        'health.skipped_updates', 'health.grad_norm', 'checkpoint.keep_every',
        'sft.optimizer.learning_rate', 'grpo.optimizer.learning_rate',
        'critic.optimizer.learning_rate', 'reward_model.optimizer.learning_rate',
    ),
    1: (
        'data.completion_length', 'environment.turns', 'environment.reply_tokens',
        'sft.batch_size', 'grpo.iterations', 'grpo.batch_size',
        'grpo.group_size', 'reward_model.batch_size', 'reward_model.group_size', 'eval.every',
        'eval.batch_size', 'checkpoint.every', 'checkpoint.keep', 'health.history',
    ),
}  # fmt: skip
# Keys with several numbers; other tuples are of strings.
_NUMBERS = ('eval.k', 'model.window_layers', 'model.unrotated_layers')


def check_keys(config: ConfigDict) -> None:
    """Raises ConfigError for keys that do not exist, or are missing."""
    known, present = set(flatten(defaults())), set(flatten(config))
    problems = [f'unknown config key {key!r}: {suggest(key)}' for key in sorted(present - known)]
    problems += [
        f'config key {key!r} is missing: start from {DEFAULTS}' for key in sorted(known - present)
    ]
    if problems:
        raise ConfigError(problems)


def check_steps(config: ConfigDict) -> None:
    """Raises ValueError for a run without any training steps."""
    if not config.sft.steps and not config.grpo.steps:
        raise ValueError('sft.steps=0 and grpo.steps=0: set one of them to train anything')


def check_values(config: ConfigDict) -> None:
    """Raises ConfigError for numbers out of range, and for items of the wrong type."""
    if problems := _wrong_types(config):
        raise ConfigError(problems)
    if not 0 <= config.seed < 2**31:  # JAX seeds are int32
        problems.append(f'seed={config.seed} is out of range: make it at least 0 and below 2^31')
    inputs = config.data.reward_inputs
    if inputs not in ('auto', 'texts', 'messages'):
        problems.append(
            f'data.reward_inputs={inputs!r} is unknown: use one of auto, texts, messages'
        )
    values = flatten(config.to_dict())
    problems += [
        f'{path}={values[path]} is out of range: make it at least {least}'
        for least, paths in _AT_LEAST.items()
        for path in paths
        if not least <= values[path] < math.inf  # also rejects NaN
    ]
    for path, default in flatten(defaults()).items():
        kind = int if path in _NUMBERS else str
        items = values[path] if isinstance(default, tuple) else ()
        wrong = [item for item in items if not isinstance(item, kind)]
        problems += [f'{path} names {x!r}: give values of type {kind.__name__}' for x in wrong]
    if problems:
        raise ConfigError(problems)


def _wrong_types(config: ConfigDict) -> list[str]:
    """The problems of values of other types than the defaults; a config takes None for any key."""
    values, problems = flatten(config.to_dict()), []
    for path, (kind, optional) in _kinds().items():
        value = values[path]
        fits = isinstance(value, kind) and isinstance(value, bool) == (kind is bool)
        if not fits and not (value is None and optional):
            problems.append(f'{path}={value!r:.80}: give a value of type {kind.__name__}')
    return problems


@functools.cache
def _kinds() -> dict[str, tuple[type, bool]]:
    """The type of each key, and whether it can be None."""
    base, kinds = defaults(), {}
    for path, default in flatten(base).items():
        parent, _, name = path.rpartition('.')
        section = at(base, parent) if parent else base
        kind = section.get_type(name)
        kinds[path] = dict if issubclass(kind, ConfigDict) else kind, default is None
    return kinds


def differing_defaults(
    config: ConfigDict, sections: Mapping[str, str]
) -> Iterator[tuple[str, str]]:
    """Yields the keys in the named sections whose values differ from the defaults.

    Args:
      config: from `defaults()`.
      sections: {path of a section or key: reason}.

    Yields:
      (`path=value`, reason) of each such key.
    """
    values, default_values = flatten(config.to_dict()), flatten(defaults().to_dict())
    for section, reason in sections.items():
        for path, value in values.items():
            if f'{path}.'.startswith(f'{section}.') and value != default_values[path]:
                yield f'{path}={value!r}', reason
