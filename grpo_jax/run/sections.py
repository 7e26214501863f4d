"""The sections of a config: a `ConfigDict` whose errors name the whole path of a key."""

import contextlib
import contextvars
from collections.abc import Iterator
from typing import Any

from ml_collections import ConfigDict

from grpo_jax import plugins
from grpo_jax.algorithm.presets import CONVENTIONS, PRESETS
from grpo_jax.run.suggestions import suggest

FREE = (
    'data.options',
    'data.chat_template_kwargs',
    'environment.options',
    'grpo.rewards',
    'grpo.step_rewards',
    'model.rope_scaling',
    *(f'{name}.optimizer.options' for name in ('sft', 'grpo', 'critic', 'reward_model')),
)  # dictionaries that accept any key; assigning one replaces it as a whole

_WEIGHTED = ('grpo.rewards', 'grpo.step_rewards')  # dictionaries from functions to weights

_collected: contextvars.ContextVar[list[str] | None] = contextvars.ContextVar(
    'collected', default=None
)


class UnknownKeyError(KeyError, AttributeError):
    """A key that the config does not have; the message suggests others."""

    def __str__(self) -> str:
        return str(self.args[0])


@contextlib.contextmanager
def collecting() -> Iterator[list[str]]:
    """Collects the messages for unknown keys and wrong types in the block, instead of raising."""
    problems: list[str] = []
    token = _collected.set(problems)
    try:
        yield problems
    finally:
        _collected.reset(token)


class Section(ConfigDict):
    """A section of the config. A function, as a key or as a value, is replaced by its path.

    A key whose value is a tuple also takes a single string or number.

    `grpo.rewards` also takes a function or a list of functions, each with weight 1, and
    `{'name': function}`.

    Raises:
      plugins.PluginError: no path leads to a function.
      UnknownKeyError: a key that a locked section does not have is set, or read by attribute.
      TypeError: a value of another type than that of the key.
    """

    _path = ''

    @classmethod
    def of(cls, path: str, values: Any) -> 'Section':
        """A section with these values. In `FREE` keys may have dots, as the paths of functions."""
        free = any(f'{path}.'.startswith(f'{name}.') for name in FREE)
        section = cls(allow_dotted_keys=free)
        object.__setattr__(section, '_path', path)
        for key, value in values.items():
            section[key] = value
        return section

    def __setitem__(self, key: Any, value: Any) -> None:
        key = plugins.path_of(key) if callable(key) else key
        path = self._path_of(key)
        if path in _WEIGHTED and (callable(value) or isinstance(value, list | tuple)):
            value = _with_weights(path, value)
        elif self._path in _WEIGHTED and callable(value):
            value = {'function': value, 'weight': 1.0}
        if callable(value) and not isinstance(value, _Unknown):
            value = plugins.path_of(value)
        if isinstance(value, str | int | float) and self._holds_tuple(key):
            value = (value,)
        if isinstance(value, _Unknown):
            _report(UnknownKeyError(value.message))
        elif self.is_locked and key not in self and (self.allow_dotted_keys or '.' not in key):
            _report(_unknown(path))
        else:
            if isinstance(value, dict | ConfigDict) and not isinstance(value, Section):
                value = Section.of(path, value)
            try:
                super().__setitem__(key, value)
            except (TypeError, OverflowError):
                remedy = f'give a value of type {type_name(self.get_type(key), path, value)}'
                _report(TypeError(f'config key {path!r} is {value!r}: {remedy}'))

    def __setattr__(self, name: str, value: Any) -> None:
        self._ensure_mutability(name)
        self[name] = value

    def __getattr__(self, name: str) -> Any:
        if name.startswith('_'):
            raise AttributeError(name)
        if name in self:
            return self[name]
        error = _unknown(self._path_of(name))
        if _collected.get() is None:
            raise error
        return _Unknown(str(error))

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)  # ConfigDict would lose `allow_dotted_keys` of a copy

    def get_type(self, key: str) -> type:
        """The type of a key's values; that of a section is ConfigDict."""
        kind: type = super().get_type(key)
        return ConfigDict if issubclass(kind, ConfigDict) else kind

    def copy_and_resolve_references(self, visit_map: Any = None) -> 'Section':
        """A copy without references between keys."""
        copy: Section = super().copy_and_resolve_references(visit_map)
        object.__setattr__(copy, '_path', self._path)
        return copy

    def _holds_tuple(self, key: str) -> bool:
        return key in self and issubclass(self.get_type(key), tuple)

    def _path_of(self, key: str) -> str:
        return f'{self._path}.{key}' if self._path else str(key)


def type_name(kind: type, path: str, value: Any) -> str:
    """The type of a key's values in an error for `value`, with what may have been meant."""
    if not issubclass(kind, ConfigDict):
        return kind.__name__
    if path in _WEIGHTED and isinstance(value, str):
        return f'dictionary, such as { ({value: 1.0}) }'
    if path == 'grpo.algorithm' and (hint := preset_hint(value)):
        return f'dictionary{hint}'
    return 'dictionary'


def preset_hint(value: Any) -> str:
    """The end of an error for a value that is the name of a preset; empty if it is none."""
    if not isinstance(value, str) or value not in (*PRESETS, *CONVENTIONS):
        return ''
    return f'; {value!r} is the name of a method: methods.apply(config, {value!r}) sets its options'


def _with_weights(path: str, functions: Any) -> dict[str, float]:
    """Reward functions, or their names, as a dictionary to weights."""
    items = functions if isinstance(functions, list | tuple) else [functions]
    names = [plugins.path_of(item) if callable(item) else item for item in items]
    if len(set(names)) < len(names):
        raise ValueError(f'{path}={names} names a function twice: give it a weight instead')
    return dict.fromkeys(names, 1.0)


class _Unknown:
    """Stands for a section that does not exist, while problems are collected.

    It is reported when something is done with it, so that `hasattr` can ask for it.
    """

    def __init__(self, message: str) -> None:
        object.__setattr__(self, 'message', message)

    def __getattr__(self, name: str) -> Any:
        if name.startswith('__'):
            raise AttributeError(name)
        self._report()
        return self

    def __call__(self, *arguments: Any, **options: Any) -> '_Unknown':
        self._report()
        return self

    def __setattr__(self, name: str, value: Any) -> None:
        self._report()

    def __setitem__(self, name: str, value: Any) -> None:
        self._report()

    def __getitem__(self, name: str) -> Any:
        self._report()
        return self

    def _report(self) -> None:
        _report(UnknownKeyError(self.message))


def _unknown(path: str) -> UnknownKeyError:
    return UnknownKeyError(f'unknown config key {path!r}: {suggest(path)}')


def _report(error: UnknownKeyError | TypeError) -> None:
    problems = _collected.get()
    if problems is None:
        raise error
    if str(error) not in problems:
        problems.append(str(error))
