"""How a stage computes its updates: chosen by the memory of the compiled program, and kept."""

import json
import logging
from collections.abc import Callable, Iterator
from typing import Any

from grpo_jax import sharding
from grpo_jax.engine.compute import Compute, ComputePlan, choose
from grpo_jax.run import hosts
from grpo_jax.run.mesh import is_described
from grpo_jax.run.output_file import replaced
from grpo_jax.run.plan.measuring import memory_needed
from grpo_jax.run.setup import Setup
from grpo_jax.run.stages import Call

FILE = 'compute.json'  # in the run's folder, {stage: plan}

log = logging.getLogger('grpo_jax')


def settle(
    setup: Setup,
    name: str,
    compute: Compute,
    shape: tuple[int, int, int, int],
    call: Callable[[Compute], Call],
) -> ComputePlan:
    """How a stage's updates are computed: as it was in the run before, or chosen and kept.

    The first choice is that of `compute.choose`. Where devices report their memory, its program is
    compiled, and if it does not fit, smaller microbatches are tried: twice at most.

    Args:
      setup: the run.
      name: of the stage.
      compute: options of the config; explicit ones stay as they are.
      shape: (B, G, P, T) of the update's batch.
      call: the call of the update program with other options.
    """
    kept = _read(setup).get(name)
    chosen = choose(compute, setup.model.config, shape, setup.mesh)
    if kept is not None:
        before = ComputePlan(**kept)
        if _is_possible(before, compute, shape, setup):
            return before
        log.warning(
            '%s: updates were computed with %s, which the options or the devices of now do not '
            'allow: they are computed with %s',
            name,
            before,
            chosen,
        )
    memory = sharding.memory_of(setup.mesh.devices.flat[0])
    if memory is not None and compute.microbatch is None:
        chosen = _first_that_fits(_smaller(chosen, shape, setup), call, memory)
    _keep(setup, name, chosen)
    return chosen


def _first_that_fits(
    plans: Iterator[ComputePlan], call: Callable[[Compute], Call], memory: int
) -> ComputePlan:
    """The first plan whose program fits, or the last one."""
    plan = next(plans)
    for smaller in plans:
        needed = memory_needed(call(Compute(*plan)))
        if needed is not None and needed <= memory:
            break
        plan = smaller
    return plan


def _smaller(
    plan: ComputePlan, shape: tuple[int, int, int, int], setup: Setup
) -> Iterator[ComputePlan]:
    """Yields the plan, and the same with a medium and the smallest microbatch."""
    groups, group_size, *_ = shape
    slices = sharding.slices_of(groups, group_size, setup.mesh)
    least = sharding.data_devices(setup.mesh) // slices
    sizes = [n for n in range(least, plan.microbatch, least) if groups % n == 0]
    yield plan
    medium = [n for n in sizes if n * 4 <= plan.microbatch]
    for size in dict.fromkeys([*medium[-1:], *sizes[:1]]):
        yield plan._replace(microbatch=size)


def _is_possible(
    plan: ComputePlan, compute: Compute, shape: tuple[int, int, int, int], setup: Setup
) -> bool:
    """Whether the options allow a plan, and the mesh its microbatch."""
    for name, value in plan._asdict().items():
        if getattr(compute, name) not in (None, value):
            return False
    try:
        sharding.check_batch(shape[0], plan.microbatch, setup.mesh, group_size=shape[1])
    except ValueError:
        return False
    return True


def _read(setup: Setup) -> dict[str, dict[str, Any]]:
    path = setup.workdir / FILE
    if not path.is_file():
        return {}
    plans: dict[str, dict[str, Any]] = json.loads(path.read_text())
    return plans


def _keep(setup: Setup, name: str, plan: ComputePlan) -> None:
    """Writes the plan into the run's folder, if there is one."""
    if is_described() or not hosts.is_first() or not setup.workdir.is_dir():
        return
    plans = _read(setup) | {name: plan._asdict()}
    with replaced(setup.workdir / FILE) as file:
        file.write(json.dumps(plans, indent=2) + '\n')
