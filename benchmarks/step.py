"""Times our own GRPO step on a workload: sample, reward, update, and the reference's score alone.

    python -m benchmarks.step --workload=W1
    python -m benchmarks.step --workload=W1 --microbatch=2 --set=entropy=True --record=a.jsonl
    python -m benchmarks.step --workload=W1 --floors
    python -m benchmarks.step --workload=qwen2.5-1.5b --profile=10
    python -m benchmarks.step --workload=qwen2.5-7b --set=layers=6

Prints medians and extremes, tokens and model FLOPs per second and their share of what a matrix
product and a stream of bytes reach in the same process. With `--floors` every call alternates with
a bare JAX loop that does the same work without a framework (`benchmarks/floors.py`). With
`--record` a line of JSON is added to a file.
"""

import statistics
from typing import Any

import jax
import numpy as np
from absl import app, flags

from benchmarks import floors, kernels, roofline, timing, workloads
from benchmarks.ours import SUITED, Ours, parse_options
from grpo_jax.run import compiled
from grpo_jax.types import Rollout

WORKLOAD = flags.DEFINE_enum('workload', 'W1', [*workloads.WORKLOADS], 'what to compute')
STEPS = flags.DEFINE_integer('steps', 5, 'measured steps', lower_bound=1)
WARMUP = flags.DEFINE_integer('warmup', 2, 'steps before them', lower_bound=1)
OPTIONS = (
    flags.DEFINE_integer('microbatch', None, 'groups whose gradient is computed at a time'),
    flags.DEFINE_integer('logprob_chunk', None, 'completion positions whose logits exist'),
    flags.DEFINE_bool('remat', None, 'recompute layers in the backward pass; else they are kept'),
    flags.DEFINE_string('dtype', None, "of computation and parameters instead of the workload's"),
)
SET = flags.DEFINE_multi_string(
    'set', [], 'name=value for Algorithm, Compute, ModelConfig or sample'
)
SUITED_TOO = flags.DEFINE_bool('suited', True, 'start from the options of `ours.SUITED`')
PROFILE = flags.DEFINE_integer('profile', 0, 'print this many of the programs that took longest')
FLOORS = flags.DEFINE_bool('floors', False, 'alternate with bare loops')
CHECK = flags.DEFINE_bool('check', False, 'compare the bare loops with our programs, time nothing')
RECORD = flags.DEFINE_string('record', '', 'file that a line of JSON is added to')


def main(arguments: list[str]) -> None:
    """Measures the workload that the flags name."""
    if arguments[1:]:
        raise app.UsageError(f'unexpected arguments: {arguments[1:]}')
    from_flags = [f'{flag.name}={flag.value}' for flag in OPTIONS if flag.value is not None]
    suited = SUITED.get(WORKLOAD.value, ()) if SUITED_TOO.value else ()
    pairs = [*suited, *from_flags, *SET.value]
    ours = Ours(workloads.WORKLOADS[WORKLOAD.value], parse_options(pairs))
    if CHECK.value:
        result = floors.check(ours)
        print(result)
        if (
            result['logprob_difference'] > floors.TOLERANCE
            or result['same_draws'] < floors.SAME_DRAWS
        ):
            raise SystemExit('the bare loops do not compute what our programs do')
        return
    with compiled.trimmed():
        row = measure(
            ours,
            {'workload': WORKLOAD.value, 'options': pairs, 'compute': ours.compute._asdict()},
            steps=STEPS.value,
            warmup=WARMUP.value,
            with_floors=FLOORS.value,
        )
    timing.write(row, RECORD.value)
    for line in describe(row):
        print(line)
    with kernels.profiled(PROFILE.value):
        ours.step(timing.Clock(), STEPS.value + WARMUP.value)


