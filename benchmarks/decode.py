"""Times the sampler alone, block by block: milliseconds and bytes for each column.

    python -m benchmarks.decode --workload=qwen2.5-7b
    python -m benchmarks.decode --workload=qwen2.5-1.5b --profile=10

There is neither optimizer nor reference, so the model may be larger than one that can be trained on
the device. All rows run to their full length. The time of a block contains growing its caches, that
of the first block also the prefill.
"""

import dataclasses
import itertools
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags

from benchmarks import kernels, roofline, workloads
from benchmarks.ours import make_model, make_params, of_model, parse_options
from grpo_jax.algorithm.sample import sample_blocks
from grpo_jax.models import Transformer
from grpo_jax.types import Params, Prompts, Sampling


def main(arguments: list[str]) -> None:
    """Prints a line for each block."""
    if arguments[1:]:
        raise app.UsageError(f'unexpected arguments: {arguments[1:]}')
    chosen = flags.FLAGS
    workload = dataclasses.replace(workloads.WORKLOADS[chosen.workload], ends=0)
    options = parse_options(chosen.set)
    unused = [*options.algorithm, *options.compute]
    if unused:
        raise app.UsageError(
            f'{unused} are options of an update and have no effect here: remove them'
        )
    model = make_model(workload.shape, **options.model)
    workload = of_model(workload, model)
    params = make_params(model)

    def run(k: int) -> dict[int, float]:
        return seconds(workload, model, params, k, **options.sample)

    run(0)  # compiles
    measured = [run(k) for k in range(1, chosen.repeats + 1)]
    stream = roofline.bandwidth_ceiling()
    print(f'{jax.devices()[0].device_kind}, a stream reaches {stream / 1e9:.0f} GB/s')
    for first, last in itertools.pairwise([0, *measured[0]]):
        took = float(np.median([blocks[last] for blocks in measured]))
        read = of_columns(workload, last) - of_columns(workload, first)
        print(
            f'columns {first} to {last}: {1e3 * took / (last - first):.3f} ms each, '
            f'{read / took / 1e9:.0f} GB/s, {read / took / stream:.0%} of a stream'
        )
    with kernels.profiled(chosen.profile):
        run(0)


def seconds(
    workload: workloads.Workload, model: Transformer, params: Params, k: int, **options: Any
) -> dict[int, float]:
    """Seconds of each block, by the number of columns after it."""
    rng = np.random.default_rng(k)
    shape = workload.groups, workload.prompt
    prompts = Prompts(
        jnp.asarray(rng.integers(3, workload.shape.vocab_size, shape), jnp.int32),
        jnp.full(shape[0], shape[1], jnp.int32),
        jnp.arange(shape[0], dtype=jnp.int32),
    )
    took: dict[int, float] = {}
    start = time.perf_counter()
    for rollout in sample_blocks(
        model, params, prompts, seed=0, step=k, sampling=Sampling(),
        eos_ids=jnp.asarray([workloads.NEVER], jnp.int32), group_size=workload.group_size,
        max_tokens=workload.completion, **options,
    ):  # fmt: skip
        columns = int(np.asarray(rollout.mask).sum(-1).max())  # waits for it
        now = time.perf_counter()
        took[columns], start = now - start, now
    return took


def of_columns(workload: workloads.Workload, columns: int) -> int:
    """The least bytes that decoding so many columns reads; see `roofline.decode_bytes`."""
    lengths = np.full((workload.groups, workload.group_size), columns)
    return roofline.decode_bytes(workload, lengths) if columns else 0


if __name__ == '__main__':  # here, as `step` has flags of the same names
    flags.DEFINE_enum('workload', 'W1', [*workloads.WORKLOADS], 'what to sample')
    flags.DEFINE_integer('repeats', 3, 'measured rollouts', lower_bound=1)
    flags.DEFINE_integer('profile', 0, 'how many of the slowest programs to print')
    flags.DEFINE_multi_string('set', [], 'name=value for ModelConfig or sample')
    app.run(main)
