"""Compiles programs ahead of time, and reads their memory and work off the result."""

import contextlib
import contextvars
import dataclasses
import math
import re
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax

from grpo_jax import sharding
from grpo_jax.engine.calls import Call
from grpo_jax.run.plan.costs import Costs, Speed, costs_of
from grpo_jax.run.plan.estimate import estimate
from grpo_jax.run.plan.hlo import parse
from grpo_jax.run.plan.programs import Program
from grpo_jax.run.plan.scratch import scratch_bytes
from grpo_jax.run.plan.topology import Topology

# The compiler names either all memory of a program, or that of its temporaries.
_TOO_LARGE = re.compile(r'Used ([\d.]+)([KMGT]) of [\d.]+[KMGT] hbm')
_TEMPORARIES = re.compile(r'required for HLO temporaries \(([\d.]+)([KMGT])\)')
_POWERS = {'K': 2**10, 'M': 2**20, 'G': 2**30, 'T': 2**40}


@dataclasses.dataclass(frozen=True)
class Measured:
    """A program that was compiled, or whose arrays alone are too large.

    Attributes:
      program: what was compiled.
      memory: bytes of a device by what they are for: parts of the state, 'batch and caches' of
        other arguments, 'results' that take no argument's place, and 'temporaries'.
      costs: its work.
      seconds: of its compilation, or that of the same program before.
      too_large: whether the compiler gave up, since it needs more memory than the device has, or
        was not asked, since the arrays alone do.
    """

    program: Program
    memory: dict[str, float]
    costs: Costs = Costs()  # noqa: RUF009
    seconds: float = 0.0
    too_large: bool = False

    @property
    def total(self) -> float:
        """Bytes on a device while it runs."""
        return sum(self.memory.values())


class Compiled(NamedTuple):
    """What the compiler says of a program.

    Attributes:
      arguments: bytes.
      results: bytes that take no argument's place.
      temporaries: bytes, with the program's code and, on CPUs, what products copy.
      costs: its work.
      shardings: of its results.
      seconds: of compilation.
    """

    arguments: float
    results: float
    temporaries: float
    costs: Costs
    shardings: Any
    seconds: float

    @property
    def needed(self) -> float:
        """Bytes of a device while it runs."""
        return self.arguments + self.results + self.temporaries


class TooLarge(NamedTuple):
    """What the compiler says of a program that needs more memory than the device has."""

    needed: float  # bytes
    seconds: float  # of compilation


class Compiler:
    """Compiles programs for a topology, the same program once.

    Args:
      topology: the devices.
      known: what was compiled, by what tells programs apart; shared by plans of changed configs.
      progress: called with a line of text for each program that is compiled.
    """

    def __init__(
        self,
        topology: Topology,
        known: dict[str, Compiled | TooLarge] | None = None,
        progress: Callable[[str], None] = lambda line: None,
    ) -> None:
        chip = topology.chip
        self._speed = None if chip is None else Speed(chip.flops, chip.bandwidth)
        self.topology, self._progress = topology, progress
        self._known = {} if known is None else known
        self._measured: dict[str, Measured] = {}
        self._results: dict[str, Any] = {}

    def measure(self, program: Program) -> Measured:
        """Compiles a program, if it is not compiled.

        Raises:
          TooLargeError: it needs the results of one that does not fit.
        """
        if program.name not in self._measured:
            self._measured[program.name] = self._measure(program)
        return self._measured[program.name]

    def _measure(self, program: Program) -> Measured:
        call = program.call
        parts = {name: bytes_of(tree) for name, tree in program.resident.items()}
        state = {id(leaf) for leaf in jax.tree.leaves(program.resident)}
        leaves = jax.tree.leaves(call.arguments)
        shared = bytes_of([leaf for leaf in leaves if id(leaf) in state])
        others = {'batch and caches': bytes_of(leaves) - shared}
        memory = self.topology.memory
        if memory is not None and sum(parts.values()) + others['batch and caches'] > memory:
            return Measured(program, parts | others, too_large=True)
        compiled = self.compiled(call, program.name, program.columns)
        if isinstance(compiled, TooLarge):
            parts['temporaries'] = max(compiled.needed - shared, 0.0)
            return Measured(program, parts, seconds=compiled.seconds, too_large=True)
        parts |= {
            'batch and caches': max(compiled.arguments - shared, 0.0),
            'results': compiled.results,
            'temporaries': compiled.temporaries,
        }
        return Measured(program, parts, compiled.costs, compiled.seconds)

    def compiled(self, call: Call, name: str, columns: int = 0) -> Compiled | TooLarge:
        """What the compiler says of a call; the same as before if it is known."""
        key = self._key(call)
        if key not in self._known:
            self._known[key] = self._compile(call, name, columns)
        return self._known[key]

    def _compile(self, call: Call, name: str, columns: int) -> Compiled | TooLarge:
        trips = max(columns, 1)
        if self.topology.estimated:
            found = estimate(call, trips, self._speed or Speed())
            return Compiled(bytes_of(call.arguments), *found, seconds=0.0)
        compiled = _compiled(call, trips, self._speed)
        self._progress(
            f'{name}: compiled in {compiled.seconds:.0f} s; CPU time until now: '
            f'{time.process_time():.0f} s'
        )
        return compiled

    def _key(self, call: Call) -> str:
        """What tells a program apart: also the devices, and the shardings of its arguments."""
        shardings = [str(getattr(x, 'sharding', '')) for x in jax.tree.leaves(call.arguments)]
        return ' '.join([self.topology.name, call.digest, *shardings])

    def results(self, program: Program) -> Any:
        """The results of a program, as abstract arrays with the shardings that it gives them.

        Raises:
          TooLargeError: it has none, because it does not fit.
        """
        if self.measure(program).too_large:
            raise TooLargeError(program.name)
        if program.name not in self._results:
            compiled: Any = self._known[self._key(program.call)]
            self._results[program.name] = jax.tree.map(
                lambda x, where: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where),
                shapes_of(program),
                compiled.shardings,
            )
        return self._results[program.name]


