"""How the compiler of TPUs gathers a matrix, over one axis of the mesh at a time and over two.

    python -m benchmarks.gathers --topology=v5p:4x4x4 --groups=16

A matrix of DeepSeekMath 7B is split over all devices, groups x completions. Compiled are its
gather, and the sum of its gradient that is split again. Printed are the collectives, the seconds of
CPU time that the compiler took, and the size of the program; nothing is run. Needs libtpu.
"""

import argparse
import functools
import re
import resource
from collections import Counter
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from grpo_jax import sharding
from grpo_jax.run.plan.topology import find_topology
from grpo_jax.sharding import DATA

ROWS, WIDTH, MLP = 1024, 4096, 11008  # tokens of a device, and the matrix [WIDTH, MLP]


def main() -> None:
    """Prints a line for each program."""
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    parser.add_argument('--topology', default='v5p:4x4x4')
    parser.add_argument('--groups', type=int, default=16)
    options = parser.parse_args()
    devices = find_topology(options.topology).devices
    count = len(devices)
    mesh = sharding.make_mesh(fsdp=count, completions=count // options.groups, devices=devices)

    def where(*axes: object) -> NamedSharding:
        return NamedSharding(mesh, PartitionSpec(*axes))

    def abstract(rows: int, columns: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((rows, columns), jnp.bfloat16, sharding=where(DATA))

    def gather(steps: list[NamedSharding], matrix: jax.Array) -> jax.Array:
        return functools.reduce(jax.lax.with_sharding_constraint, steps, matrix)

    def gradient(steps: list[NamedSharding], x: jax.Array, y: jax.Array) -> jax.Array:
        return functools.reduce(jax.lax.with_sharding_constraint, steps, x.T @ y)

    rows = abstract(count * ROWS, WIDTH), abstract(count * ROWS, MLP)
    for name, function, arguments, last in (
        ('gather', gather, (abstract(WIDTH, MLP),), where()),
        ('gradient', gradient, rows, where(DATA)),
    ):
        for form, steps in (
            ('two axes at once', [last]),
            ('one at a time', [where('groups'), last]),
        ):
            lowered = jax.jit(functools.partial(function, steps)).lower(*arguments)
            before = resource.getrusage(resource.RUSAGE_SELF).ru_utime
            compiled = lowered.compile()
            seconds = resource.getrusage(resource.RUSAGE_SELF).ru_utime - before
            text: str = compiled.as_text() or ''
            memory: Any = compiled.memory_analysis()
            kinds = Counter(re.findall(r' (all-gather|all-reduce|reduce-scatter)\(', text))
            scatters = text.count('calls=%all-reduce-scatter')  # each holds an all-reduce
            kinds += Counter({'reduce-scatter': scatters})
            kinds -= Counter({'all-reduce': scatters})
            code = memory.generated_code_size_in_bytes / 2**20
            print(f'{name}, {form}: {seconds:.1f} s, {code:.2f} MiB of code, {dict(kinds)}')


if __name__ == '__main__':
    main()
