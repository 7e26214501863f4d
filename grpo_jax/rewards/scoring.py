"""Calls reward functions on a batch of texts, checks what they return and adds it up.

There are N texts in a batch. A reward function is called with keyword arguments only: `prompts`,
`completions`, `completion_ids` (where token ids are given) and each column of the data set, all
lists of length N. It returns N numbers, None where it does not apply. Functions written for TRL's
GRPO trainer have this form.

All completions of a prompt are in one call, one behind the other, so a function may compare them.
Which prompts are in it with them is nothing to rely on: groups are judged as they end.
"""

import asyncio
import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np

from grpo_jax.rewards import pool

_LARGEST = float(np.finfo(np.float32).max)


class RewardError(ValueError):
    """A reward function, or the use of one, is wrong; the message names it and the row."""


class Scores(NamedTuple):
    """Rewards of N completions."""

    total: np.ndarray  # f32[N], sum of weight * value over the functions that apply
    parts: dict[str, np.ndarray]  # name -> f32[N] before weighting, NaN where a function gave None
    timeouts: int = 0  # comparisons of answers that were given up at their deadline, scored 0


def score(
    functions: Mapping[str, Callable[..., Any]],
    weights: Mapping[str, float],
    *,
    prompts: Sequence[str],
    completions: Sequence[str],
    columns: Mapping[str, Sequence[Any]],
    completion_ids: Sequence[Sequence[int]] | None = None,
) -> Scores:
    """Rewards of N completions by every function, and their weighted sum.

    Functions run one after another in the order given; then all `async def` functions run together.
    Each gets its own lists, so it cannot change what another one sees.

    Args:
        functions: name -> reward function.
        weights: name -> weight, for exactly the names in `functions`.
        prompts: N texts.
        completions: N texts.
        columns: name -> N values, the rest of each data row.
        completion_ids: N lists of token ids; left out of the call where None.

    Raises:
        RewardError: inputs of different lengths, weights that do not fit, a function that raises or
            returns anything but N finite numbers or None, or a row for which all return None.
    """
    _check_weights(functions, weights)
    arguments: dict[str, Sequence[Any]] = {'prompts': prompts, 'completions': completions}
    if completion_ids is not None:
        arguments['completion_ids'] = completion_ids
    _check_columns(arguments, columns)
    arguments = {**arguments, **columns}
    before = pool.timeouts()
    returned = _call(functions, arguments)
    given_up = pool.timeouts() - before
    # float64 until the sum is done; the table is f64[functions, N]
    table = np.stack([_values(name, returned[name], arguments) for name in functions])
    without = np.flatnonzero(np.isnan(table).all(axis=0))
    if without.size:
        raise RewardError(
            f'{without.size} of {len(prompts)} rows have no reward, first '
            f'{_row(int(without[0]), arguments)}: {", ".join(functions)} returned None; '
            'add a reward that applies to every row'
        )
    total = np.array([weights[name] for name in functions], np.float64) @ np.nan_to_num(table)
    beyond = np.flatnonzero(~(np.abs(total) <= _LARGEST))
    if beyond.size:
        raise RewardError(
            f'the weighted sum for {_row(int(beyond[0]), arguments)} does not fit float32: '
            f'lower the weights {dict(weights)}'
        )
    parts = dict(zip(functions, table.astype(np.float32), strict=True))
    return Scores(total.astype(np.float32), parts, given_up)


def statistics(scores: Scores) -> dict[str, float]:
    """`rewards/<name>/mean` and `rewards/<name>/std` of each function, before weighting.

    Over the rows to which the function applies, with the population standard deviation. A function
    that applies to none of them has no entry. `rewards/timeouts` counts the comparisons of answers
    that were given up, where there were any.
    """
    metrics: dict[str, float] = {}
    for name, part in scores.parts.items():
        values = part[~np.isnan(part)].astype(np.float64)
        if values.size:
            metrics[f'rewards/{name}/mean'] = float(values.mean())
            metrics[f'rewards/{name}/std'] = float(values.std())
    if scores.timeouts:
        metrics['rewards/timeouts'] = float(scores.timeouts)
    return metrics


def _check_weights(functions: Mapping[str, Any], weights: Mapping[str, float]) -> None:
    if not functions:
        raise RewardError('no reward functions: name at least one')
    if set(functions) != set(weights):
        raise RewardError(
            f'reward functions {sorted(functions)} and weights {sorted(weights)} differ: '
            'give one weight for each function'
        )
    for name, weight in weights.items():
        if _number(weight) is None:
            raise RewardError(f'the weight of reward {name!r} is {weight!r}: use a finite number')


