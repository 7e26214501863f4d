"""A plan of a run: its stages with the memory, work and times of their programs."""

import dataclasses
import tempfile
from collections.abc import Callable
from typing import Any

from ml_collections import ConfigDict

from grpo_jax.run import mesh
from grpo_jax.run.plan.measuring import Compiler, Measured, TooLargeError
from grpo_jax.run.plan.prediction import StepTime, step_time
from grpo_jax.run.plan.programs import programs_of
from grpo_jax.run.plan.topology import Topology
from grpo_jax.run.preparation import prepare_run
from grpo_jax.run.stages import Stage

Report = Callable[[Any], None]


@dataclasses.dataclass(frozen=True)
class StagePlan:
    """The plan of a stage.

    Attributes:
      stage: the stage.
      programs: what was compiled.
      skipped: names of programs that were not, since one before them does not fit.
      step: predicted; None where the speed of the devices is unknown.
    """

    stage: Stage
    programs: list[Measured]
    skipped: list[str]
    step: StepTime | None = None


@dataclasses.dataclass(frozen=True)
class Plan:
    """The plan of a run.

    Attributes:
      topology: the devices.
      mesh: sizes of the mesh by axis.
      stages: in their order.
    """

    topology: Topology
    mesh: dict[str, int]
    stages: list[StagePlan]

    @property
    def measured(self) -> list[Measured]:
        """The programs of all stages."""
        return [measured for stage in self.stages for measured in stage.programs]

    @property
    def peak(self) -> Measured:
        """The program that needs the most memory."""
        return max(self.measured, key=lambda measured: measured.total)

    @property
    def fits(self) -> bool | None:
        """Whether all programs fit; None where the memory of the devices is unknown."""
        if any(measured.too_large for measured in self.measured):
            return False
        memory = self.topology.memory
        return None if memory is None else self.peak.total <= memory

    def too_large(self) -> list[Measured]:
        """The programs that do not fit."""
        memory = self.topology.memory or float('inf')
        return [m for m in self.measured if m.too_large or m.total > memory]


def make_plan(
    config: ConfigDict,
    topology: Topology,
    workdir: str = '',
    *,
    only: Callable[[str], bool] = lambda name: True,
    report: Report = lambda part: None,
) -> Plan:
    """Checks a config, and compiles the programs of its run.

    Args:
      config: with every key of `defaults()`.
      topology: the devices.
      workdir: where data sets are kept; empty: a temporary folder.
      only: which programs to compile, by name.
      report: called with each stage, before its programs, and each program once it is compiled.

    Raises:
      ConfigError: all that the user has to fix in the config and the data.
    """
    with tempfile.TemporaryDirectory() as folder, mesh.described(topology.devices):
        setup, stages = prepare_run(config, workdir or folder)
        compiler, plans = Compiler(topology), []
        for stage in _distinct(stages):
            report(stage)
            measured, skipped = _compile_stage(compiler, setup, stage, only, report)
            step = None
            if topology.chip is not None and not skipped:
                step = step_time(
                    stage, setup.model.config, measured, topology.chip, setup.mesh.size
                )
            plans.append(StagePlan(stage, measured, skipped, step))
        return Plan(topology, dict(setup.mesh.shape), plans)


def _distinct(stages: list[Stage]) -> list[Stage]:
    """The first stage of each kind: the programs of later iterations are the same."""
    kinds: dict[str, Stage] = {}
    for stage in stages:
        kinds.setdefault(stage.name.partition('-')[0], stage)
    return list(kinds.values())


def _compile_stage(
    compiler: Compiler, setup: Any, stage: Stage, only: Callable[[str], bool], report: Report
) -> tuple[list[Measured], list[str]]:
    """The compiled programs of a stage, and the names of those that need one that does not fit."""
    measured: list[Measured] = []
    skipped: list[str] = []
    for program in programs_of(setup, stage, compiler.results):
        if not only(program.name):
            continue
        try:
            measured.append(compiler.measure(program))
        except TooLargeError:
            skipped.append(program.name)
        else:
            report(measured[-1])
    return measured, skipped