def measure(
    ours: Ours, labels: dict[str, Any], *, steps: int, warmup: int, with_floors: bool = False
) -> dict[str, Any]:
    """Runs the steps.

    Args:
      ours: fresh, so that the first step compiles.
      labels: the workload's name, and what else to say about the run.
      steps: measured ones.
      warmup: those before.
      with_floors: call the bare loops in turn with ours.

    Returns:
      A row as `timing.record` makes it, with rates, ceilings and floors.
    """
    clock = timing.Clock()
    lengths: list[np.ndarray] = []
    bare: floors.Floors | None = None
    peak = 0
    for k in range(warmup + steps):
        rollout = ours.step(clock, k)
        lengths.append(np.asarray(rollout.mask).sum(-1))
        if k + 1 == warmup or not with_floors:
            peak = peak_memory()
        if k + 1 == warmup and with_floors:
            bare = floors.Floors(ours.workload, ours.reference, lengths[-1])
        if bare is not None:
            bare.run(ours.prompts(k), rollout, k)
    more: dict[str, Any] = {}
    if bare is not None:
        more['floors'] = bare.compare(clock.steps[-steps:], [n.sum() for n in lengths[-steps:]])
    row = timing.record(
        'grpo_jax',
        labels['workload'],
        clock,
        [int(n.sum()) for n in lengths],
        warmup=warmup,
        versions={'jax': jax.__version__},
        settings={'device': jax.devices()[0].device_kind} | labels,
        peak_bytes=peak,
        **more,
    )
    row['seconds']['score'] = time_score(ours, rollout, steps)
    return row | utilization(ours.workload, row['seconds'], lengths[-steps:])


def time_score(ours: Ours, rollout: Rollout, repeats: int) -> dict[str, float]:
    """Seconds of the reference's log-probs alone, which are part of the update's."""
    clock = timing.Clock()
    jax.block_until_ready(ours.score(rollout))
    for _ in range(repeats):
        clock.start()
        clock.timed('score', ours.score, jax.block_until_ready)(rollout)
        clock.cut()
    return timing.summary([step['score'] for step in clock.steps])


def peak_memory() -> int:
    """Bytes on the accelerator, or of main memory where there is none."""
    statistics = jax.devices()[0].memory_stats() or {}
    return int(statistics.get('peak_bytes_in_use', timing.peak_rss()))


def utilization(
    workload: workloads.Workload, seconds: dict[str, Any], lengths: list[np.ndarray]
) -> dict[str, Any]:
    """Model FLOPs and bytes per second, and their share of the ceilings."""
    forward = statistics.median(roofline.forward_flops(workload, n) for n in lengths)
    read = statistics.median(roofline.decode_bytes(workload, n) for n in lengths)
    # The update is a forward and backward pass of the policy and a forward pass of the reference.
    flops = {'sample': forward, 'score': forward, 'update': 4 * forward, 'step': 5 * forward}
    rates = {phase: count / seconds[phase]['median'] for phase, count in flops.items()}
    matmul = roofline.matmul_ceiling(workload.shape.dtype)
    bandwidth = roofline.bandwidth_ceiling()
    decoded = read / seconds['sample']['median']
    return {
        'model_flops': flops,
        'flops_per_s': rates,
        'matmul_flops_per_s': matmul,
        'share_of_matmul': {phase: rate / matmul for phase, rate in rates.items()},
        'decode_bytes': read,
        'decode_bytes_per_s': decoded,
        'stream_bytes_per_s': bandwidth,
        'share_of_stream': decoded / bandwidth,
    }


def describe(row: dict[str, Any]) -> list[str]:
    """What `timing.write` leaves out, one line each."""
    giga = 1e9
    shares = ', '.join(
        f'{phase} {rate / giga:.0f} ({row["share_of_matmul"][phase]:.0%})'
        for phase, rate in row['flops_per_s'].items()
    )
    lines = [
        f'model GFLOP/s (share of a matrix product, {row["matmul_flops_per_s"] / giga:.0f}): '
        + shares,
        f'decoding reads {row["decode_bytes_per_s"] / giga:.2f} GB/s '
        f'({row["share_of_stream"]:.0%} of a stream, {row["stream_bytes_per_s"] / giga:.0f})',
    ]
    for phase, floor in row.get('floors', {}).items():
        lines.append(
            f'floor {phase}: ' + ', '.join(f'{k} {v["median"]:.3f}' for k, v in floor.items())
        )
    return lines


if __name__ == '__main__':
    app.run(main)
