"""A compiled program's text (HLO), parsed: its computations and their instructions."""

import dataclasses
import functools
import math
import re
from collections.abc import Iterator

_BITS = re.compile(r'[a-z]+(\d+)')
_ARRAY = re.compile(r'([a-z]\w*)\[([\d,]*)\](\{[^}]*\})?')
_HEAD = re.compile(r'^(?:ENTRY )?%?([^\s(]+) \(.*\{$')
_INSTRUCTION = re.compile(r'^\s+(?:ROOT )?%?(\S+) = ')
_OPCODE = re.compile(r'\s*([\w-]+)\(')
_NAME = re.compile(r'%([\w.-]+)')
_CALLED = re.compile(
    r'(?:calls|to_apply|body|true_computation|false_computation|async_execution_thread_body)='
    r'%?([\w.-]+)'
)
_CONDITION = re.compile(r'condition=%?([\w.-]+)')
_BRANCHES = re.compile(r'branch_computations=\{([^}]*)\}')
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')


@dataclasses.dataclass(frozen=True)
class Array:
    """The type of an array."""

    dtype: str
    shape: tuple[int, ...]
    near: bool = False  # in the memory on the chip (VMEM) instead of the main memory

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def bytes(self) -> int:
        """Bytes of its elements."""
        match = _BITS.match(self.dtype)
        bits = 8 if self.dtype == 'pred' else int(match[1]) if match else 0
        return -(-self.size * bits // 8)


@dataclasses.dataclass(frozen=True)
class Instruction:
    """An instruction.

    Attributes:
      name: unique in its computation.
      opcode: such as 'fusion'.
      arrays: the arrays of its result.
      operands: names of instructions of the same computation.
      attributes: the rest of its text.
      literal: what is inside of its parentheses, the number of a constant or parameter.
      root: whether it is the computation's result.
    """

    name: str
    opcode: str
    arrays: tuple[Array, ...]
    operands: tuple[str, ...]
    attributes: str
    literal: str
    root: bool

    @property
    def bytes(self) -> int:
        """Bytes of its result."""
        return sum(array.bytes for array in self.arrays)

    @functools.cached_property
    def called(self) -> tuple[str, ...]:
        """The computations that it runs once, without those of `branches`."""
        return tuple(_CALLED.findall(self.attributes))

    @functools.cached_property
    def branches(self) -> tuple[str, ...]:
        """The computations of which it runs one."""
        if self.opcode != 'conditional':
            return ()
        listed = _BRANCHES.search(self.attributes)
        return tuple(_NAME.findall(listed[1])) if listed else self.called


class Computation:
    """The instructions of one computation, by name and in order."""

    def __init__(self) -> None:
        self.instructions: dict[str, Instruction] = {}

    def __iter__(self) -> Iterator[Instruction]:
        return iter(self.instructions.values())

    def __getitem__(self, name: str) -> Instruction:
        return self.instructions[name]

    @functools.cached_property
    def users(self) -> dict[str, list[Instruction]]:
        """The instructions that have an instruction as an operand."""
        users: dict[str, list[Instruction]] = {name: [] for name in self.instructions}
        for instruction in self:
            for name in dict.fromkeys(instruction.operands):
                users[name].append(instruction)
        return users

    @functools.cached_property
    def root(self) -> Instruction:
        """The instruction whose result is the computation's."""
        return next(instruction for instruction in self if instruction.root)

    @functools.cached_property
    def parameters(self) -> dict[int, Instruction]:
        """The parameters by number."""
        return {int(x.literal): x for x in self if x.opcode == 'parameter'}


@dataclasses.dataclass(frozen=True)
class Module:
    """A program.

    Attributes:
      computations: by name.
      entry: name of the one that is run.
    """

    computations: dict[str, Computation]
    entry: str

    def trips(self, loop: Instruction) -> int | None:
        """How often a while loop runs its body; None if that depends on data.

        The compiler may have written it down. Otherwise it is known where the condition compares
        an element of the carry, which counts from 0 in steps of 1, with a constant.
        """
        known = _TRIPS.search(loop.attributes)
        if known:
            return int(known[1])
        name = _CONDITION.search(loop.attributes)
        if name is None:
            return None
        compared = self._comparison(self.computations[name[1]])
        if compared is None:
            return None
        counter, limit = compared
        if counter.opcode != 'get-tuple-element' or limit.opcode != 'constant':
            return None
        return int(limit.literal) if limit.literal.isdigit() else None

    def _comparison(self, condition: Computation) -> tuple[Instruction, Instruction] | None:
        """The two sides of the condition `a < b`, through a fusion; None for another condition."""
        root = condition.root
        if root.opcode == 'fusion':
            inner = self.computations[root.called[0]]
            compare = inner.root
            sides = []
            for operand in compare.operands if compare.opcode == 'compare' else ():
                side = inner[operand]
                is_parameter = side.opcode == 'parameter'
                sides.append(condition[root.operands[int(side.literal)]] if is_parameter else side)
        else:
            compare, sides = root, [condition[operand] for operand in root.operands]
        is_less = compare.opcode == 'compare' and 'direction=LT' in compare.attributes
        return (sides[0], sides[1]) if is_less and len(sides) == 2 else None


def parse(text: str) -> Module:
    """Parses what `compiled.as_text()` returns.

    Raises:
      ValueError: the text has no entry computation.
    """
    computations: dict[str, Computation] = {}
    entry, current = '', Computation()
    lines = iter(text.splitlines())
    for line in _joined(lines):
        head = _HEAD.match(line)
        if head:
            current = computations.setdefault(head[1], Computation())
            entry = head[1] if line.startswith('ENTRY') else entry
        elif match := _INSTRUCTION.match(line):
            instruction = _instruction(match[1], line[match.end() :], 'ROOT ' in match[0])
            current.instructions[instruction.name] = instruction
    if not entry:
        raise ValueError('the text of the compiled program has no entry computation')
    return Module(computations, entry)


def _joined(lines: Iterator[str]) -> Iterator[str]:
    """Joins the lines of an instruction whose attributes have line breaks."""
    pending = ''
    for line in lines:
        starts = _INSTRUCTION.match(line) or _HEAD.match(line) or line.startswith('}')
        if starts and pending:
            yield pending
            pending = ''
        pending = line if starts or not pending else f'{pending} {line}'
    if pending:
        yield pending


def _instruction(name: str, text: str, root: bool) -> Instruction:
    """Parses `type opcode(operands), attributes`."""
    end = _closing(text, 0) if text.startswith('(') else text.index(' ')
    kind, rest = text[:end], text[end:]
    opcode = _OPCODE.match(rest)
    if opcode is None:
        raise ValueError(f'an instruction of the compiled program has no opcode: {name} = {text}')
    close = _closing(rest, opcode.end() - 1)
    inside = rest[opcode.end() : close - 1]
    has_operands = opcode[1] not in ('parameter', 'constant')
    operands = tuple(_NAME.findall(inside)) if has_operands else ()
    return Instruction(name, opcode[1], _arrays(kind), operands, rest[close:], inside, root)


def _closing(text: str, start: int) -> int:
    """The index after the parenthesis that closes the one at `start`."""
    depth = 0
    for i in range(start, len(text)):
        depth += (text[i] == '(') - (text[i] == ')')
        if not depth:
            return i + 1
    return len(text)


def _arrays(kind: str) -> tuple[Array, ...]:
    return tuple(
        Array(dtype, tuple(map(int, filter(None, dims.split(',')))), 'S(1)' in layout)
        for dtype, dims, layout in _ARRAY.findall(kind)
    )
