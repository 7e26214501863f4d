"""Rewards: functions from texts to numbers, how to find them by name and how to add them up.

A reward function is `reward(prompts, completions, **columns) -> list[float | None]`: one number for
each completion, None where it does not apply. `columns` are the data set's other columns, and
`completion_ids` the tokens; parameters behind a `*` are options, set in the config. A public
function that is imported below and begins with these two parameters is a built-in reward.
"""

import difflib
import functools
import importlib
import inspect
from collections.abc import Callable, Iterable, Mapping
from math import isfinite
from typing import Any

from grpo_jax.rewards.arithmetic import (
    Step,
    arithmetic_steps,
    check_steps,
    exact_answer,
    final_result,
)
from grpo_jax.rewards.countdown import countdown_answer
from grpo_jax.rewards.equivalence import equivalence_classes, equivalent
from grpo_jax.rewards.extract import extract_answer, extract_chinese, extract_math
from grpo_jax.rewards.format import chain_format, hash_format, tag_count, think_format
from grpo_jax.rewards.judge import Verdicts, judge_answers
from grpo_jax.rewards.language import language_mix
from grpo_jax.rewards.length import repetition, soft_overlong
from grpo_jax.rewards.math import cmath_answer, gsm8k_answer, math_answer
from grpo_jax.rewards.numbers import normalize_number
from grpo_jax.rewards.scoring import RewardError, Scores, score, statistics
from grpo_jax.rewards.steps import StepReward, right_steps, score_steps, separated_steps

__all__ = [
    'RewardError',
    'Scores',
    'Step',
    'StepReward',
    'Verdicts',
    'arithmetic_steps',
    'build',
    'build_steps',
    'chain_format',
    'check_steps',
    'cmath_answer',
    'countdown_answer',
    'equivalence_classes',
    'equivalent',
    'exact_answer',
    'extract_answer',
    'extract_chinese',
    'extract_math',
    'extractor',
    'final_result',
    'gsm8k_answer',
    'hash_format',
    'judge_answers',
    'language_mix',
    'math_answer',
    'normalize_number',
    'repetition',
    'resolve',
    'right_steps',
    'score',
    'score_steps',
    'separated_steps',
    'soft_overlong',
    'statistics',
    'tag_count',
    'think_format',
]

_EXTRACTORS = (final_result, extract_answer, extract_math, extract_chinese)
_STEPS = (right_steps, separated_steps)
# What every function is called with; anything else it names is a column or an option.
_ARGUMENTS = ('prompts', 'completions', 'completion_ids')


def resolve(name: str) -> Callable[..., Any]:
    """The reward called `name`: a built-in, `package.module:function` or `package.module.function`.

    Raises:
        RewardError: no such built-in (names the nearest), a module that cannot be imported, or an
            attribute that it lacks (names the nearest) or that cannot be called.
    """
    return _find('reward', name, {key: f for key, f in globals().items() if _is_reward(f)})


def build_steps(spec: Mapping[str, Any]) -> tuple[str, Callable[..., Any], float]:
    """The name, step function and weight that a config's `grpo.step_rewards` names.

    Args:
        spec: one name -> weight, or -> {'weight': weight, **options}, as in `build`. Built in are
            'right_steps' (arithmetic) and 'separated_steps' (for a process reward model).

    Raises:
        RewardError: not exactly one function, or anything that `build` would not take.
    """
    if len(spec) != 1:
        raise RewardError(
            f'grpo.step_rewards names {len(spec)} functions: process supervision needs one, such '
            "as {'right_steps': 1.0}"
        )
    built_in = {function.__name__: function for function in _STEPS}
    functions, weights = _build(
        'grpo.step_rewards', spec, lambda name: _find('step reward', name, built_in)
    )
    ((name, function),) = functions.items()
    return name, function, weights[name]


def build(spec: Mapping[str, Any]) -> tuple[dict[str, Callable[..., Any]], dict[str, float]]:
    """The reward functions that a config names, and their weights: what `score` needs.

    Args:
        spec: name (see `resolve`) -> weight, or -> {'weight': weight, **options}. Options are
            keyword arguments of the function: the parameters behind its `*`, or any others that it
            names. They win over a column of the same name.

    Raises:
        RewardError: an empty spec, a weight that is no finite number, a function that cannot be
            found, an option that it does not have (names the nearest) or one that it needs.
    """
    if not spec:
        raise RewardError('grpo.rewards is empty: name at least one reward function and its weight')
    return _build('grpo.rewards', spec, resolve)


