"""What a run has chosen by the memory of its devices, which it keeps when it is resumed."""

import json
import pathlib
from collections.abc import Mapping
from typing import Any

from grpo_jax.engine.compute import ComputePlan
from grpo_jax.run.errors import reading
from grpo_jax.run.output_file import replaced

FILE = 'compute.json'  # in the run's folder: {stage: plan and bytes, 'sampling': {'tensor': size}}
SAMPLING = 'sampling'


def read(workdir: pathlib.Path) -> dict[str, dict[str, Any]]:
    """The choices of a run, by what they are about; empty if there are none.

    Raises:
      ValueError: the file is damaged; names it.
    """
    path = workdir / FILE
    if not path.is_file():
        return {}
    with reading(path, 'restore it, or remove it to choose again, which may round differently'):
        choices: dict[str, dict[str, Any]] = json.loads(path.read_bytes())
        for name, kept in choices.items():
            _check_sampling(**kept) if name == SAMPLING else _check_plan(**kept)
    return choices


def keep(workdir: pathlib.Path, name: str, choice: Mapping[str, Any]) -> None:
    """Adds a choice to the file, or replaces the one of that name."""
    with replaced(workdir / FILE) as file:
        file.write(json.dumps(read(workdir) | {name: dict(choice)}, indent=2) + '\n')


def _check_plan(plan: dict[str, Any], needed: float | None) -> None:
    for name, value in ComputePlan(**plan)._asdict().items():
        kind = ComputePlan.__annotations__[name]
        if type(value) is not kind or value < 0:
            raise TypeError(f'{name}={value!r}')
    if not isinstance(needed, int | float | None):
        raise TypeError(f'needed={needed!r}')


def _check_sampling(tensor: int) -> None:
    if type(tensor) is not int or tensor < 1:
        raise TypeError(f'tensor={tensor!r}')
