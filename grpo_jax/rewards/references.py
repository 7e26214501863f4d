"""Find references that the built-in answer functions cannot read, before any completion exists."""

from collections.abc import Mapping, Sequence

from grpo_jax.rewards.calls import Columns, RewardError, RewardFunction, parameters
from grpo_jax.rewards.messages import takes_texts

_REFERENCES = ('answer', 'target')  # columns whose values the built-in functions compare with


def check_references(
    functions: Mapping[str, RewardFunction], columns: Columns, rows: Sequence[int]
) -> dict[str, list[int]]:
    """Find the rows whose reference a built-in answer function cannot read.

    Args:
        functions: name -> reward function; those of the user's own are not called.
        columns: name -> N values.
        rows: N numbers of rows, for the result and error messages.

    Returns:
        For each function with such rows, their numbers: the function returns None for them.

    Raises:
        RewardError: a function raises for a row; names the row.
    """
    unreadable: dict[str, list[int]] = {}
    for name, function in functions.items():
        if not takes_texts(function) or not parameters(function).keys() & set(_REFERENCES):
            continue
        values = _values(name, function, columns, rows)
        none = [row for row, value in zip(rows, values, strict=True) if value is None]
        if none:
            unreadable[name] = none
    return unreadable


def _values(
    name: str, function: RewardFunction, columns: Columns, rows: Sequence[int]
) -> Sequence[object]:
    """Return the rewards of empty completions."""
    try:
        return _call(function, columns, len(rows))
    except ValueError:
        for i, row in enumerate(rows):  # find the row
            try:
                _call(function, {key: [values[i]] for key, values in columns.items()}, 1)
            except ValueError as error:
                raise RewardError(f'reward {name!r}, row {row} (from 0): {error}') from error
        raise


def _call(function: RewardFunction, columns: Columns, count: int) -> list[object]:
    empty = [''] * count
    known = parameters(function)
    named = {key: values for key, values in columns.items() if key in known}
    values = function(prompts=empty, completions=empty, **named)
    return values if isinstance(values, list) else [0.0] * count
