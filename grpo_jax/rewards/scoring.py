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

import logging
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import NamedTuple, cast

import numpy as np
from numpy.typing import NDArray

from grpo_jax.rewards.attempts import call_functions
from grpo_jax.rewards.call_options import CallOptions, Failures
from grpo_jax.rewards.calls import Arguments, RewardError, RewardFunction
from grpo_jax.rewards.checks import (
    LARGEST,
    StepReward,
    check_steps,
    check_values,
    describe_row,
    number_of,
    short_repr,
)
from grpo_jax.rewards.logs import Logs, TrainerState
from grpo_jax.rewards.messages import Conversation, answers_of
from grpo_jax.rewards.verify import pool

log = logging.getLogger('grpo_jax')

_VISIBLE = 1e-4  # differences below it vanish beside `Algorithm.advantage_eps`


class Scores(NamedTuple):
    """Rewards of N completions."""

    # f32[N], sum of weight * value over the functions that apply; NaN where none does
    total: NDArray[np.floating]
    parts: dict[str, NDArray[np.floating]]  # name -> f32[N] before weighting, NaN for None
    timeouts: int = 0  # comparisons of answers that exceeded their deadline or memory; reward 0
    logs: Logs = Logs()  # what the functions logged by `log_metric` and `log_extra`
    failures: Mapping[str, Failures] = MappingProxyType({})  # of functions that failed


def score(
    functions: Mapping[str, RewardFunction],
    weights: Mapping[str, object],
    *,
    prompts: Sequence[str],
    completions: Sequence[str],
    columns: Mapping[str, Sequence[object]],
    completion_ids: Sequence[Sequence[int]] | None = None,
    conversations: Sequence[Conversation] | None = None,
    answers: Sequence[Conversation] | None = None,
    trainer_state: TrainerState | None = None,
    calls: Mapping[str, CallOptions] | None = None,
    group_size: int | None = None,
    most_failed: int | None = None,
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
        answers: with `conversations`, N lists of messages of completions of several turns.
        trainer_state: for the functions that name it.
        calls: name -> how it is called, see `CallOptions`, of which those without an entry have
            the defaults. A completion has no reward where a function with a weight failed on it.
        group_size: the number of completions of a prompt, which are next to each other; None: N.
        most_failed: the largest number of completions on which a function may fail.

    Raises:
        RewardError: inputs of different lengths, weights that do not match the functions, or a
            function that fails: it raises, takes too long, or returns anything but N finite
            numbers or None.
    """
    numbers = _check_weights(functions, weights)
    texts: dict[str, Sequence[object]] = {'prompts': prompts, 'completions': completions}
    if completion_ids is not None:
        texts['completion_ids'] = completion_ids
    _check_columns(texts, columns)
    texts = {**texts, **columns}
    messages = None
    if conversations is not None:
        answers = answers_of(completions) if answers is None else answers
        messages = texts | {'prompts': conversations, 'completions': answers}
    timeouts_before = pool.timeouts()
    outcomes = call_functions(
        functions,
        Arguments(texts, messages, trainer_state),
        check_values,
        calls=calls or {},
        group_size=group_size,
        most_failed=most_failed,
    )
    timeouts = pool.timeouts() - timeouts_before
    # f64[functions, N]: float32 only after the sum
    table = np.stack([
        np.array([np.nan if v is None else v for v in outcomes[name].values], np.float64)
        for name in functions
    ])  # fmt: skip
    total = np.array([numbers[name] for name in functions]) @ np.nan_to_num(table)
    too_large = np.flatnonzero(~(np.abs(total) <= LARGEST))
    if too_large.size:
        raise RewardError(
            f'the weighted sum for {describe_row(int(too_large[0]), texts)} does not fit '
            f'float32: lower the weights {dict(weights)}'
        )
    _warn_of_rounding(total)
    parts = dict(zip(functions, table.astype(np.float32), strict=True))
    total[np.isnan(table).all(axis=0)] = np.nan
    for name, outcome in outcomes.items():
        if numbers[name]:
            total[np.array(outcome.failed, bool)] = np.nan
    failures = {name: o.failures for name, o in outcomes.items() if o.failures is not None}
    logs = Logs({}, {})
    for outcome in outcomes.values():
        logs.add(outcome.logs)
    return Scores(total.astype(np.float32), parts, timeouts, logs, failures)


def score_steps(
    name: str,
    function: RewardFunction,
    prompts: Sequence[str],
    completions: Sequence[str],
    columns: Mapping[str, Sequence[object]],
    *,
    call: CallOptions | None = None,
    group_size: int | None = None,
) -> list[list[StepReward]]:
    """Call a step function (see `builtin.steps`) and check what it returns.

    Args:
        name: of the function, for error messages.
        function: the step function, called with its own copies of the lists.
        prompts: N texts.
        completions: N texts.
        columns: name -> N values, the other columns of the data set.
        call: how it is called; its failures are errors.
        group_size: the number of completions of a prompt, which are next to each other; None: N.

    Returns:
        The steps of each completion.

    Raises:
        RewardError: the function raises, or returns anything but a list with the steps of each
            completion, whose ends grow and lie inside the completion.
    """
    texts: dict[str, Sequence[object]] = {'prompts': prompts, 'completions': completions}
    _check_columns(texts, columns)
    outcomes = call_functions(
        {name: function},
        Arguments({**texts, **columns}),
        check_steps,
        calls={name: call or CallOptions()},
        group_size=group_size,
        kind='step rewards',
    )
    return cast(list[list[StepReward]], outcomes[name].values)


def statistics(scores: Scores) -> dict[str, float]:
    """Compute `rewards/<name>/mean` and `rewards/<name>/std` of each function, before weighting.

    Both cover the rows to which the function applies, with the sample standard deviation (divisor
    n - 1; 0 for one row). A function that applies to no row has no entry. `rewards/timeouts` counts
    comparisons of answers that exceeded their deadline or memory, and `rewards/skipped` the rows to
    which no function applies; `rewards/<name>/failed` counts the rows on which a function failed.
    Without any they have no entry. Metrics that functions logged are
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
    for name, failures in scores.failures.items():
        metrics[f'rewards/{name}/failed'] = float(failures.number)
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