def _build(
    section: str, spec: Mapping[str, Any], find: Callable[[str], Callable[..., Any]]
) -> tuple[dict[str, Callable[..., Any]], dict[str, float]]:
    functions, weights = {}, {}
    for name, value in spec.items():
        options = dict(value.items()) if hasattr(value, 'items') else {'weight': value}
        if 'weight' not in options:
            raise RewardError(f'{section}.{name} has no weight: add one to its options')
        weight = options.pop('weight')
        if not isinstance(weight, int | float) or not isfinite(weight):
            raise RewardError(f'{section}.{name}={weight!r}: a weight is a finite number')
        functions[name] = _bind(name, find(name), options)
        weights[name] = float(weight)
    return functions, weights


def _bind(name: str, function: Callable[..., Any], options: dict[str, Any]) -> Callable[..., Any]:
    """`function` with its options, those left at their defaults too, so no column replaces them."""
    parameters = _parameters(function)
    kinds = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    known = {key: p for key, p in parameters.items() if p.kind in kinds and key not in _ARGUMENTS}
    for key in options:
        if key not in known:
            raise RewardError(
                f'reward {name!r} has no option {key!r}{_nearest(key, known)}'
                + ('' if known else ': it has none')
            )
    # Functions that take everything behind a `*` do not tell columns from options.
    told = not any(parameters[a].kind == kinds[1] for a in _ARGUMENTS if a in parameters)
    for key, parameter in known.items() if told else ():
        if parameter.kind == inspect.Parameter.KEYWORD_ONLY:
            if parameter.default is inspect.Parameter.empty and key not in options:
                raise RewardError(
                    f'reward {name!r} needs the option {key!r}: '
                    f"write {{'weight': …, {key!r}: …}} for its weight"
                )
            options.setdefault(key, parameter.default)
    return functools.partial(function, **options) if options else function


def extractor(name: str) -> Callable[[str], str | None]:
    """The function called `name` from a completion to the answer it gives, None without one.

    Built in are 'final_result' (arithmetic chains), 'extract_answer' (worked solutions that end in
    a number), 'extract_math' (LaTeX) and 'extract_chinese'; your own are named as in `resolve`.

    Raises:
        RewardError: as in `resolve`.
    """
    return _find('extractor', name, {f.__name__: f for f in _EXTRACTORS})


def _find(kind: str, name: str, built_in: dict[str, Callable[..., Any]]) -> Callable[..., Any]:
    if '.' not in name and ':' not in name:
        if name not in built_in:
            raise RewardError(
                f'unknown {kind} {name!r}{_nearest(name, built_in)}; built in are '
                f"{', '.join(sorted(built_in))}; write your own as 'package.module:function'"
            )
        return built_in[name]
    module_name, _, attribute = name.rpartition(':' if ':' in name else '.')
    if not all(part.isidentifier() for part in [*module_name.split('.'), attribute]):
        raise RewardError(f"{kind} {name!r} is not of the form 'package.module:function'")
    try:
        module = importlib.import_module(module_name)
    except Exception as error:
        raise RewardError(
            f'{kind} {name!r}: importing {module_name} raised {type(error).__name__}: {error}'
        ) from error
    if not hasattr(module, attribute):
        nearest = _nearest(attribute, vars(module))
        raise RewardError(f'{kind} {name!r}: {module_name} has no {attribute!r}{nearest}')
    function = getattr(module, attribute)
    if not callable(function):
        raise RewardError(f'{kind} {name!r} is {function!r}, which cannot be called')
    return function


def _parameters(function: Callable[..., Any]) -> Mapping[str, inspect.Parameter]:
    try:
        return inspect.signature(function).parameters
    except ValueError:  # some functions written in C do not tell
        return {}


def _is_reward(value: Any) -> bool:
    if value in _STEPS:
        return False
    return inspect.isfunction(value) and [*inspect.signature(value).parameters][:2] == [
        'prompts',
        'completions',
    ]


def _nearest(name: str, known: Iterable[str]) -> str:
    public = [key for key in known if not key.startswith('_')]
    nearest = difflib.get_close_matches(name, public, n=1, cutoff=0.0)
    return f', did you mean {nearest[0]!r}?' if nearest else ''