def _check_columns(arguments: Mapping[str, Any], columns: Mapping[str, Any]) -> None:
    for name in ('prompts', 'completions', 'completion_ids'):
        if name in columns:
            raise RewardError(f'column {name!r} is the name of a reward argument: rename it')
    rows = len(arguments['prompts'])
    for name, column in {**arguments, **columns}.items():
        if len(column) != rows:
            raise RewardError(f'{name} has {len(column)} rows, prompts {rows}: give one for each')


def _call(
    functions: Mapping[str, Callable[..., Any]], arguments: Mapping[str, Sequence[Any]]
) -> dict[str, Any]:
    """What each function returns for its own copy of the lists; async functions run together."""
    returned: dict[str, Any] = {}
    together = [name for name, function in functions.items() if _is_async(function)]
    for name, function in functions.items():
        if name not in together:
            try:
                returned[name] = function(**_copy(arguments, function))
            except Exception as error:
                raise _raised(name, error, arguments) from error
    if together:
        for name, result in _gather({n: functions[n] for n in together}, arguments).items():
            if isinstance(result, BaseException):
                raise _raised(name, result, arguments) from result
            returned[name] = result
    return returned


def _gather(
    functions: Mapping[str, Callable[..., Any]], arguments: Mapping[str, Sequence[Any]]
) -> dict[str, Any]:
    async def call(function: Callable[..., Any]) -> Any:
        return await function(**_copy(arguments, function))

    async def run() -> list[Any]:
        return await asyncio.gather(*map(call, functions.values()), return_exceptions=True)

    # A thread of its own, because the caller's may already run an event loop, as notebooks do.
    with ThreadPoolExecutor(max_workers=1) as thread:
        results = thread.submit(lambda: asyncio.run(run())).result()
    return dict(zip(functions, results, strict=True))


def _is_async(function: Callable[..., Any]) -> bool:
    if isinstance(function, functools.partial):
        function = function.func
    call = getattr(function, '__call__', None)  # noqa: B004 an instance may have an async call
    return inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(call)


def _copy(
    arguments: Mapping[str, Sequence[Any]], function: Callable[..., Any]
) -> dict[str, list[Any]]:
    """Lists of its own for a function, without columns that are named as one of its options."""
    bound = function.keywords if isinstance(function, functools.partial) else {}
    return {name: list(column) for name, column in arguments.items() if name not in bound}


def _raised(name: str, error: BaseException, arguments: Mapping[str, Any]) -> RewardError:
    return RewardError(
        f'reward {name!r}, called with {", ".join(arguments)}, '
        f'raised {type(error).__name__}: {error}'
    )


def _values(name: str, returned: Any, arguments: Mapping[str, Sequence[Any]]) -> np.ndarray:
    """f64[N] of what the reward `name` returned, NaN for None; anything but N numbers raises."""
    values = returned.tolist() if hasattr(returned, 'tolist') else returned
    if not isinstance(values, (list, tuple)):
        raise RewardError(
            f'reward {name!r} returned {_short(returned)}, a {type(returned).__name__}: '
            'return a list with one number or None for each completion'
        )
    rows = len(arguments['prompts'])
    if len(values) != rows:
        raise RewardError(
            f'reward {name!r} returned {len(values)} values for {rows} completions: return one each'
        )
    column = np.full(rows, np.nan)
    for row, value in enumerate(values):
        if value is None:
            continue
        number = _number(value)
        if number is None:
            raise RewardError(
                f'reward {name!r} returned {_short(value)} for {_row(row, arguments)}: '
                'return a finite number, or None where it does not apply'
            )
        column[row] = number
    return column


def _number(value: Any) -> float | None:
    """`value` as a number that float32 can hold, from a scalar of any array library; else None."""
    number = value.item() if getattr(value, 'ndim', None) == 0 else value
    return float(number) if isinstance(number, (int, float)) and abs(number) <= _LARGEST else None


def _row(row: int, arguments: Mapping[str, Sequence[Any]]) -> str:
    prompt, completion = arguments['prompts'][row], arguments['completions'][row]
    return f'row {row} (prompt {_short(prompt)}, completion {_short(completion)})'


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f'{text[:77]}...'
