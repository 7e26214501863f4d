"""Calls reward functions on a batch of texts, checks their results and adds them up.

A batch has N texts. A reward function is called with keyword arguments only: `prompts`,
`completions`, `completion_ids` (where there are token ids) and each column of the data set, all
lists of length N. It returns N numbers, None where it does not apply. Functions written for TRL's
GRPO trainer have this form: where the data set holds conversations, `prompts` are lists of messages
and `completions` are lists of one message, and a function that names `trainer_state`, `log_metric`
or `log_extra` gets them.

All completions of a prompt are in one call, next to each other, so a function may compare them. It
must not depend on which other prompts are in the call: groups are scored as they finish.
"""

import functools
import itertools
import logging
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from grpo_jax.rewards.calls import RewardError, RewardFunction, call_functions
from grpo_jax.rewards.logs import Logs, TrainerState
from grpo_jax.rewards.messages import Conversation, answers_of
from grpo_jax.rewards.verify import pool

log = logging.getLogger('grpo_jax')

_LARGEST = float(np.finfo(np.float32).max)
_VISIBLE = 1e-4  # differences below it vanish beside `Algorithm.advantage_eps`


class Scores(NamedTuple):
    """Rewards of N completions."""

    # f32[N], sum of weight * value over the functions that apply; NaN where none does
    total: NDArray[np.floating]
    parts: dict[str, NDArray[np.floating]]  # name -> f32[N] before weighting, NaN for None
    timeouts: int = 0  # comparisons of answers that exceeded their deadline or memory; reward 0
    logs: Logs = Logs()  # what the functions logged by `log_metric` and `log_extra`


class StepReward(NamedTuple):
    """The reward of a step, which extends from the end of the previous one to its own end."""

    end: int  # characters from the start of the completion
    value: float


def score(
    functions: Mapping[str, RewardFunction],
    weights: Mapping[str, object],
    *,
    prompts: Sequence[str],
    completions: Sequence[str],
    columns: Mapping[str, Sequence[object]],
    completion_ids: Sequence[Sequence[int]] | None = None,
    conversations: Sequence[Conversation] | None = None,
    trainer_state: TrainerState | None = None,
) -> Scores:
    """Compute the rewards of N completions by every function, and their weighted sum.

    Functions run one after another in the order of `functions`; then all that is awaitable in their
    results is awaited concurrently. Each gets its own copies of the lists, so it cannot change
    those of another one.

    Args:
        functions: name -> reward function.
        weights: name -> finite number, for exactly the names in `functions`.
        prompts: N texts.
        completions: N texts.
        columns: name -> N values, the other columns of the data set.
        completion_ids: N lists of token ids; not passed to the functions if None.
        conversations: N lists of messages, from which the prompts were rendered. Functions get them
            as `prompts`, and the completions as messages of the assistant; the built-in ones, which
            `messages.on_texts` made, get the texts.
        trainer_state: for the functions that name it.

    Raises:
        RewardError: inputs of different lengths, weights that do not match the functions, or a
            function that raises or returns anything but N finite numbers or None.
    """
    numbers = _check_weights(functions, weights)
    arguments: dict[str, Sequence[object]] = {'prompts': prompts, 'completions': completions}
    if completion_ids is not None:
        arguments['completion_ids'] = completion_ids
    _check_columns(arguments, columns)
    arguments = {**arguments, **columns}
    messages = None
    if conversations is not None:
        messages = arguments | {'prompts': conversations, 'completions': answers_of(completions)}
    logs = Logs({}, {})
    services = {
        'trainer_state': trainer_state,
        'log_metric': logs.log_metric,
        'log_extra': functools.partial(logs.log_extra, len(prompts)),
    }
    timeouts_before = pool.timeouts()
    returned = call_functions(functions, arguments, conversations=messages, services=services)
    timeouts = pool.timeouts() - timeouts_before
    # f64[functions, N]: float32 only after the sum
    table = np.stack([_values(name, returned[name], arguments) for name in functions])
    total = np.array([numbers[name] for name in functions]) @ np.nan_to_num(table)
    too_large = np.flatnonzero(~(np.abs(total) <= _LARGEST))
    if too_large.size:
        raise RewardError(
            f'the weighted sum for {_describe_row(int(too_large[0]), arguments)} does not fit '
            f'float32: lower the weights {dict(weights)}'
        )
    _warn_of_rounding(total)
    parts = dict(zip(functions, table.astype(np.float32), strict=True))
    total[np.isnan(table).all(axis=0)] = np.nan
    return Scores(total.astype(np.float32), parts, timeouts, logs)


def score_steps(
    name: str,
    function: RewardFunction,
    prompts: Sequence[str],
    completions: Sequence[str],
    columns: Mapping[str, Sequence[object]],
) -> list[list[StepReward]]:
    """Call a step function (see `builtin.steps`) and check what it returns.

    Args:
        name: of the function, for error messages.
        function: the step function, called with its own copies of the lists.
        prompts: N texts.
        completions: N texts.
        columns: name -> N values, the other columns of the data set.

    Returns:
        The steps of each completion.

    Raises:
        RewardError: the function raises, or returns anything but a list with the steps of each
            completion, whose ends grow and lie inside the completion.
    """
    arguments: dict[str, Sequence[object]] = {'prompts': prompts, 'completions': completions}
    _check_columns(arguments, columns)
    arguments = {**arguments, **columns}
    returned = call_functions({name: function}, arguments, kind='step rewards')[name]
    if not isinstance(returned, list) or len(returned) != len(completions):
        raise RewardError(
            f'step rewards {name!r} did not return a list with one entry for each of the '
            f'{len(completions)} completions'
        )
    for row, (steps, completion) in enumerate(zip(returned, completions, strict=True)):
        try:
            ends = [0, *(step[0] for step in steps)]
            finite = all(abs(float(step[1])) < float('inf') for step in steps)
        except (TypeError, IndexError, ValueError) as error:
            raise RewardError(
                f'step rewards {name!r}, row {row}: {steps!r} is not a list of (end, value)'
            ) from error
        growing = all(a < b for a, b in itertools.pairwise(ends))
        if not growing or ends[-1] > len(completion) or not finite:
            raise RewardError(
                f'step rewards {name!r}, row {row}: {steps!r} for {completion!r}: ends must grow '
                'from 1 to the length of the completion, and values be finite'
            )
    return [[StepReward(*step) for step in steps] for steps in returned]