def shapes_of(program: Program) -> Any:
    """The results of a program, as abstract arrays without shardings."""
    call = program.call
    return call.program.eval_shape(*call.arguments, **call.options)


_current: contextvars.ContextVar[Compiler | None]
_current = contextvars.ContextVar('compiler', default=None)


@contextlib.contextmanager
def used(compiler: Compiler) -> Iterator[None]:
    """In the block, `memory_needed` asks this compiler, which compiles each program once."""
    token = _current.set(compiler)
    try:
        yield
    finally:
        _current.reset(token)


class TooLargeError(Exception):
    """A program needs the results of one that does not fit."""


def memory_needed(call: Call) -> float | None:
    """Bytes of a device that a program needs; None if the compiler finds that it does not fit."""
    compiler = _current.get()
    compiled = _compiled(call, None) if compiler is None else compiler.compiled(call, call.name)
    return None if isinstance(compiled, TooLarge) else compiled.needed


def _compiled(call: Call, trips: int | None, speed: Speed | None = None) -> Compiled | TooLarge:
    """What the compiler says of a call; its work by `costs_of`, unless `trips` is None."""
    start = time.perf_counter()
    lowered = call.program.trace(*call.arguments, **call.options).lower()
    try:
        compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        used, temporaries = (form.search(str(error)) for form in (_TOO_LARGE, _TEMPORARIES))
        named = used or temporaries
        if named is None:
            raise
        needed = float(named[1]) * _POWERS[named[2]]
        needed += 0 if used else bytes_of(call.arguments)
        return TooLarge(needed, time.perf_counter() - start)
    seconds = time.perf_counter() - start
    analysis, costs, scratch = compiled.memory_analysis(), Costs(), 0.0
    is_cpu = _platform(compiled) == 'cpu'
    if trips is not None or is_cpu:
        module = parse(compiled.as_text())
        costs = costs_of(module, trips=trips or 1, speed=speed)
        scratch = scratch_bytes(module) if is_cpu else 0.0
    temporaries = analysis.temp_size_in_bytes + analysis.generated_code_size_in_bytes
    return Compiled(
        arguments=float(analysis.argument_size_in_bytes),
        results=max(float(analysis.output_size_in_bytes - analysis.alias_size_in_bytes), 0.0),
        temporaries=float(temporaries) + scratch,
        costs=costs,
        shardings=compiled.output_shardings,
        seconds=seconds,
    )


def _platform(compiled: Any) -> str:
    """The platform of a compiled program."""
    (device, *_) = jax.tree.leaves(compiled.output_shardings)[0].device_set
    platform: str = device.platform
    return platform


def bytes_of(tree: Any) -> float:
    """Bytes of abstract arrays on one device, without those in the host's memory."""
    leaves = [leaf for leaf in jax.tree.leaves(tree) if isinstance(leaf, jax.ShapeDtypeStruct)]
    leaves = [x for x in leaves if not x.sharding or x.sharding.memory_kind != sharding.HOST]
    return float(
        sum(
            math.prod(leaf.sharding.shard_shape(leaf.shape) if leaf.sharding else leaf.shape)
            * leaf.dtype.itemsize
            for leaf in leaves
        )
    )
