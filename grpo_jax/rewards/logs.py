"""What reward functions may ask for by naming it: the state of training, and two ways to log."""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import numpy as np

RECORD_FIELDS = (  # of a line of completions.jsonl
    'prompt', 'completion', 'reward', 'rewards', 'turns', 'timing/replies',
)  # fmt: skip


class TrainerState(NamedTuple):
    """The progress of training, under the names of `transformers.TrainerState`."""

    global_step: int = 0  # updates of the stage so far
    max_steps: int = 0  # updates of the stage
    epoch: float = 0.0  # passes over the data set so far
    is_world_process_zero: bool = True


@dataclass(frozen=True)
class Logs:
    """What reward functions logged while they scored N completions."""

    # One value for each call of `log_metric`, and N values for each column of `log_extra`.
    metrics: dict[str, list[float]] = field(default_factory=dict)
    extra: dict[str, list[object]] = field(default_factory=dict)

    def log_metric(self, name: str, value: float) -> None:
        """Log a number, which is averaged over a step's calls.

        Raises:
            ValueError: it is not a finite number.
        """
        number = float(value)
        if not np.isfinite(number):
            raise ValueError(f'log_metric({name!r}, {value!r}): give a finite number')
        self.metrics.setdefault(str(name), []).append(number)

    def log_extra(self, rows: int, column: str, values: Sequence[object]) -> None:
        """Log a value for each of `rows` completions, which completions.jsonl shows.

        Raises:
            ValueError: the number of values, or the name of the column, which is that of a field.
        """
        items = list(values)
        if len(items) != rows:
            raise ValueError(
                f'log_extra({column!r}, …) got {len(items)} values for {rows} completions: give '
                'one each'
            )
        if column in RECORD_FIELDS:
            raise ValueError(f'log_extra({column!r}, …): a field has this name: choose another')
        self.extra[str(column)] = [_json_value(item) for item in items]

    def add(self, other: 'Logs') -> None:
        """Add what another function logged for the same completions."""
        for name, values in other.metrics.items():
            self.metrics.setdefault(name, []).extend(values)
        self.extra.update(other.extra)

    def means(self) -> dict[str, float]:
        """Return the mean of each metric over the calls."""
        return {name: float(np.mean(values)) for name, values in self.metrics.items()}

    def select(self, rows: Iterable[int]) -> 'Logs':
        """Return the logs with the entries of these completions, in this order."""
        order = list(rows)
        return replace(self, extra={k: [x[i] for i in order] for k, x in self.extra.items()})


def join_logs(parts: Sequence[tuple[Logs, int]]) -> Logs:
    """Join logs, each with its number of completions; columns that one lacks are None there."""
    metrics: dict[str, list[float]] = {}
    for logs, _ in parts:
        for name, values in logs.metrics.items():
            metrics.setdefault(name, []).extend(values)
    names = dict.fromkeys(name for logs, _ in parts for name in logs.extra)
    extra: dict[str, list[object]] = {
        name: [x for logs, rows in parts for x in logs.extra.get(name, [None] * rows)]
        for name in names
    }
    return Logs(metrics, extra)


def _json_value(value: object) -> object:
    """Return a value that can be written as JSON: arrays as lists, anything else as its text."""
    if hasattr(value, 'tolist'):
        value = value.tolist()
    try:
        json.dumps(value, allow_nan=False)
    except (TypeError, ValueError):
        return str(value)
    return value
