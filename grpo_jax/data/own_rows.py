"""Data sets that a function of the user's own returns."""

from collections.abc import Mapping
from typing import Any

from grpo_jax import plugins
from grpo_jax.data.datasets.records import Row, checked_row
from grpo_jax.data.rows import MissingSplitError


def load_own(path: str, split: str, options: Mapping[str, Any]) -> list[Row]:
    """Call a function `(split, **options)` that returns the rows of a split.

    Args:
      path: of the function, see `plugins.load`.
      split: name of the split.
      options: keyword arguments.

    Returns:
      The rows, in the order of the function's.

    Raises:
      MissingSplitError: the function returns None.
      ValueError: there is no such function, it raises, or it returns anything but dictionaries with
        equal columns whose values are text, numbers, booleans, None, lists or dictionaries.
    """
    place = f'data set {path!r}, split {split!r}'
    try:
        function = plugins.load(path)
    except plugins.PluginError as error:
        raise ValueError(f'data set {error}') from error
    try:
        returned = function(split, **options)
        records = None if returned is None else list(returned)
    except (Exception, SystemExit) as error:
        raised = f'raised {type(error).__name__}: {error}{plugins.place_of(error)}'
        raise ValueError(f'{place}: {raised}') from error
    if records is None:
        raise MissingSplitError(f'{place}: there is none, since the function returned None')
    rows = [checked_row(record, f'{place}, row {i}') for i, record in enumerate(records)]
    for i, row in enumerate(rows):
        if row.keys() != rows[0].keys():
            raise ValueError(
                f'{place}, row {i}: the columns are {", ".join(row)} where the first row has '
                f'{", ".join(rows[0])}: give every row the same columns'
            )
    return rows
