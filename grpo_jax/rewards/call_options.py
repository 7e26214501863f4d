"""How reward functions are called: deadlines, retries, and what follows from a failure."""

import dataclasses
import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, cast

from grpo_jax import plugins
from grpo_jax.rewards.calls import RewardError, RewardFunction
from grpo_jax.rewards.messages import takes_texts
from grpo_jax.rewards.registry import Table, resolve

_KINDS = {'timeout': float, 'retries': int, 'isolated': bool, 'memory': float}
_CHOICES = {'on_error': ('stop', 'none'), 'per': ('group', 'completion')}


@dataclasses.dataclass(frozen=True)
class CallOptions:
    """How a reward function is called.

    Attributes:
        timeout: seconds until a call is ended and counts as failed; 0: no deadline.
        retries: how often a call that failed is repeated.
        on_error: 'stop' raises an error, which stops the run with a checkpoint. 'none': the
            completions of the call have no reward and are counted; a function is then called for
            each group, or each completion, alone.
        per: what is called alone where calls are divided: the 'group', or each 'completion' for a
            function that does not compare the completions of a prompt.
        isolated: call the function in worker processes, which may crash.
        memory: GiB that a worker process may use.
        path: of an isolated function.

    Raises:
        RewardError: a value out of its range.
    """

    timeout: float = 1800.0
    retries: int = 0
    on_error: str = 'stop'
    per: str = 'group'
    isolated: bool = False
    memory: float = 8.0
    path: str = ''

    def __post_init__(self) -> None:
        for name, known in _CHOICES.items():
            if getattr(self, name) not in known:
                raise RewardError(
                    f'{name}={getattr(self, name)!r} is unknown: use one of {", ".join(known)}'
                )
        if not 0 <= self.timeout < math.inf:
            raise RewardError(f'timeout={self.timeout}: give seconds, or 0 for no deadline')
        if self.retries < 0:
            raise RewardError(f'retries={self.retries}: make it at least 0')
        if not 0 < self.memory < math.inf:
            raise RewardError(f'memory={self.memory}: give a number of GiB above 0')
        if self.isolated and not self.timeout:
            raise RewardError('timeout=0 with isolated=True: give the seconds after which a call '
                              'is ended')  # fmt: skip

    @property
    def divided(self) -> bool:
        """Whether groups or completions are in calls of their own."""
        return self.isolated or self.on_error == 'none'


class Failures(NamedTuple):
    """Completions that a function failed on."""

    number: int
    first: str  # the error of the first


def join_failures(parts: Sequence[Mapping[str, Failures]]) -> dict[str, Failures]:
    """Join the failures of several batches."""
    joined: dict[str, Failures] = {}
    for name, failed in (item for part in parts for item in part.items()):
        known = joined.get(name)
        joined[name] = failed if known is None else known._replace(number=known.number + failed[0])
    return joined


def check_failures(
    failures: Mapping[str, Failures], most_failed: int, *, kind: str = 'reward'
) -> None:
    """Check that no function failed on too many completions of a step.

    Raises:
        RewardError: one did.
    """
    for name, failed in failures.items():
        if failed.number > most_failed:
            raise RewardError(
                f'{kind} {name!r} failed on {failed.number} completions of a step, and '
                f'grpo.reward_calls.max_failed allows {most_failed}; the first error: '
                f'{failed.first}'
            )


def call_options(
    spec: Table, functions: Mapping[str, RewardFunction], default_options: Mapping[str, object]
) -> dict[str, CallOptions]:
    """Return the options of `functions`, from the config that names them.

    Args:
        spec: that of `registry.build`; an entry `call` of a function's options replaces defaults.
        functions: from `registry.build`.
        default_options: fields of `CallOptions`. The built-in functions are not isolated by them.

    Raises:
        RewardError: an unknown option, a wrong value, or an isolated function without a path.
    """
    options: dict[str, CallOptions] = {}
    for name, value in spec.items():
        if name not in functions:
            continue
        described = dict(value.items()) if isinstance(value, Table) else {}
        own = described.get('call', {})
        where = f'grpo.rewards.{name}.call'
        if not isinstance(own, Table):
            raise RewardError(f"{where}={own!r}: give options, such as {{'timeout': 60.0}}")
        named = dict(own.items())
        known = [field.name for field in dataclasses.fields(CallOptions) if field.name != 'path']
        for key in named:
            if key not in known:
                raise RewardError(
                    f'{where} has no option {key!r}{plugins.did_you_mean(key, known)} (the options '
                    f'are {", ".join(known)})'
                )
        function = functions[name]
        merged = dict(default_options) | ({'isolated': False} if takes_texts(function) else {})
        try:
            made = CallOptions(**_with_types({**merged, **named}))
        except RewardError as error:
            section = where if any(key in str(error) for key in named) else 'grpo.reward_calls'
            raise RewardError(f'{section}: {error}') from error
        if made.isolated:
            made = dataclasses.replace(made, path=_path(name, described.get('function', name)))
        options[name] = made
    return options


def _with_types(options: Mapping[str, object]) -> dict[str, Any]:
    """Return options with whole numbers as floats where those are expected."""
    typed = dict(options)
    for name, kind in _KINDS.items():
        value = options.get(name, kind())
        whole = isinstance(value, int) and not isinstance(value, bool)
        if kind is float and whole:
            typed[name] = float(cast(int, value))
        elif type(value) is not kind:
            raise RewardError(f'{name}={value!r}: give a value of type {kind.__name__}')
    return typed


def _path(name: str, function: object) -> str:
    """Return the path by which a worker process finds an isolated function."""
    if isinstance(function, str) and (':' in function or '.' in function):
        return function
    found: object = resolve(function) if isinstance(function, str) else function
    while isinstance(found, functools.partial):
        found = found.func
    try:
        return plugins.path_of(cast(RewardFunction, found))
    except plugins.PluginError as error:
        raise RewardError(f'reward {name!r} with isolated=True: {error}') from error
