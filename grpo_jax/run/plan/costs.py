"""The work of a compiled program: FLOPs, bytes and collectives, with the trips of its loops.

`cost_analysis()` counts the body of a loop once; layers, microbatches and chunks of logits are all
loops here. So the text of the compiled program is read: what a loop's body costs is multiplied by
its trips, of the branches of a conditional the most expensive one counts, and a fusion reads its
operands and writes its result once. All numbers are of one device.
"""

import dataclasses
import math
import re

from grpo_jax.run.plan.hlo import Computation, Instruction, Module
from grpo_jax.run.plan.work import bytes_moved, flops_of

COLLECTIVES = (
    'all-gather', 'all-reduce', 'reduce-scatter', 'all-to-all', 'collective-permute',
    'ragged-all-to-all',
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Collectives:
    """Collectives of one kind."""

    count: float = 0.0
    bytes: float = 0.0  # that leave a device, in rings


@dataclasses.dataclass(frozen=True)
class Costs:
    """The work of one device.

    Attributes:
      flops: of matrix products and convolutions, and of attention kernels as if they skipped
        nothing.
      bytes: read from and written to the main memory.
      seconds: the sum over instructions of the longer of both, see `Speed`.
      collectives: by kind.
      unknown_loops: how many loops had trips that depend on data.
    """

    flops: float = 0.0
    bytes: float = 0.0
    seconds: float = 0.0
    collectives: dict[str, Collectives] = dataclasses.field(default_factory=dict)
    unknown_loops: int = 0

    def __add__(self, other: 'Costs') -> 'Costs':
        kinds = {*self.collectives, *other.collectives}
        return Costs(
            self.flops + other.flops,
            self.bytes + other.bytes,
            self.seconds + other.seconds,
            {kind: _sum(self.collectives.get(kind), other.collectives.get(kind)) for kind in kinds},
            self.unknown_loops + other.unknown_loops,
        )

    def __mul__(self, times: float) -> 'Costs':
        kinds = self.collectives.items()
        return Costs(
            self.flops * times,
            self.bytes * times,
            self.seconds * times,
            {kind: Collectives(x.count * times, x.bytes * times) for kind, x in kinds},
            self.unknown_loops,
        )

    @property
    def traffic(self) -> float:
        """Bytes that leave a device in collectives."""
        return sum(x.bytes for x in self.collectives.values())


@dataclasses.dataclass(frozen=True)
class Speed:
    """What a device can do in a second: FLOPs, and bytes of its main memory."""

    flops: float = math.inf
    bandwidth: float = math.inf


def costs_of(module: Module, *, trips: int = 1, speed: Speed | None = None) -> Costs:
    """The work of one run of a program.

    Args:
      module: the program.
      trips: of a loop whose trips depend on data, such as that of decoding.
      speed: of the device; None: seconds are 0.
    """
    return _Counter(module, trips, speed or Speed()).of(module.entry)


class _Counter:
    def __init__(self, module: Module, trips: int, speed: Speed) -> None:
        self.module, self.trips, self.speed = module, trips, speed
        self._known: dict[str, Costs] = {}

    def of(self, name: str) -> Costs:
        """The work of a computation."""
        if name not in self._known:
            computation = self.module.computations[name]
            total = Costs()
            for instruction in computation:
                total += self._of_instruction(computation, instruction)
            self._known[name] = total
        return self._known[name]

    def _of_instruction(self, computation: Computation, instruction: Instruction) -> Costs:
        if instruction.opcode == 'while':
            trips = self.module.trips(instruction)
            bodies = sum(map(self.of, instruction.called), Costs())
            if trips is None:
                return bodies * self.trips + Costs(unknown_loops=1)
            return bodies * trips
        if instruction.branches:
            return max(map(self.of, instruction.branches), key=lambda x: (x.flops, x.bytes))
        if instruction.opcode in ('call', 'async-start'):
            return sum(map(self.of, instruction.called), Costs())
        own = self._own(computation, instruction)
        moved = bytes_moved(self.module, computation, instruction)
        seconds = max(own.flops / self.speed.flops, moved / self.speed.bandwidth)
        return own + Costs(bytes=moved, seconds=seconds)

    def _own(self, computation: Computation, instruction: Instruction) -> Costs:
        """FLOPs and collectives, also of what is fused into the instruction."""
        kind = instruction.opcode.removesuffix('-start')
        if kind in COLLECTIVES:
            return Costs(
                collectives={kind: Collectives(1, _traffic(kind, computation, instruction))}
            )
        total = Costs(flops=flops_of(computation, instruction))
        if instruction.opcode != 'fusion':
            return total
        for name in instruction.called:
            inner = self.module.computations[name]
            for fused in inner:
                total += self._own(inner, fused)
        return total


def _traffic(kind: str, computation: Computation, instruction: Instruction) -> float:
    """Bytes that one device sends, in rings over the devices of its group."""
    size = _group_size(instruction.attributes)
    given = sum(computation[name].bytes for name in instruction.operands)
    made = max(instruction.bytes - given, 0) if instruction.opcode.endswith('-start') else 0
    made = made or instruction.bytes
    if kind == 'all-gather':
        return max(made, given) * (size - 1) / size
    if kind == 'all-reduce':
        return 2.0 * given * (size - 1) / size
    if kind == 'collective-permute':
        return float(given)
    return given * (size - 1) / size


def _group_size(attributes: str) -> int:
    """Devices of a collective's group, from one of the three ways to write groups."""
    listed = re.search(r'replica_groups=\{\{([\d,]*)\}', attributes)
    if listed:
        return len(listed[1].split(','))
    counted = re.search(r'replica_groups=\[\d+,(\d+)\]', attributes)
    if counted:
        return int(counted[1])
    named = re.search(r'replica_groups=mesh\[([^\]]*)\]\s*\{([^}]*)\}', attributes)
    if named:
        sizes = dict(re.findall(r"'(\w+)'=(\d+)", named[1]))
        return math.prod(int(sizes[axis]) for axis in re.findall(r"'(\w+)'", named[2]))
    return 2


def _sum(a: Collectives | None, b: Collectives | None) -> Collectives:
    parts = [x for x in (a, b) if x is not None]
    return Collectives(sum(x.count for x in parts), sum(x.bytes for x in parts))
