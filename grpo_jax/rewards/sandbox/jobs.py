"""What is run in sandboxes: programs with tests or inputs, their limits and their results."""

import dataclasses
import math
import operator
from collections.abc import Callable
from typing import TypeAlias

_FILE = 32 * 2**20  # bytes that a program may write to a file, or print
_PROCESSES = 8  # of a program, its threads and the two that start it


@dataclasses.dataclass(frozen=True)
class Limits:
    """What a program may use.

    Attributes:
        seconds: for all of its tests, or for each of its inputs.
        memory: bytes of address space of each process.
    """

    seconds: float
    memory: int

    def resources(self) -> dict[str, int]:
        """Return the limits that the kernel keeps, by their names in `resource`."""
        return {
            'AS': self.memory,
            'CPU': math.ceil(self.seconds) + 1,
            'FSIZE': _FILE,
            'NPROC': _PROCESSES,
            'NOFILE': 64,
            'CORE': 0,
            'MSGQUEUE': 0,
            'MEMLOCK': 0,
        }


@dataclasses.dataclass(frozen=True)
class Tests:
    """A program and the source of its tests; see `inside.checker.check`."""

    program: str
    test: str
    prefix: str = ''
    entry_point: str = ''
    partial: bool = False


@dataclasses.dataclass(frozen=True)
class Inputs:
    """A program, the texts that it reads, and those that it has to print.

    Attributes:
        program: source.
        inputs: standard input of each case.
        outputs: what is expected of each case.
        same: whether what was printed is what was expected.
        partial: go on after a case that failed. A case that takes too long is the last one.
    """

    program: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    same: Callable[[str, str], bool] = operator.eq
    partial: bool = False


@dataclasses.dataclass(frozen=True)
class Result:
    """How many cases there are, how many passed, and what went wrong.

    Attributes:
        passed: cases that passed.
        cases: all cases.
        error: why others did not, or ''.
        timeout: whether the program was ended after its time.
        output: what it printed in the last case, if that ended without an error.
    """

    passed: int
    cases: int
    error: str = ''
    timeout: bool = False
    output: str | None = None


Job: TypeAlias = Tests | Inputs
