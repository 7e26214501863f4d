"""What one instruction of a compiled program does: FLOPs, and bytes of the main memory."""

import functools
import math
import re
from collections.abc import Iterator
from typing import NamedTuple

from grpo_jax.run.plan.hlo import Array, Computation, Instruction, Module

# Instructions that move nothing by themselves, or whose bodies are counted.
_FREE = {
    'parameter', 'constant', 'tuple', 'get-tuple-element', 'bitcast', 'while', 'conditional',
    'call', 'after-all', 'partition-id', 'replica-id', 'opt-barrier', 'copy-done', 'async-start',
    'async-update', 'async-done', 'iota', 'domain', 'custom-call-done', 'slice-done',
}  # fmt: skip
_SLICES = {'dynamic-slice', 'slice', 'gather'}
# Products of queries and keys in the kernels of splash attention: forward, and two backward.
_KERNEL_PRODUCTS = {'mha_fwd': 2, 'mha_dq': 3, 'mha_dkv': 4}
# Products of rows with the matrices of their experts, and the gradient of these matrices.
_EXPERT_KERNELS = ('ragged-dot-none', 'tgmm')


def flops_of(computation: Computation, instruction: Instruction) -> float:
    """FLOPs of a matrix product, a convolution or a kernel; those of others count as 0."""
    operands = [computation[name] for name in instruction.operands]
    if instruction.opcode == 'dot':
        summed = numbers(instruction.attributes, 'lhs_contracting_dims')
        lhs = operands[0].arrays[0].shape
        return 2.0 * instruction.arrays[0].size * math.prod(lhs[axis] for axis in summed)
    if instruction.opcode == 'convolution':
        return _convolution_flops(instruction, *(x.arrays[0].shape for x in operands[:2]))
    if instruction.opcode == 'custom-call':
        return _custom_flops(instruction, operands)
    return 0.0


def _convolution_flops(
    instruction: Instruction, lhs: tuple[int, ...], rhs: tuple[int, ...]
) -> float:
    """2 x the pairs of an input and a kernel element that are multiplied.

    TPUs write matrix products as convolutions, batch axes as spatial ones whose padding is never
    multiplied; so only pairs inside of the input count.
    """
    labels = re.search(r'dim_labels=(\w+)_(\w+)->(\w+)', instruction.attributes)
    if labels is None:
        return 0.0
    out = instruction.arrays[0].shape
    spatial = sorted(set(labels[1]) - set('bf'))
    windows = _windows(instruction.attributes, len(spatial))
    pairs = 1
    for axis, window in zip(spatial, windows, strict=True):
        sizes = lhs[labels[1].index(axis)], out[labels[3].index(axis)]
        pairs *= _valid_pairs(*sizes, window)
    batch_groups = _number(instruction.attributes, 'batch_group_count')
    batch = lhs[labels[1].index('b')] / batch_groups
    return 2.0 * pairs * batch * rhs[labels[2].index('i')] * rhs[labels[2].index('o')]


class _Window(NamedTuple):
    """How a convolution moves along one axis."""

    size: int  # of the kernel
    stride: int
    pad: int  # before the input
    dilation: int  # of the input
    kernel_dilation: int


def _windows(attributes: str, axes: int) -> list[_Window]:
    """The window along each spatial axis."""
    text = re.search(r'window=\{([^}]*)\}', attributes)
    fields = dict(re.findall(r'(\w+)=(\S+)', text[1])) if text else {}

    def of(name: str, default: int) -> list[int]:
        values = fields[name].split('x') if name in fields else [str(default)] * axes
        return [int(value.split('_')[0]) for value in values]

    columns = of('size', 1), of('stride', 1), of('pad', 0), of('lhs_dilate', 1), of('rhs_dilate', 1)
    return [_Window(*values) for values in zip(*columns, strict=True)]


@functools.cache
def _valid_pairs(given: int, made: int, window: _Window) -> int:
    """Pairs of an output position and a kernel position that read an element of the input."""
    last, count = (given - 1) * window.dilation, 0
    for k in range(window.size):
        offset = k * window.kernel_dilation - window.pad
        if window.stride == window.dilation == 1:
            count += max(0, min(made, given - offset) - max(0, -offset))
            continue
        places = (offset + o * window.stride for o in range(made))
        count += sum(0 <= place <= last and place % window.dilation == 0 for place in places)
    return count


def _custom_flops(instruction: Instruction, operands: list[Instruction]) -> float:
    """Of kernels of attention and experts, and of products by a library; others count as 0."""
    if 'matmul' in instruction.attributes and len(operands) > 1:  # oneDNN's, of CPUs
        return 2.0 * instruction.arrays[0].size * operands[0].arrays[0].shape[-1]
    if any(name in instruction.name for name in _EXPERT_KERNELS):
        rows, other = (x.arrays[0] for x in operands[-2:])
        return 2.0 * rows.size * other.shape[-1]
    products = next((n for name, n in _KERNEL_PRODUCTS.items() if name in instruction.name), 0)
    wide = [x.arrays[0] for x in operands if x.arrays and _is_wide(x.arrays[0])]
    if not products or len(wide) < 2:
        return 0.0
    queries, keys = wide[:2]
    return 2.0 * products * queries.size * keys.shape[-2]


