"""Compares compaction of finished sequences, which the sampler does, with continuous batching.

    python -m benchmarks.refill

Compaction is measured: seconds of `sample` on W3 with compiled programs. Continuous batching, where
waiting sequences take the slots of finished ones, is simulated: a number of slots decode at the
measured seconds per step of that many sequences; at fixed intervals the next sequences take the
free slots, with prefill and moves at no cost; once none waits, the slots are halved as often as the
unfinished sequences allow. Lengths are those of the measured rollouts. With one slot per sequence
and an interval of one step the simulation is what the sampler does, so the difference to the
measured time shows how accurate it is.
"""

import dataclasses
from collections.abc import Mapping

import jax
import numpy as np
from absl import app, flags
from jaxtyping import Int

from benchmarks import timing
from benchmarks.ours import Ours, parse_options
from benchmarks.workloads import WORKLOADS

ROLLOUTS = flags.DEFINE_integer('rollouts', 8, 'number of measured rollouts')


def main(arguments: list[str]) -> None:
    """Print the seconds per decode step and per rollout."""
    if arguments[1:]:
        raise app.UsageError(f'unexpected arguments: {arguments[1:]}')
    workload = WORKLOADS['W3']
    options = parse_options([])
    ours = Ours(workload, options)
    clock = timing.Clock()
    lengths = []
    for k in [*range(ROLLOUTS.value)] * 2:  # the first time compiles
        clock.start()
        rollout = clock.timed('sample', ours.sample, jax.block_until_ready)(ours.prompts(k), k)
        clock.cut()
        lengths.append(np.asarray(rollout.mask).sum(-1).reshape(-1))
    lengths = lengths[ROLLOUTS.value :]
    measured = [step['sample'] for step in clock.steps[ROLLOUTS.value :]]
    size = workload.group_size
    step_seconds = {}  # sequences decoded together -> seconds per decode step
    for groups in (1, 2, 4, workload.groups):
        whole = Ours(dataclasses.replace(workload, groups=groups, ends=0), options)
        step_seconds[groups * size] = _rollout_seconds(whole) / workload.completion
    for sequences in (4, 2, 1):
        shape = dataclasses.replace(workload, groups=1, group_size=sequences, ends=0)
        step_seconds[sequences] = _rollout_seconds(Ours(shape, options)) / workload.completion
    table = {n: round(1e3 * s, 2) for n, s in sorted(step_seconds.items())}
    print('ms per decode step, by number of sequences:', table)
    print(f'compaction: {np.median(measured):.2f} s measured; mean length {np.mean(lengths):.1f}')
    for interval in (64, 32, 16, 1):
        simulated = {
            slots: [simulate(x, slots, interval, step_seconds) for x in lengths]
            for slots in sorted(step_seconds)[-4:]
        }
        medians = {slots: round(float(np.median(s)), 2) for slots, s in simulated.items()}
        print(f'continuous batching every {interval} steps: s by number of slots {medians}')


def _rollout_seconds(ours: Ours) -> float:
    """Return the seconds of a whole rollout, the best of three."""
    clock = timing.Clock()
    for k in range(4):
        clock.start()
        clock.timed('sample', ours.sample, jax.block_until_ready)(ours.prompts(k), k)
        clock.cut()
    return min(step['sample'] for step in clock.steps[1:])


def simulate(
    lengths: Int[np.ndarray, ' N'],
    slots: int,
    interval: int,
    step_seconds: Mapping[int, float],
) -> float:
    """Return the seconds of continuous batching.

    Args:
      lengths: tokens of each sequence.
      slots: sequences that are decoded together.
      interval: decode steps between two times when free slots are taken.
      step_seconds: seconds per decode step, by number of sequences.
    """
    waiting, remaining, seconds = list(lengths[::-1]), np.zeros(0, int), 0.0
    while waiting or remaining.size:
        free = min(slots - remaining.size, len(waiting))
        remaining = np.append(remaining, [waiting.pop() for _ in range(free)])
        used = min(n for n in step_seconds if n >= remaining.size)
        seconds += interval * step_seconds[used]
        remaining = remaining - interval
        remaining = remaining[remaining > 0]
    return seconds


if __name__ == '__main__':
    app.run(main)
