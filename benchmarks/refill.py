"""Ended rows left out, as the sampler does it, against their slots refilled from waiting rows.

    python -m benchmarks.refill

Leaving out is measured: seconds of `sample` on W3, programs at hand. Refilling is computed: a
number of slots decode at the measured seconds per column of that many rows, every so many columns
those that have ended take the next rows, prompts are read and moved for nothing, and once nobody
waits the rows that go on are decoded in half of the slots, or half of these. Lengths are the same.
With a slot for each row and a look at every column that is what the sampler does: the difference to
its measured time says how far the computed ones can be trusted.
"""

import dataclasses
from collections.abc import Mapping

import jax
import numpy as np
from absl import app, flags

from benchmarks import timing
from benchmarks.ours import Ours, parse_options
from benchmarks.workloads import WORKLOADS

ROLLOUTS = flags.DEFINE_integer('rollouts', 8, 'how many are measured')


def main(arguments: list[str]) -> None:
    """Prints the seconds per column, and those of a rollout."""
    if arguments[1:]:
        raise app.UsageError(f'unexpected arguments: {arguments[1:]}')
    workload = WORKLOADS['W3']
    ours, options = Ours(workload, parse_options([])), parse_options([])
    clock = timing.Clock()
    lengths = []
    for k in [*range(ROLLOUTS.value)] * 2:  # the first time compiles
        clock.start()
        rollout = clock.timed('sample', ours.sample, jax.block_until_ready)(ours.prompts(k), k)
        clock.cut()
        lengths.append(np.asarray(rollout.mask).sum(-1).reshape(-1))
    lengths = lengths[ROLLOUTS.value :]
    left_out = [step['sample'] for step in clock.steps[ROLLOUTS.value :]]
    size = workload.group_size
    column = {}
    for groups in (1, 2, 4, workload.groups):
        whole = Ours(dataclasses.replace(workload, groups=groups, ends=0), options)
        column[groups * size] = _seconds(whole) / workload.completion
    for rows in (4, 2, 1):
        shape = dataclasses.replace(workload, groups=1, group_size=rows, ends=0)
        column[rows] = _seconds(Ours(shape, options)) / workload.completion
    print('rows: ms a column', {rows: round(1e3 * s, 2) for rows, s in sorted(column.items())})
    print(f'leaving out: {np.median(left_out):.2f} s, measured; mean length {np.mean(lengths):.1f}')
    for every in (64, 32, 16, 1):
        found = {
            slots: round(float(np.median([refilled(x, slots, every, column) for x in lengths])), 2)
            for slots in sorted(column)[-4:]
        }
        print(f'refilled every {every} columns: s by slots {found}')


def _seconds(ours: Ours) -> float:
    """Of a whole rollout, the best of three."""
    clock = timing.Clock()
    for k in range(4):
        clock.start()
        clock.timed('sample', ours.sample, jax.block_until_ready)(ours.prompts(k), k)
        clock.cut()
    return min(step['sample'] for step in clock.steps[1:])


def refilled(lengths: np.ndarray, slots: int, every: int, column: Mapping[int, float]) -> float:
    """Seconds of rows i64[N] in so many slots; `column` are those of a column by rows."""
    waiting, going, total = list(lengths[::-1]), np.zeros(0, int), 0.0
    while waiting or going.size:
        free = min(slots - going.size, len(waiting))
        going = np.append(going, [waiting.pop() for _ in range(free)])
        total += every * column[min(n for n in column if n >= going.size)]
        going = going - every
        going = going[going > 0]
    return total


if __name__ == '__main__':
    app.run(main)
