"""Find reward functions, step functions and extractors by name, and bind their options.

A name is that of a built-in, or the path of the user's own: `package.module:function` or
`./file.py:function`.
"""

import functools
import inspect
from collections.abc import Callable, ItemsView, Mapping
from typing import Protocol, cast, runtime_checkable

from grpo_jax import plugins
from grpo_jax.rewards.builtin.arithmetic import arithmetic_steps, exact_answer, final_result
from grpo_jax.rewards.builtin.code import code_io, code_tests
from grpo_jax.rewards.builtin.countdown import countdown_answer
from grpo_jax.rewards.builtin.format import chain_format, hash_format, tag_count, think_format
from grpo_jax.rewards.builtin.language import language_mix
from grpo_jax.rewards.builtin.length import repetition, soft_overlong
from grpo_jax.rewards.builtin.math import cmath_answer, gsm8k_answer, math_answer
from grpo_jax.rewards.builtin.remote import llm_judge, remote
from grpo_jax.rewards.builtin.steps import right_steps, separated_steps
from grpo_jax.rewards.calls import ARGUMENTS, SERVICES, RewardError, RewardFunction, parameters
from grpo_jax.rewards.checks import number_of, short_repr
from grpo_jax.rewards.verify.extraction import extract_answer, extract_chinese, extract_math

_REWARDS: dict[str, RewardFunction] = {
    'arithmetic_steps': arithmetic_steps,
    'chain_format': chain_format,
    'cmath_answer': cmath_answer,
    'code_io': code_io,
    'code_tests': code_tests,
    'countdown_answer': countdown_answer,
    'exact_answer': exact_answer,
    'gsm8k_answer': gsm8k_answer,
    'hash_format': hash_format,
    'language_mix': language_mix,
    'llm_judge': llm_judge,
    'math_answer': math_answer,
    'remote': remote,
    'repetition': repetition,
    'soft_overlong': soft_overlong,
    'tag_count': tag_count,
    'think_format': think_format,
}
_STEP_REWARDS: dict[str, RewardFunction] = {
    'right_steps': right_steps,
    'separated_steps': separated_steps,
}
_EXTRACTORS: dict[str, Callable[[str], str | None]] = {
    'extract_answer': extract_answer,
    'extract_chinese': extract_chinese,
    'extract_math': extract_math,
    'final_result': final_result,
}


@runtime_checkable
class Table(Protocol):
    """A mapping with string keys, or a `ConfigDict`, which is not a `Mapping`."""

    def __len__(self) -> int: ...

    def items(self) -> ItemsView[str, object]: ...


def resolve(name: str) -> RewardFunction:
    """Return the reward called `name`: a built-in, or the path `package.module:function`.

    Raises:
        RewardError: there is no such built-in, or the path leads to no function (see
            `plugins.load`); suggests the nearest name.
    """
    return _lookup('reward', name, _REWARDS)


def extractor(name: str) -> Callable[[str], str | None]:
    """Return the extractor called `name`, a function from a completion to its answer or None.

    Built in are 'final_result' (arithmetic chains), 'extract_answer' (worked solutions that end in
    a number), 'extract_math' (LaTeX) and 'extract_chinese'. Your own are named by their path.

    Raises:
        RewardError: as in `resolve`.
    """
    return cast(Callable[[str], str | None], _lookup('extractor', name, _EXTRACTORS))


def build(spec: Table) -> tuple[dict[str, RewardFunction], dict[str, float]]:
    """Return the reward functions that a config names, and their weights, as `score` takes them.

    Args:
        spec: name (see `resolve`) -> weight, or -> {'weight': weight, **options}. Options are
            keyword arguments of the function: the parameters after its `*`, or any others that it
            names. They take precedence over a column of the same name. With 'function' among them,
            a built-in's name, a path or the function itself, the name is any text. 'call' says how
            it is called, see `call_options`.

    Raises:
        RewardError: an empty spec, a weight that is not a finite number, a name without a function,
            an option that the function does not have (suggests the nearest) or a missing one.
    """
    if not len(spec):
        raise RewardError('grpo.rewards is empty: name at least one reward function and its weight')
    return _build('grpo.rewards', spec, resolve)


