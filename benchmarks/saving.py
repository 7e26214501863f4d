"""How long a checkpoint holds a run up, against the copy of its state to the host's memory.

    python benchmarks/saving.py --folder=FOLDER [--megabytes=128] [--saves=7]

The state has parameters of this size and Adam's moments, and each step donates its buffers. Around
each save it times the copy of the state alone, the call of `checkpoint.save`, the steps that go on
meanwhile, and when the files are written. Prints the medians of all saves, and the ratio of the
call to the copy before it. Ends with status 1 if a checkpoint is not the state of its call.
"""

import argparse
import functools
import pathlib
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

import jax
import jax.numpy as jnp
import numpy as np
import optax

from grpo_jax import sharding
from grpo_jax.run import checkpoint
from grpo_jax.types import TrainState

SIDE = 1024  # of the float32 matrices: 4 MiB each


def make_state(megabytes: int) -> TrainState:
    """A training state with random parameters of this size."""
    keys = jax.random.split(jax.random.key(0), megabytes // 4)
    params = {f'matrix_{i}': jax.random.normal(key, (SIDE, SIDE)) for i, key in enumerate(keys)}
    return TrainState(jnp.int32(0), params, optax.adam(1e-3).init(params), jnp.int32(0))


@functools.partial(jax.jit, donate_argnums=0)
def update(state: TrainState) -> TrainState:
    """Changes every array of the state, in its buffers."""
    return jax.tree.map(lambda x: x + 1 if x.ndim == 0 else x * 0.999, state)


def seconds(function: Callable[[], Any]) -> float:
    """The time of a call and of what it has dispatched."""
    start = time.perf_counter()
    jax.block_until_ready(function())
    return time.perf_counter() - start


def main() -> None:
    """Times saves, and prints what they took."""
    parser = argparse.ArgumentParser(usage=__doc__)
    parser.add_argument('--folder', type=pathlib.Path, required=True)
    parser.add_argument('--megabytes', type=int, default=128)
    parser.add_argument('--saves', type=int, default=7)
    options = parser.parse_args()
    state = jax.block_until_ready(update(make_state(options.megabytes)))
    size = sum(x.nbytes for x in jax.tree.leaves(state)) / 2**20
    found: dict[str, list[float]] = {}
    copied: Any = None
    mesh = sharding.make_mesh(fsdp=1, devices=jax.devices()[:1])

    def step() -> TrainState:
        nonlocal state
        state = update(state)
        return state

    def copy() -> None:
        nonlocal copied
        copied = jax.tree.map(np.array, jax.device_get(state))

    with checkpoint.open_manager(options.folder.absolute(), keep=1) as manager:
        for number in range(1, options.saves + 1):
            times = {
                'step': statistics.median(seconds(step) for _ in range(5)),
                'copy': seconds(copy),
                'call': seconds(functools.partial(checkpoint.save, manager, number, state)),
            }
            start, steps = time.perf_counter(), []
            while manager.is_saving_in_progress():
                steps.append(seconds(step))
            manager.wait_until_finished()
            times['written after'] = time.perf_counter() - start + times['call']
            times['longest step meanwhile'] = max(steps, default=0.0)
            times['call / copy'] = times['call'] / times['copy']
            restored = jax.device_get(checkpoint.restore(manager, copied, mesh))
            if not all(jax.tree.leaves(jax.tree.map(np.array_equal, restored, copied))):
                sys.exit(f'checkpoint {number} is not the state of its call')
            if number > 1:  # the first one makes folders and compiles
                for name, value in times.items():
                    found.setdefault(name, []).append(value)
    print(f'{size:.0f} MiB of state, {options.saves - 1} saves')
    for name, values in found.items():
        unit = '' if '/' in name else ' s'
        middle, least, most = statistics.median(values), min(values), max(values)
        print(f'{name:24}{middle:8.3f}{unit}  ({least:.3f} to {most:.3f})')


if __name__ == '__main__':
    main()
