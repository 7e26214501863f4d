"""Rewards: functions from texts to numbers, how to find them by name and how to add them up.

A reward function is `reward(prompts, completions, **columns) -> list[float | None]`: one number for
each completion, None where it does not apply. `columns` are the data set's other columns. A public
function that is imported below and begins with these two parameters is a built-in reward.
"""

import difflib
import importlib
import inspect
from collections.abc import Callable, Iterable
from typing import Any

from grpo_jax.rewards.arithmetic import (
    Step,
    arithmetic_steps,
    check_steps,
    exact_answer,
    final_result,
)
from grpo_jax.rewards.format import chain_format, hash_format, think_format
from grpo_jax.rewards.math import extract_answer, gsm8k_answer, normalize_number
from grpo_jax.rewards.scoring import RewardError, Scores, score, statistics

__all__ = [
    'RewardError',
    'Scores',
    'Step',
    'arithmetic_steps',
    'chain_format',
    'check_steps',
    'exact_answer',
    'extract_answer',
    'extractor',
    'final_result',
    'gsm8k_answer',
    'hash_format',
    'normalize_number',
    'resolve',
    'score',
    'statistics',
    'think_format',
]


def resolve(name: str) -> Callable[..., Any]:
    """The reward called `name`: a built-in, `package.module:function` or `package.module.function`.

    Raises:
        RewardError: no such built-in (names the nearest), a module that cannot be imported, or an
            attribute that it lacks (names the nearest) or that cannot be called.
    """
    return _find('reward', name, {key: f for key, f in globals().items() if _is_reward(f)})


def extractor(name: str) -> Callable[[str], str | None]:
    """The function called `name` from a completion to the answer it gives, None without one.

    Built in are 'final_result' (arithmetic chains) and 'extract_answer' (worked solutions); your
    own are named as in `resolve`.

    Raises:
        RewardError: as in `resolve`.
    """
    return _find('extractor', name, {f.__name__: f for f in (final_result, extract_answer)})


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


def _is_reward(value: Any) -> bool:
    return inspect.isfunction(value) and [*inspect.signature(value).parameters][:2] == [
        'prompts',
        'completions',
    ]


def _nearest(name: str, known: Iterable[str]) -> str:
    public = [key for key in known if not key.startswith('_')]
    nearest = difflib.get_close_matches(name, public, n=1, cutoff=0.0)
    return f', did you mean {nearest[0]!r}?' if nearest else ''
