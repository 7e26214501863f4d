"""How a stage computes its updates: chosen by the memory of the compiled program, and kept."""

import json
import logging
import pathlib
import sys
from collections.abc import Callable, Collection
from typing import Any, NamedTuple

from grpo_jax import sharding
from grpo_jax.engine.bundles import check_rows
from grpo_jax.engine.calls import Call
from grpo_jax.engine.compute import Compute, ComputePlan, alternatives, choose
from grpo_jax.run import hosts
from grpo_jax.run.errors import reading
from grpo_jax.run.mesh import is_described, memory_of
from grpo_jax.run.output_file import replaced
from grpo_jax.run.plan.measuring import memory_needed
from grpo_jax.run.plan.topology import gib
from grpo_jax.run.setup import Setup

FILE = 'compute.json'  # in the run's folder, {stage: plan and bytes}
HEADROOM = 0.05  # share of the memory that stays free, for batches that are prepared and gaps

log = logging.getLogger('grpo_jax')


class Settled(NamedTuple):
    """How updates are computed.

    Attributes:
      plan: the options.
      needed: bytes of a device that the compiled update needs; None if they are not known, because
        devices do not report their memory or because the compiler found that it does not fit.
    """

    plan: ComputePlan
    needed: float | None = None


def settle(
    setup: Setup,
    name: str,
    compute: Compute,
    shape: tuple[int, int, int, int],
    call: Callable[[ComputePlan], Call],
    *,
    fixed: Collection[str] = (),
    memory: float | None = None,
) -> ComputePlan:
    """How a stage's updates are computed: as it was in the run before, or chosen and kept.

    Where devices do not report their memory, it is what `compute.choose` says. Where they do, it is
    the first of `compute.alternatives` whose compiled program leaves `HEADROOM` of it free. The
    first one is compiled, and if it does not fit, the others are searched by bisection, since each
    needs less memory than the one before. The last one is chosen if none fits, with a warning.

    Args:
      setup: the run.
      name: of the stage.
      compute: options of the config; explicit ones stay as they are.
      shape: (B, G, P, T) of the update's batch.
      call: the call of the update program by a plan.
      fixed: options that have no effect on the program, or that it does not allow to change.
      memory: bytes of a device; None: what it reports, or `mesh.described` says.
    """
    if memory is None:
        memory = memory_of(setup.mesh)
    # What the first process sees, since the others compile the programs that it compiles.
    kept, memory = hosts.from_first(
        lambda: (_read(setup.workdir).get(name), memory), f'reading {FILE}'
    )
    config, mesh = setup.model.config, setup.mesh
    if kept is not None:
        before = Settled(ComputePlan(**kept['plan']), kept['needed'])
        if _is_possible(before.plan, compute, shape, setup):
            if memory is not None:
                _warn_of_memory(name, before, memory)
            return before.plan
        log.warning(
            '%s: updates were computed with %s, which the options or the devices of now do not '
            'allow',
            name,
            before.plan,
        )
    chosen = Settled(choose(compute, config, shape, mesh))
    if memory is not None:
        plans = _varied(alternatives(compute, config, shape, mesh), fixed)
        chosen = _first_that_fits(plans, call, (1 - HEADROOM) * memory)
        if chosen.needed is not None:
            text = f'{name}: an update needs {gib(chosen.needed)} of {gib(memory)} on a device'
            if is_described():  # by `plan`, whose output is the plan
                print(text, file=sys.stderr)
            else:
                hosts.say(text)
        if chosen.needed is None or chosen.needed > memory:
            log.warning(
                '%s: an update does not fit into the %s of a device, also with %s: use more '
                'devices, a smaller batch or shorter completions; '
                '`python -m grpo_jax.plan` prints what makes it fit',
                name,
                gib(memory),
                chosen.plan,
            )
    _keep(setup, name, chosen)
    return chosen.plan


def _warn_of_memory(name: str, settled: Settled, memory: float) -> None:
    """Says that a resumed run, which computes as before, may need more memory than there is."""
    if settled.needed is not None and settled.needed > memory:
        log.warning(
            '%s: updates are computed as before, with %s, which needed %s of a device, and these '
            'have %s: resume on devices with more memory, or on more of them',
            name,
            settled.plan,
            gib(settled.needed),
            gib(memory),
        )


def _varied(plans: list[ComputePlan], fixed: Collection[str]) -> list[ComputePlan]:
    """The plans that differ in more than what is fixed."""
    unchanged = {option: getattr(plans[0], option) for option in fixed}
    return list(dict.fromkeys(plan._replace(**unchanged) for plan in plans))


def _first_that_fits(
    plans: list[ComputePlan], call: Callable[[ComputePlan], Call], memory: float
) -> Settled:
    """The first plan whose program fits, or the last one."""

    def measured(plan: ComputePlan) -> Settled:
        return Settled(plan, memory_needed(call(plan)))

    def fits(settled: Settled) -> bool:
        return settled.needed is not None and settled.needed <= memory

    found = measured(plans[0])
    if fits(found) or len(plans) == 1:
        return found
    best, low, high = None, 1, len(plans) - 1
    while low < high:
        middle = (low + high) // 2
        found = measured(plans[middle])
        if fits(found):
            best, high = found, middle
        else:
            low = middle + 1
    return best if best is not None and best.plan == plans[low] else measured(plans[low])


def _is_possible(
    plan: ComputePlan, compute: Compute, shape: tuple[int, int, int, int], setup: Setup
) -> bool:
    """Whether the options allow a plan, and the mesh its microbatch and its rows."""
    for name, value in plan._asdict().items():
        if getattr(compute, name) not in (None, value):
            return False
    try:
        sharding.check_batch(shape[0], plan.microbatch, setup.mesh, group_size=shape[1])
        check_rows(plan.rows, plan.microbatch * shape[1], setup.mesh)
    except ValueError:
        return False
    return True


def _read(workdir: pathlib.Path) -> dict[str, dict[str, Any]]:
    path = workdir / FILE
    if not path.is_file():
        return {}
    with reading(path, 'restore it, or remove it to choose again, which may round differently'):
        plans: dict[str, dict[str, Any]] = json.loads(path.read_bytes())
        for kept in plans.values():
            _check_kept(**kept)
    return plans


def _check_kept(plan: dict[str, Any], needed: float | None) -> None:
    """Checks the types of what the file holds of a stage."""
    for name, value in ComputePlan(**plan)._asdict().items():
        kind = ComputePlan.__annotations__[name]
        if type(value) is not kind or value < 0:
            raise TypeError(f'{name}={value!r}')
    if not isinstance(needed, int | float | None):
        raise TypeError(f'needed={needed!r}')


def _keep(setup: Setup, name: str, settled: Settled) -> None:
    """Writes the plan and what it needs into the run's folder, if there is one."""
    if is_described() or not hosts.is_first() or not setup.workdir.is_dir():
        return
    kept = {'plan': settled.plan._asdict(), 'needed': settled.needed}
    with replaced(setup.workdir / FILE) as file:
        file.write(json.dumps(_read(setup.workdir) | {name: kept}, indent=2) + '\n')