def name_in(spec: Table, name: str) -> str:
    """Return the name in a config's `grpo.rewards` of the function `name`, or `name` itself."""
    for own_name, value in spec.items():
        if isinstance(value, Table) and dict(value.items()).get('function') == name:
            return own_name
    return name


def build_steps(spec: Table) -> tuple[str, RewardFunction, float]:
    """Return the name, step function and weight that a config's `grpo.step_rewards` names.

    Args:
        spec: one name -> weight, or -> {'weight': weight, **options}, as in `build`. Built in are
            'right_steps' (arithmetic) and 'separated_steps' (for a process reward model).

    Raises:
        RewardError: not exactly one function, or as in `build`.
    """
    if len(spec) != 1:
        raise RewardError(
            f'grpo.step_rewards names {len(spec)} functions: process supervision needs one, such '
            "as {'right_steps': 1.0}"
        )
    functions, weights = _build(
        'grpo.step_rewards', spec, lambda name: _lookup('step reward', name, _STEP_REWARDS)
    )
    ((name, function),) = functions.items()
    return name, function, weights[name]


def _lookup(kind: str, name: str, builtin: Mapping[str, RewardFunction]) -> RewardFunction:
    try:
        return plugins.lookup(kind, name, builtin)
    except plugins.PluginError as error:
        raise RewardError(str(error)) from error


def _build(
    section: str, spec: Table, find: Callable[[str], RewardFunction]
) -> tuple[dict[str, RewardFunction], dict[str, float]]:
    functions: dict[str, RewardFunction] = {}
    weights: dict[str, float] = {}
    for name, value in spec.items():
        options = dict(value.items()) if isinstance(value, Table) else {'weight': value}
        if 'weight' not in options:
            raise RewardError(f'{section}.{name} has no weight: add one to its options')
        weight = options.pop('weight')
        options.pop('call', None)  # see `call_options`
        number = number_of(weight, allow_bool=False)
        if number is None:
            raise RewardError(f'{section}.{name}={short_repr(weight)}: a weight is a finite number')
        function = options.pop('function', name)
        if isinstance(function, str):
            function = find(function)
        if not callable(function):
            raise RewardError(
                f'{section}.{name}.function={function!r}: give a name, a path or a function'
            )
        functions[name] = _with_options(name, function, options)
        weights[name] = number
    return functions, weights


def _with_options(
    name: str, function: RewardFunction, options: dict[str, object]
) -> RewardFunction:
    """Bind the options of a reward, including defaults, so that no column replaces them."""
    own = parameters(function)
    keyword_only = inspect.Parameter.KEYWORD_ONLY
    kinds = (inspect.Parameter.POSITIONAL_OR_KEYWORD, keyword_only)
    known = {
        key: p for key, p in own.items() if p.kind in kinds and key not in (*ARGUMENTS, *SERVICES)
    }
    for key in options:
        if key not in known:
            raise RewardError(
                f'reward {name!r} has no option {key!r}{plugins.did_you_mean(key, known)}'
                + ('' if known else ': it has none')
            )
    # If the arguments are keyword-only too, columns cannot be distinguished from options.
    if all(own[key].kind != keyword_only for key in ARGUMENTS if key in own):
        for key, parameter in known.items():
            if parameter.kind == keyword_only:
                if parameter.default is inspect.Parameter.empty and key not in options:
                    raise RewardError(
                        f'reward {name!r} needs the option {key!r}: '
                        f"write {{'weight': …, {key!r}: …}} for its weight"
                    )
                options.setdefault(key, parameter.default)
    if check := getattr(function, 'check_options', None):
        try:
            check(**{key: options[key] for key in parameters(check)})
        except ValueError as error:
            raise RewardError(f'reward {name!r}: {error}') from error
    return functools.partial(function, **options) if options else function
