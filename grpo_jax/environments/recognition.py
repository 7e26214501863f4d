"""Find what a config names as its environment, and recognize which form it has."""

import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from grpo_jax import plugins
from grpo_jax.environments.builtin.calculator import calculator
from grpo_jax.environments.builtin.guess import Guess
from grpo_jax.environments.builtin.gym import Gym
from grpo_jax.environments.builtin.python import Python
from grpo_jax.environments.builtin.search import search
from grpo_jax.environments.tools import Tool, methods_of

BATCH = ('prompts', 'completions', 'turns')  # what a function of batches is called with
_NEEDS = (
    'an environment is a function with the parameters prompts, completions and turns; a class with '
    'a method reply(text); a class with reset(**columns) and other methods, which are tools; or a '
    'tool, a function with a docstring and type hints'
)


class Batched(NamedTuple):
    """A function of batches, with its options bound."""

    function: Callable[..., Any]


class Stateful(NamedTuple):
    """A class with a method `reply`."""

    cls: type
    make: Callable[[], Any]  # with its options bound


class Toolbox(NamedTuple):
    """Functions, and a class of whose objects each episode has one, as tools."""

    functions: Mapping[str, Tool]
    cls: type | None = None
    make: Callable[[], Any] | None = None

    def descriptions(self) -> dict[str, Tool]:
        """Return all tools by name, for their signatures and docstrings."""
        return {**self.functions, **(methods_of(self.cls) if self.cls else {})}


Kind = Batched | Stateful | Toolbox


def recognize(name: str, options: Mapping[str, Any]) -> Kind:
    """Return the environment called `name` with its options bound.

    Raises:
        ValueError: the name leads to nothing that is an environment, or an option is unknown,
            missing or wrong.
    """
    try:
        found = plugins.lookup('environment', name, _BUILT_IN)
    except plugins.PluginError as error:
        raise ValueError(str(error)) from error
    if found is _box:
        return _box(**_checked(name, found, options))
    if found is search:
        return Toolbox({'search': search(**_checked(name, found, options))})
    if inspect.isclass(found):
        make = functools.partial(found, **_checked(name, found, options))
        if callable(reply := getattr(found, 'reply', None)):
            static = inspect.getattr_static(found, 'reply')
            owner = () if isinstance(static, staticmethod | classmethod) else (None,)
            try:
                inspect.signature(reply).bind(*owner, '')
            except TypeError as error:
                raise ValueError(
                    f'environment {name!r}: its method reply cannot be called with a text alone '
                    f'({error}): make it reply(self, text)'
                ) from error
            return Stateful(found, make)
        if callable(getattr(found, 'reset', None)) and methods_of(found):
            return Toolbox({}, found, make)
        raise ValueError(f'environment {name!r} is a class without such methods: {_NEEDS}')
    if set(BATCH[:2]) <= _signature(name, found).keys():
        return Batched(functools.partial(found, **_checked(name, found, options)))
    if not inspect.isroutine(found) or not inspect.getdoc(found):
        raise ValueError(f'environment {name!r} is no function with a docstring: {_NEEDS}')
    for key in options:
        raise ValueError(
            f'options.{key}: environment {name!r} is a tool, which has none: remove it'
        )
    return Toolbox({found.__name__: found})


def _box(*, functions: Sequence[str] | Mapping[str, Mapping[str, Any]]) -> Toolbox:
    """Return several tools in one: their names or paths, or a dictionary to their options."""
    if isinstance(functions, str) or not functions:
        raise ValueError(f'options.functions={functions!r:.60}: list the names or paths of tools')
    named = functions if isinstance(functions, Mapping) else {name: {} for name in functions}
    joined = Toolbox({})
    for name, options in named.items():
        kind = recognize(name, options)
        if not isinstance(kind, Toolbox) or (kind.cls and joined.cls):
            fault = 'is a second class of tools' if isinstance(kind, Toolbox) else 'is no tool'
            raise ValueError(f'options.functions: {name!r} {fault}: remove it')
        if twice := kind.descriptions().keys() & joined.descriptions().keys():
            raise ValueError(f'options.functions: {min(twice)!r} is the name of two tools')
        both = {**joined.functions, **kind.functions}
        joined = Toolbox(both, kind.cls or joined.cls, kind.make or joined.make)
    return joined


_BUILT_IN: dict[str, Callable[..., Any]] = {
    'calculator': calculator,
    'guess': Guess,
    'gym': Gym,
    'python': Python,
    'search': search,
    'tools': _box,
}


def _checked(name: str, function: Callable[..., Any], options: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options of a function or class, if it has all of them and needs no more."""
    own = {key: p for key, p in _signature(name, function).items() if key not in BATCH}
    if not inspect.isclass(function):  # others are columns
        own = {key: p for key, p in own.items() if p.kind == p.KEYWORD_ONLY}
    free = any(p.kind == p.VAR_KEYWORD for p in own.values())
    for key in options:
        if key not in own and not free:
            listed = f'it has {", ".join(own)}' if own else 'it has none'
            raise ValueError(
                f'options.{key}={options[key]!r:.60}: environment {name!r} has no such option'
                f'{plugins.did_you_mean(key, own)} ({listed})'
            )
    for key, parameter in own.items():
        variadic = parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
        if parameter.default is parameter.empty and not variadic and key not in options:
            raise ValueError(f'options: environment {name!r} needs {key!r}: set it')
    if check := getattr(function, 'check_options', None):
        try:
            check(**options)
        except ValueError as error:
            raise ValueError(f'options.{error}') from error
    return dict(options)


def _signature(name: str, function: Callable[..., Any]) -> Mapping[str, inspect.Parameter]:
    try:
        return inspect.signature(function).parameters
    except (ValueError, TypeError) as error:  # some functions written in C have none
        raise ValueError(f'environment {name!r} has no signature: {_NEEDS}') from error
