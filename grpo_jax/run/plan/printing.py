"""Makes a plan, and prints it while it is made."""

import json as jsonlib
import sys
from collections.abc import Iterable
from typing import Any

from ml_collections import ConfigDict

from grpo_jax.run.plan import report
from grpo_jax.run.plan.listed import keep
from grpo_jax.run.plan.measuring import Measured
from grpo_jax.run.plan.planning import Plan, make_plan
from grpo_jax.run.plan.remedies import Remedy, find_remedies
from grpo_jax.run.plan.topology import find_topology, gib


def print_plan(
    config: ConfigDict,
    workdir: str = '',
    *,
    topology: str = '',
    memory: str = '',
    json: bool = False,
) -> Plan:
    """Prints the plan of a run: as text while it is made, or as one JSON object.

    Args:
      config: with every key of `defaults()`.
      workdir: the run's folder, where the plan is kept; empty: none.
      topology: see `find_topology`; empty: 'local'.
      memory: of a device, instead of what its kind has.
      json: print JSON.

    Returns:
      The plan.

    Raises:
      ConfigError: all that the user has to fix in the config and the data.
      ValueError: an unknown topology.
    """
    devices = find_topology(topology or 'local', memory)

    def show(part: Any) -> None:
        if json:
            return
        is_program = isinstance(part, Measured)
        text = report.describe_program(part, devices) if is_program else report.describe_stage(part)
        print(text, flush=True)

    if not json:
        print(report.describe_topology(devices), flush=True)
    known: dict[str, Any] = {}
    plan = make_plan(config, devices, workdir, report=show, progress=_say, known=known)
    remedies: Iterable[Remedy] = ()
    if plan.fits is False:
        remedies = find_remedies(config, plan, workdir, progress=_say, known=known)
    if json:
        found = report.to_json(plan) | {'changes': list(map(_change, remedies))}
        print(jsonlib.dumps(found, indent=2))
    else:
        found = report.to_json(plan) | {'changes': _printed(plan, remedies)}
    if workdir:
        keep(workdir, found, plan.listed)
    return plan


def _printed(plan: Plan, remedies: Iterable[Remedy]) -> list[dict[str, Any]]:
    """Prints the end of a plan; returns the changes that make it fit."""
    print(f'\nmesh: {", ".join(f"{name}={size}" for name, size in plan.mesh.items())}')
    for stage in plan.stages:
        for name in stage.skipped:
            print(f'  not compiled: {name}, which follows one that does not fit')
        print(report.describe_rest(stage))
    print(report.verdict(plan), flush=True)
    changes = []
    for remedy in remedies:
        print(f'  fits with {remedy.change}: {gib(remedy.needed)}', flush=True)
        changes.append(_change(remedy))
    return changes


def _change(remedy: Remedy) -> dict[str, Any]:
    return {'change': str(remedy.change), 'bytes': remedy.needed}


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