def statistics(scores: Scores) -> dict[str, float]:
    """Compute `rewards/<name>/mean` and `rewards/<name>/std` of each function, before weighting.

    Both cover the rows to which the function applies, with the sample standard deviation (divisor
    n - 1; 0 for one row). A function that applies to no row has no entry. `rewards/timeouts` counts
    comparisons of answers that exceeded their deadline or memory, and `rewards/skipped` the rows to
    which no function applies; without any they have no entry. Metrics that functions logged are
    averaged over their calls.

    Raises:
        RewardError: a function logged a metric under a name that is taken.
    """
    metrics: dict[str, float] = {}
    for name, part in scores.parts.items():
        values = part[~np.isnan(part)].astype(np.float64)
        if values.size:
            metrics[f'rewards/{name}/mean'] = float(values.mean())
            metrics[f'rewards/{name}/std'] = float(values.std(ddof=min(values.size - 1, 1)))
    if scores.timeouts:
        metrics['rewards/timeouts'] = float(scores.timeouts)
    if skipped := np.isnan(scores.total).sum():
        metrics['rewards/skipped'] = float(skipped)
    logged = scores.logs.means()
    if taken := sorted(metrics.keys() & logged):
        raise RewardError(f'log_metric({taken[0]!r}, …): a metric has this name: use another')
    return metrics | logged


def _warn_of_rounding(total: NDArray[np.float64]) -> None:
    """Warn where float32 rounds away differences that an advantage would be made of."""
    if not total.size:
        return
    spread, rounded = np.ptp(total), np.abs(total.astype(np.float32) - total).max()
    if spread > _VISIBLE and rounded > 0.01 * spread:
        log.warning(
            'rewards from %r to %r are rounded to float32, which changes them by up to %.2g: '
            'subtract a constant from them',
            float(total.min()), float(total.max()), rounded,
        )  # fmt: skip


def _check_weights(
    functions: Mapping[str, RewardFunction], weights: Mapping[str, object]
) -> dict[str, float]:
    if not functions:
        raise RewardError('no reward functions: name at least one')
    if set(functions) != set(weights):
        raise RewardError(
            f'reward functions {sorted(functions)} and weights {sorted(weights)} differ: '
            'give one weight for each function'
        )
    numbers: dict[str, float] = {}
    for name, weight in weights.items():
        number = number_of(weight, allow_bool=False)
        if number is None:
            raise RewardError(
                f'the weight of reward {name!r} is {short_repr(weight)}: use a finite number'
            )
        numbers[name] = number
    return numbers


def _check_columns(
    arguments: Mapping[str, Sequence[object]], columns: Mapping[str, Sequence[object]]
) -> None:
    for name in ('prompts', 'completions', 'completion_ids'):
        if name in columns:
            raise RewardError(f'column {name!r} is the name of a reward argument: rename it')
    rows = len(arguments['prompts'])
    for name, column in {**arguments, **columns}.items():
        if len(column) != rows:
            raise RewardError(f'{name} has {len(column)} rows, prompts {rows}: give one for each')


def _values(
    name: str, returned: object, arguments: Mapping[str, Sequence[object]]
) -> NDArray[np.float64]:
    """Convert the result of the reward `name` to f64[N] with NaN for None, or raise."""
    values = returned.tolist() if hasattr(returned, 'tolist') else returned
    if not isinstance(values, (list, tuple)):
        raise RewardError(
            f'reward {name!r} returned {short_repr(returned)}, a {type(returned).__name__}: '
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
        number = number_of(value)
        if number is None:
            raise RewardError(
                f'reward {name!r} returned {short_repr(value)} for '
                f'{_describe_row(row, arguments)}: '
                'return a finite number, or None where it does not apply'
            )
        column[row] = number
    return column


def number_of(value: object, *, allow_bool: bool = True) -> float | None:
    """Convert a scalar of any array library to float; None if float32 cannot hold it."""
    number = value.item() if hasattr(value, 'item') and getattr(value, 'ndim', None) == 0 else value
    if not isinstance(number, int | float) or (isinstance(number, bool) and not allow_bool):
        return None
    return float(number) if abs(number) <= _LARGEST else None


def _describe_row(row: int, arguments: Mapping[str, Sequence[object]]) -> str:
    prompt, completion = arguments['prompts'][row], arguments['completions'][row]
    return f'row {row} (prompt {short_repr(prompt)}, completion {short_repr(completion)})'


def short_repr(value: object) -> str:
    """Return the representation of a value in at most 80 characters."""
    try:
        text = repr(value)
    except ValueError:  # Python does not print integers of more than 4300 digits
        text = f'a {type(value).__name__} that is too long to print'
    return text if len(text) <= 80 else f'{text[:77]}...'
