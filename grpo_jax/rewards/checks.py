"""Checks of what reward functions and step functions return."""

import itertools
from collections.abc import Sequence
from typing import NamedTuple, cast

from grpo_jax.rewards.calls import Columns, RewardError

LARGEST = float.fromhex('0x1.fffffep+127')  # of float32


class StepReward(NamedTuple):
    """The reward of a step, which extends from the end of the previous one to its own end."""

    end: int  # characters from the start of the completion
    value: float


def check_values(name: str, returned: object, arguments: Columns) -> list[object]:
    """Check the result of a reward function, the check of `call_functions`.

    Returns:
        For each row a number, None, or an error.

    Raises:
        RewardError: it is no list, or has another length.
    """
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
    return [
        None if value is None else _number(name, value, row, arguments)
        for row, value in enumerate(values)
    ]


def _number(name: str, value: object, row: int, arguments: Columns) -> float | RewardError:
    number = number_of(value)
    if number is not None:
        return number
    return RewardError(
        f'reward {name!r} returned {short_repr(value)} for {describe_row(row, arguments)}: '
        'return a finite number, or None where it does not apply'
    )


def number_of(value: object, *, allow_bool: bool = True) -> float | None:
    """Convert a scalar of any array library to float; None if float32 cannot hold it."""
    number = value.item() if hasattr(value, 'item') and getattr(value, 'ndim', None) == 0 else value
    if not isinstance(number, int | float) or (isinstance(number, bool) and not allow_bool):
        return None
    return float(number) if abs(number) <= LARGEST else None


def describe_row(row: int, arguments: Columns) -> str:
    """Return the prompt and the completion of a row, for an error message."""
    prompt, completion = arguments['prompts'][row], arguments['completions'][row]
    return f'row {row} (prompt {short_repr(prompt)}, completion {short_repr(completion)})'


def short_repr(value: object) -> str:
    """Return the representation of a value in at most 80 characters."""
    try:
        text = repr(value)
    except Exception:  # such as an integer of more than 4300 digits
        text = f'a {type(value).__name__} that is too long to print'
    return text if len(text) <= 80 else f'{text[:77]}...'


def check_steps(name: str, returned: object, arguments: Columns) -> list[list[StepReward]]:
    """Check the result of a step function, the check of `call_functions`."""
    completions = cast(Sequence[str], arguments['completions'])
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
