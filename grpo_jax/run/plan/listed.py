"""The list of programs that a plan keeps in a run's folder, against which the run is checked."""

import contextlib
import json
import logging
import os
import pathlib
from collections.abc import Iterator
from typing import Any

from grpo_jax.engine import calls
from grpo_jax.engine.calls import Call
from grpo_jax.run import hosts
from grpo_jax.run.errors import reading
from grpo_jax.run.output_file import replaced

FILE = 'plan.json'  # in the run's folder
_LISTED = 'listed'  # {digest: name}

log = logging.getLogger('grpo_jax')


def keep(workdir: str, plan: dict[str, Any], listed: dict[str, str]) -> None:
    """Writes a plan into a run's folder.

    Args:
      workdir: the folder; created if it does not exist.
      plan: as JSON types.
      listed: all programs that the run can dispatch, {digest: name}.
    """
    os.makedirs(workdir, exist_ok=True)
    with replaced(pathlib.Path(workdir, FILE)) as file:
        file.write(json.dumps(plan | {_LISTED: listed}, indent=2) + '\n')


@contextlib.contextmanager
def warned_of_others(workdir: pathlib.Path) -> Iterator[None]:
    """Warns once of each program in the block that the folder's plan, if it has one, does not list.

    Programs that only make the initial state or move small arrays are neither listed nor checked.
    """
    path = workdir / FILE
    if not path.is_file() or not hosts.is_first():
        yield
        return
    with reading(path, 'remove it, or plan again'):
        known = {*json.loads(path.read_bytes())[_LISTED].keys()}

    def observe(call: Call) -> None:
        if call.is_traced or (digest := call.digest) in known:
            return
        known.add(digest)
        log.warning(
            '%s does not list a program that this run uses: %s. It may need more memory than was '
            'planned: plan again with the config and the devices of this run, or remove the file',
            path, call.name,
        )  # fmt: skip

    with calls.observed(observe):
        yield