def _is_wide(array: Array) -> bool:
    """Whether an operand of an attention kernel is queries, keys or values."""
    return len(array.shape) >= 3 and array.dtype in ('bf16', 'f16', 'f32')


def numbers(attributes: str, name: str) -> list[int]:
    """The numbers of an attribute such as `lhs_contracting_dims={1,2}`."""
    match = re.search(rf'{name}=\{{([\d,]*)\}}', attributes)
    return [int(x) for x in match[1].split(',') if x] if match else []


def _number(attributes: str, name: str, default: int = 1) -> int:
    match = re.search(rf'{name}=(\d+)', attributes)
    return int(match[1]) if match else default


def bytes_moved(module: Module, computation: Computation, instruction: Instruction) -> float:
    """Bytes of the main memory that an instruction reads and writes."""
    if instruction.opcode in _FREE or instruction.opcode.endswith('-done'):
        return 0.0
    operands = [computation[name] for name in instruction.operands]
    if instruction.opcode == 'fusion':
        return _fusion_bytes(module, instruction.called[0], instruction, operands)
    if instruction.opcode in _SLICES:
        return 2.0 * _far(instruction)
    if instruction.opcode == 'dynamic-update-slice':
        return 2.0 * _far(operands[1])
    if instruction.opcode in ('copy-start', 'slice-start'):  # its result has operand and copy
        copy = sum(0 if array.near else array.bytes for array in instruction.arrays[:1])
        return _far(operands[0]) + copy
    return float(_far(instruction) + sum(map(_far, operands)))


def _fusion_bytes(
    module: Module, name: str, instruction: Instruction, operands: list[Instruction]
) -> float:
    """Of an operand that is sliced, only the slices are read; an update writes only its slice."""
    inner = module.computations[name]
    roots = [_source(module, inner, root) for root in _roots(inner)]
    updated = {_origin(where, root) for where, root in roots if _is_update(root)}
    total = 0.0
    for number, operand in enumerate(operands):
        parameter = inner.parameters.get(number)
        if parameter is None or not _far(operand):
            continue
        uses = list(_uses(module, inner, parameter))
        if uses and all(x.opcode in _SLICES for x in uses):
            total += min(sum(x.bytes for x in uses), operand.bytes)
        elif parameter.name not in updated:
            total += _far(operand)
    for (where, root), array in zip(roots, instruction.arrays, strict=False):
        if not array.near:
            total += where[root.operands[1]].bytes if _is_update(root) else array.bytes
    return total


def _is_update(instruction: Instruction) -> bool:
    return instruction.opcode == 'dynamic-update-slice'


def _roots(inner: Computation) -> list[Instruction]:
    """The instructions that make the arrays of a fusion's result."""
    if inner.root.opcode != 'tuple':
        return [inner.root]
    return [inner[name] for name in inner.root.operands]


def _source(
    module: Module, inner: Computation, root: Instruction
) -> tuple[Computation, Instruction]:
    """The update that a result comes from, through bitcasts and fusions; else the result."""
    where, source = inner, root
    while True:
        if source.opcode == 'fusion':
            where = module.computations[source.called[0]]
            source = where.root
        elif source.opcode == 'bitcast':
            source = where[source.operands[0]]
        else:
            return (where, source) if _is_update(source) else (inner, root)


def _origin(where: Computation, update: Instruction) -> str:
    """The name of what an update changes, before bitcasts."""
    source = where[update.operands[0]]
    while source.opcode == 'bitcast':
        source = where[source.operands[0]]
    return source.name


def _uses(module: Module, inner: Computation, parameter: Instruction) -> Iterator[Instruction]:
    """The instructions that use a parameter, through bitcasts and fusions."""
    for user in inner.users[parameter.name]:
        if user.opcode == 'bitcast':
            yield from _uses(module, inner, user)
        elif user.opcode == 'fusion':
            nested = module.computations[user.called[0]]
            if nested.root.opcode == 'copy' and 'output_to_operand_aliasing' in user.attributes:
                yield from _uses(module, inner, user)  # the same bytes in another tiling
                continue
            for number, name in enumerate(user.operands):
                if name == parameter.name and number in nested.parameters:
                    yield from _uses(module, nested, nested.parameters[number])
        else:
            yield user


def _far(instruction: Instruction) -> int:
    """Bytes of a result in the main memory."""
    return sum(0 if array.near else array.bytes for array in instruction.arrays)
