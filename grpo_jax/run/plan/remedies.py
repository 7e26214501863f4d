"""Changes that make a run fit, each compiled, the cheapest first."""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from grpo_jax.run.config import set_value
from grpo_jax.run.defaults import at
from grpo_jax.run.errors import ConfigError
from grpo_jax.run.plan.planning import Plan, make_plan
from grpo_jax.run.plan.topology import Topology, find_topology

_WANTED, _TRIED = 3, 8  # changes to find, and most changes to compile


class Change(NamedTuple):
    """A change of a run: values of config keys, or other devices."""

    values: dict[str, Any]
    topology: str = ''

    def __str__(self) -> str:
        values = [f'--config.{key}={value}' for key, value in self.values.items()]
        return ' '.join([*values, *([f'--topology={self.topology}'] if self.topology else [])])


class Remedy(NamedTuple):
    """A change with which what did not fit does."""

    change: Change
    needed: float  # bytes on a device


def find_remedies(
    config: ConfigDict,
    plan: Plan,
    workdir: str = '',
    progress: Callable[[str], None] = lambda line: None,
    known: dict[str, Any] | None = None,
) -> Iterator[Remedy]:
    """Yields the cheapest changes that make a plan fit, at most three of them.

    Only the programs that do not fit, or need one that does not, are compiled again. A change that
    the config's checks refuse is left out.

    Args:
      config: of the plan.
      plan: one that does not fit.
      workdir: where data sets are kept.
      progress: called with a line of text for each change and each program that is compiled.
      known: what was compiled for the plan, see `make_plan`.
    """
    known = {} if known is None else known
    failing = {measured.program.kind for measured in plan.too_large()}
    failing |= {kind for stage in plan.stages for kind in stage.skipped}
    found = tried = 0
    for change in _changes(config, plan, failing):
        if found == _WANTED or tried == _TRIED:
            return
        tried += 1
        progress(f'trying {change}')
        topology = plan.topology
        if change.topology:
            other = find_topology(change.topology)
            topology = other._replace(memory=topology.memory, limited=topology.limited)
        try:
            changed = make_plan(
                with_values(config, change.values), topology, workdir,
                only=failing, progress=progress, known=known,
            )  # fmt: skip
        except (ConfigError, ValueError):
            continue
        if not changed.measured or any(stage.skipped for stage in changed.stages):
            continue
        if changed.fits:
            found += 1
            yield Remedy(change, changed.peak.total)


def with_values(config: ConfigDict, values: dict[str, Any]) -> ConfigDict:
    """A copy of a config with other values of some keys."""
    config = config.copy_and_resolve_references()
    for key, value in values.items():
        set_value(config, key, value)
    return config


def _changes(config: ConfigDict, plan: Plan, failing: set[str]) -> Iterator[Change]:
    """Yields changes by what they cost: time, memory elsewhere, another batch, more devices."""
    free = _changes_of_speed(config, plan, failing)
    for key, value in free.items():
        yield Change({key: value})
    if len(free) > 1:
        yield Change(free)
    evaluations = [name for name in failing if ': evaluation' in name]
    if evaluations and config.eval.batch_size > 1:
        yield Change({'eval.batch_size': max(1, config.eval.batch_size // 4)})
    if any('sampler' in kind for kind in failing):
        yield Change({'mesh.sampling_tensor': plan.mesh['sampling_tensor'] * 2})
    tensor = plan.mesh['tensor'] * 2
    if tensor <= len(plan.topology.devices):
        yield Change(free | {'mesh.fsdp': -1, 'mesh.tensor': tensor})
    if config.model.param_dtype == 'float32':
        yield Change({'model.param_dtype': 'bfloat16'})
    if any('sampler' in kind for kind in failing) and config.grpo.batch_size > 1:
        yield Change({'grpo.batch_size': config.grpo.batch_size // 2})
    for larger in _larger(plan.topology):
        yield Change({'mesh.fsdp': -1}, larger)


def _changes_of_speed(config: ConfigDict, plan: Plan, failing: set[str]) -> dict[str, Any]:
    """Keys with which the same is computed with less memory, in more time."""
    keys: dict[str, Any] = {}
    for stage in plan.stages:
        name = stage.stage.name.partition('-')[0]
        if f'{stage.stage.name}: update' not in failing:
            continue
        section = {'reward': 'reward_model.', 'sft': 'sft.', 'grpo': 'grpo.compute.'}[name]
        least = _least_microbatch(plan, stage.stage.shape)
        if at(config, f'{section}microbatch') != least:
            keys[f'{section}microbatch'] = least
        if config.model.remat is False:
            keys['model.remat'] = True
        if name == 'grpo' and config.grpo.compute.logprob_chunk != 32:
            keys['grpo.compute.logprob_chunk'] = 32
    return keys


def _least_microbatch(plan: Plan, shape: tuple[int, int, int, int]) -> int:
    """The fewest groups that the mesh can compute at a time."""
    by_group, by_completion = plan.mesh['groups'], plan.mesh['completions']
    return by_group if shape[1] % by_completion == 0 else by_group * by_completion


def _larger(topology: Topology) -> Iterator[str]:
    """Yields slices of two, four and eight times as many devices."""
    kind, _, sizes = topology.name.partition(':')
    shape = [int(size) for size in sizes.split('x')] if sizes else []
    for _ in range(3 if all(shape) and shape else 0):
        smallest = shape.index(min(shape))
        shape[smallest] *= 2
        yield f'{kind}:{"x".join(map(str, sorted(shape)))}'
