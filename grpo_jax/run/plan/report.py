"""A plan as text, and as JSON."""

from typing import Any

from grpo_jax.run.plan.measuring import Measured
from grpo_jax.run.plan.planning import Plan, StagePlan
from grpo_jax.run.plan.prediction import times_of
from grpo_jax.run.plan.topology import Topology, gib
from grpo_jax.run.stages import Stage

_SI = ((1e15, 'P'), (1e12, 'T'), (1e9, 'G'), (1e6, 'M'), (1e3, 'k'))


def describe_topology(topology: Topology) -> str:
    """One line about the devices."""
    kind = topology.devices[0].device_kind
    memory = 'unknown memory' if topology.memory is None else f'{gib(topology.memory)} each'
    return f'{topology.name}: {len(topology.devices)} x {kind}, {memory}'


def describe_stage(stage: Stage) -> str:
    """A stage's data and sizes."""
    groups, group_size, prompt, length = stage.shape
    tokens = groups * (prompt + group_size * length)
    return (
        f'\n{stage.name}: {stage.steps} steps; {stage.rows}\n'
        f'  a step: {groups} prompts x {group_size} completions, at most {prompt} + {length} '
        f'tokens each, {tokens:,} tokens'
    )


def describe_program(measured: Measured, topology: Topology) -> str:
    """A program's memory, work and times."""
    estimate = ' (estimated)' if topology.estimated else ''
    lines = [f'  {measured.program.name}{estimate}: {gib(measured.total)} of memory on a device']
    if measured.too_large:
        lines[0] += ', DOES NOT FIT'
    parts = ', '.join(f'{name} {gib(size)}' for name, size in measured.memory.items() if size)
    lines.append(f'    {parts}')
    costs = measured.costs
    if costs.flops or costs.bytes:
        work = f'    {si(costs.flops)}FLOP, {si(costs.bytes)}B of memory traffic'
        if topology.chip is not None:
            work += f', at least {seconds(times_of(measured, topology.chip).total)}'
        compiled = f'; compiled in {seconds(measured.seconds)}' if measured.seconds else ''
        lines.append(work + compiled)
    if costs.collectives:
        kinds = sorted(costs.collectives.items(), key=lambda item: -item[1].bytes)
        listed = ', '.join(f'{x.count:.0f} {kind} ({si(x.bytes)}B)' for kind, x in kinds)
        lines.append(f'    collectives: {listed}')
    return '\n'.join(lines)


def describe_rest(plan: StagePlan) -> str:
    """A stage's programs that are not compiled, and the predicted time of its steps."""
    lines = [f'{plan.stage.name}:']
    others = len(plan.listed) - len(plan.programs) - len(plan.skipped)
    if others > 0:
        lines.append(
            f'  {others} more programs of samplers, for fewer completions or shorter caches, which '
            'need less memory, are listed but not compiled'
        )
    if plan.step is not None and plan.step.seconds:
        times = plan.step.seconds.items()
        listed = ', '.join(f'{name.partition(": ")[2]} {seconds(time)}' for name, time in times)
        line = (
            f'  a step takes at least {seconds(plan.step.total)} ({listed}), if all completions '
            'are as long as they may be'
        )
        if plan.step.mfu:
            line += (
                f'; update at most {plan.step.mfu:.0%} MFU, '
                f'{plan.step.mfu_without_overlap:.0%} if nothing overlaps with collectives'
            )
        lines.append(line)
    return '\n'.join(lines)


def verdict(plan: Plan) -> str:
    """Whether the run fits."""
    peak = plan.peak
    if plan.fits is None:
        return f'needs {gib(peak.total)} on a device ({peak.program.name})'
    word = 'fits' if plan.fits else 'does not fit'
    memory = gib(plan.topology.memory or 0.0)
    return f'{word}: needs {gib(peak.total)} of {memory} on a device ({peak.program.name})'


def to_json(plan: Plan) -> dict[str, Any]:
    """The plan as JSON types; bytes, FLOPs and seconds of one device."""
    topology = plan.topology
    return {
        'topology': topology.name,
        'devices': len(topology.devices),
        'memory': topology.memory,
        'estimated': topology.estimated,
        'mesh': plan.mesh,
        'fits': plan.fits,
        'peak': {'program': plan.peak.program.name, 'bytes': plan.peak.total},
        'stages': [_stage_to_json(stage, topology) for stage in plan.stages],
    }


def _stage_to_json(plan: StagePlan, topology: Topology) -> dict[str, Any]:
    stage, step = plan.stage, plan.step
    return {
        'name': stage.name,
        'steps': stage.steps,
        'rows': stage.rows,
        'shape': dict(zip(('B', 'G', 'P', 'T'), stage.shape, strict=True)),
        'programs': [_program_to_json(measured, topology) for measured in plan.programs],
        'not compiled': plan.skipped,
        'step seconds': None if step is None else step.total,
        'update MFU': None if step is None else step.mfu,
        'update MFU without overlap': None if step is None else step.mfu_without_overlap,
    }


def _program_to_json(measured: Measured, topology: Topology) -> dict[str, Any]:
    costs, chip = measured.costs, topology.chip
    return {
        'name': measured.program.name,
        'memory': measured.memory,
        'total': measured.total,
        'too large': measured.too_large,
        'flops': costs.flops,
        'bytes': costs.bytes,
        'collectives': {
            kind: {'count': x.count, 'bytes': x.bytes} for kind, x in costs.collectives.items()
        },
        'seconds': None if chip is None else times_of(measured, chip)._asdict(),
        'runs per step': measured.program.per_step,
        'compile seconds': measured.seconds,
    }


def si(number: float) -> str:
    """A number with a prefix, such as '1.2 T'."""
    scale, prefix = next(((s, p) for s, p in _SI if number >= s), (1.0, ''))
    return f'{number / scale:.3g} {prefix}'


def seconds(time: float) -> str:
    """Seconds as text."""
    return f'{time:.3g} s' if time >= 0.1 else f'{time * 1e3:.3g} ms'
