"""Memory that a program's libraries allocate beside what its compiler plans."""

import math

from grpo_jax.run.plan.hlo import Computation, Instruction, Module
from grpo_jax.run.plan.work import numbers

# Eigen's products, from recorded allocations: it copies parts of both factors, which are this long
# along the axis that is summed over, and up to three of them exist at a time.
_DEPTH, _PARTS, _BYTES = 256, 3, 4


def scratch_bytes(module: Module) -> float:
    """Bytes to which the largest matrix product of a program for CPUs copies its factors.

    XLA's memory analysis does not count them: its products on CPUs are Eigen's, which packs factors
    for the caches. Those of a batch are computed one after the other.
    """
    return max(
        (
            _packed(computation, instruction)
            for computation in module.computations.values()
            for instruction in computation
            if instruction.opcode == 'dot'
        ),
        default=0.0,
    )


def _packed(computation: Computation, product: Instruction) -> float:
    """Bytes of the packed factors of a product [m, k] x [k, n] of float32."""
    lhs = computation[product.operands[0]].arrays[0]
    summed = math.prod(lhs.shape[i] for i in numbers(product.attributes, 'lhs_contracting_dims'))
    batch = math.prod(lhs.shape[i] for i in numbers(product.attributes, 'lhs_batch_dims'))
    rows = lhs.size // (summed * batch)
    columns = product.arrays[0].size // (rows * batch)
    return float(_PARTS * (rows + columns) * min(summed, _DEPTH) * _BYTES)
