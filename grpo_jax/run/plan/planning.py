"""A plan of a run: its stages with the memory, work and times of their programs."""

import dataclasses
import tempfile
from collections.abc import Callable, Collection
from typing import Any

from ml_collections import ConfigDict

from grpo_jax.run import mesh
from grpo_jax.run.plan.measuring import Compiler, Measured, TooLargeError, shapes_of, used
from grpo_jax.run.plan.prediction import StepTime, step_time
from grpo_jax.run.plan.programs import Program, programs_of
from grpo_jax.run.plan.topology import Topology
from grpo_jax.run.preparation import prepare_run
from grpo_jax.run.setup import Setup
from grpo_jax.run.stages import Stage

Report = Callable[[Any], None]


@dataclasses.dataclass(frozen=True)
class StagePlan:
    """The plan of a stage.

    Attributes:
      stage: the stage.
      programs: what was compiled.
      skipped: kinds of programs that were not, since one before them does not fit.
      listed: all programs that the stage can dispatch, {digest: name}, see `Call.digest`.
      step: predicted; None where the speed of the devices is unknown.
    """

    stage: Stage
    programs: list[Measured]
    skipped: list[str]
    listed: dict[str, str]
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
    def listed(self) -> dict[str, str]:
        """All programs that the run can dispatch, {digest: name}."""
        return {key: name for stage in self.stages[::-1] for key, name in stage.listed.items()}

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
    only: Collection[str] = (),
    report: Report = lambda part: None,
    progress: Callable[[str], None] = lambda line: None,
    known: dict[str, Any] | None = None,
) -> Plan:
    """Checks a config, and compiles the programs of its run.

    Args:
      config: with every key of `defaults()`.
      topology: the devices.
      workdir: where data sets are kept; empty: a temporary folder.
      only: kinds of programs to compile; empty: all, and the others are listed.
      report: called with each stage, before its programs, and each program once it is compiled.
      progress: called with a line of text for each program that is compiled, at once.
      known: programs that plans of similar configs have compiled; see `Compiler`.

    Raises:
      ConfigError: all that the user has to fix in the config and the data.
    """
    memory = topology.memory if topology.limited else None
    with tempfile.TemporaryDirectory() as folder, mesh.described(topology.devices, memory):
        if not workdir:  # a run of its own, which need not reach the checkpoints of another
            config = config.copy_and_resolve_references()
            config.checkpoint.folder = ''
        setup, stages = prepare_run(config, workdir or folder)
        compiler = Compiler(topology, known, progress)
        with used(compiler):
            plans = [
                _plan_stage(compiler, setup, stage, only, report) for stage in _distinct(stages)
            ]
        sampling_tensor = setup.sampling_mesh.shape['tensor']
        shape = {**setup.mesh.shape, 'sampling_tensor': sampling_tensor}
        return Plan(topology, shape, plans)


def list_programs(setup: Setup, stage: Stage) -> dict[str, str]:
    """All programs that a stage can dispatch, {digest: name}; none of them is compiled."""
    known: dict[str, Any] = {}

    def results(program: Program) -> Any:
        if program.name not in known:
            known[program.name] = shapes_of(program)
        return known[program.name]

    listed: dict[str, str] = {}
    for program in programs_of(setup, stage, results):
        listed.setdefault(program.call.digest, program.name)
    return listed


def _distinct(stages: list[Stage]) -> list[Stage]:
    """The first stage of each kind: the programs of later iterations are the same."""
    kinds: dict[str, Stage] = {}
    for stage in stages:
        kinds.setdefault(stage.name.partition('-')[0], stage)
    return list(kinds.values())


def _plan_stage(
    compiler: Compiler,
    setup: Setup,
    stage: Stage,
    only: Collection[str],
    report: Report,
) -> StagePlan:
    """The plan of a stage."""
    report(stage)
    measured, skipped = _compile_stage(compiler, setup, stage, only, report)
    chip, step = compiler.topology.chip, None
    if chip is not None and not skipped:
        step = step_time(stage, setup.model.config, measured, chip, setup.mesh.size)
        if compiler.topology.estimated:  # from the model's FLOPs themselves
            step = step._replace(mfu=0.0, mfu_without_overlap=0.0)
    listed = {} if only else list_programs(setup, stage)
    return StagePlan(stage, measured, skipped, listed, step)


def _compile_stage(
    compiler: Compiler,
    setup: Setup,
    stage: Stage,
    only: Collection[str],
    report: Report,
) -> tuple[list[Measured], list[str]]:
    """The compiled programs of a stage, and the kinds of those that need one that does not fit."""
    measured: list[Measured] = []
    skipped: list[str] = []
    # One after the other: libtpu crashed while it compiled two at once, and uses all cores for one.
    for program in programs_of(setup, stage, compiler.results):
        if (only and program.kind not in only) or program.listed_only:
            continue
        try:
            measured.append(compiler.measure(program))
        except TooLargeError:
            skipped.append(program.kind)
        else:
            report(measured[-1])
    return measured, skipped
