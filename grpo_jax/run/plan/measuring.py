"""Compiles programs ahead of time, and reads their memory and work off the result."""

import dataclasses
import math
import re
import time
from typing import Any, NamedTuple

import jax

from grpo_jax.run.plan.costs import Costs, Speed, costs_of
from grpo_jax.run.plan.hlo import parse
from grpo_jax.run.plan.programs import Program
from grpo_jax.run.plan.topology import Topology
from grpo_jax.run.stages import Call

# The compiler names either all memory of a program, or that of its temporaries.
_TOO_LARGE = re.compile(r'Used ([\d.]+)([KMGT]) of [\d.]+[KMGT] hbm')
_TEMPORARIES = re.compile(r'required for HLO temporaries \(([\d.]+)([KMGT])\)')
_POWERS = {'K': 2**10, 'M': 2**20, 'G': 2**30, 'T': 2**40}


@dataclasses.dataclass(frozen=True)
class Measured:
    """A compiled program.

    Attributes:
      program: what was compiled.
      memory: bytes of a device by what they are for: parts of the state, 'batch and caches' of
        other arguments, 'results' that take no argument's place, and 'temporaries'.
      costs: its work.
      seconds: of compilation.
      too_large: whether the compiler gave up, since it needs more memory than the device has.
    """

    program: Program
    memory: dict[str, float]
    costs: Costs
    seconds: float
    too_large: bool = False

    @property
    def total(self) -> float:
        """Bytes on a device while it runs."""
        return sum(self.memory.values())


class Compiler:
    """Compiles programs for a topology; remembers what it has compiled."""

    def __init__(self, topology: Topology) -> None:
        chip = topology.chip
        self._speed = None if chip is None else Speed(chip.flops, chip.bandwidth)
        self._compiled: dict[str, Any] = {}

    def measure(self, program: Program) -> Measured:
        """Compiles a program."""
        call, start = program.call, time.perf_counter()
        parts = {name: bytes_of(tree) for name, tree in program.resident.items()}
        state = {id(leaf) for leaf in jax.tree.leaves(program.resident)}
        arguments = [leaf for leaf in jax.tree.leaves(call.arguments) if id(leaf) in state]
        shared = bytes_of(arguments)
        compiled = _compile(call)
        seconds = time.perf_counter() - start
        if isinstance(compiled, TooLarge):
            parts['temporaries'] = max(compiled.needed - shared, 0.0)
            return Measured(program, parts, Costs(), seconds, too_large=True)
        self._compiled[program.name] = compiled
        analysis = compiled.memory_analysis()
        parts |= {
            'batch and caches': max(float(analysis.argument_size_in_bytes) - shared, 0.0),
            'results': _result_bytes(analysis),
            'temporaries': _temporary_bytes(analysis),
        }
        trips = max(program.columns, 1)
        costs = costs_of(parse(compiled.as_text()), trips=trips, speed=self._speed)
        return Measured(program, parts, costs, seconds)

    def results(self, program: Program) -> Any:
        """The results of a program, as abstract arrays with the shardings that it gives them.

        Raises:
          TooLargeError: it has none, because it does not fit.
        """
        if program.name not in self._compiled and self.measure(program).too_large:
            raise TooLargeError(program.name)
        compiled, call = self._compiled[program.name], program.call
        shapes = call.program.eval_shape(*call.arguments, **call.options)
        return jax.tree.map(
            lambda x, where: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where),
            shapes,
            compiled.output_shardings,
        )


class TooLargeError(Exception):
    """A program needs the results of one that does not fit."""


class TooLarge(NamedTuple):
    """What the compiler says of a program that needs more memory than the device has."""

    needed: float  # bytes


def memory_needed(call: Call) -> float | None:
    """Bytes of a device that a program needs; None if the compiler finds that it does not fit."""
    compiled = _compile(call)
    if isinstance(compiled, TooLarge):
        return None
    analysis = compiled.memory_analysis()
    arguments = float(analysis.argument_size_in_bytes)
    return arguments + _result_bytes(analysis) + _temporary_bytes(analysis)


def _compile(call: Call) -> Any:
    """The compiled program, or `TooLarge`."""
    lowered = call.program.trace(*call.arguments, **call.options).lower()
    try:
        return lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        used, temporaries = (form.search(str(error)) for form in (_TOO_LARGE, _TEMPORARIES))
        named = used or temporaries
        if named is None:
            raise
        needed = float(named[1]) * _POWERS[named[2]]
        return TooLarge(needed if used else needed + bytes_of(call.arguments))


def _result_bytes(analysis: Any) -> float:
    """Bytes of results that take no argument's place."""
    return max(float(analysis.output_size_in_bytes - analysis.alias_size_in_bytes), 0.0)


def _temporary_bytes(analysis: Any) -> float:
    return float(analysis.temp_size_in_bytes + analysis.generated_code_size_in_bytes)


def bytes_of(tree: Any) -> float:
    """Bytes of abstract arrays on one device."""
    leaves = [leaf for leaf in jax.tree.leaves(tree) if isinstance(leaf, jax.ShapeDtypeStruct)]
    return float(
        sum(
            math.prod(leaf.sharding.shard_shape(leaf.shape) if leaf.sharding else leaf.shape)
            * leaf.dtype.itemsize
            for leaf in leaves
        )
    )
