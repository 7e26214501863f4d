"""Makes a plan, and prints it while it is made."""

import json as jsonlib
from typing import Any

from ml_collections import ConfigDict

from grpo_jax.run.plan import report
from grpo_jax.run.plan.measuring import Measured
from grpo_jax.run.plan.planning import Plan, make_plan
from grpo_jax.run.plan.remedies import find_remedies
from grpo_jax.run.plan.topology import find_topology


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
      workdir: where data sets are kept; empty: a temporary folder.
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
    plan = make_plan(config, devices, workdir, report=show)
    remedies = [] if plan.fits is not False else find_remedies(config, plan, workdir)
    if json:
        changes = [{'change': str(r.change), 'bytes': r.needed} for r in remedies]
        print(_dumped(report.to_json(plan) | {'changes': changes}))
        return plan
    print(f'\nmesh: {", ".join(f"{name}={size}" for name, size in plan.mesh.items())}')
    for stage in plan.stages:
        for name in stage.skipped:
            print(f'  not compiled: {name}, which follows one that does not fit')
        text = report.describe_step(stage)
        if text:
            print(f'{stage.stage.name}:\n{text}')
    print(report.verdict(plan), flush=True)
    for remedy in remedies:
        print(f'  fits with {remedy.change}: {report.gib(remedy.needed)}', flush=True)
    return plan


def _dumped(value: Any) -> str:
    return jsonlib.dumps(value, indent=2)
