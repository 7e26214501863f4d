"""Memory of GRPO and of PPO for the same model and batch, as the compiler reports it.

    python benchmarks/memory.py
    python benchmarks/memory.py --model=7b --topology=v5p:2x2x2 --fsdp=8

Both training steps are compiled for abstract arrays: nothing is allocated, so the 7B model fits
any machine. With `--topology` they are compiled ahead of time for a TPU slice (needs `libtpu`).
Prints Markdown, bytes per device.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags
from jax.experimental import topologies
from jax.sharding import Mesh

from grpo_jax import models, sharding
from grpo_jax.algorithm.config import Algorithm
from grpo_jax.algorithm.critic import Critic
from grpo_jax.algorithm.optimizer import adamw
from grpo_jax.algorithm.program import init_state, make_train_step
from grpo_jax.engine.compute import Compute
from grpo_jax.types import Prompts, Rollout, Sampling

SHAPES: dict[str, dict[str, Any]] = {
    'small': {  # that of configs/arithmetic.py
        'vocab_size': 258, 'width': 96, 'layers': 3, 'heads': 6, 'kv_heads': 6, 'head_dim': 16,
        'mlp_width': 256, 'remat': False,
    },
    '7b': {  # DeepSeekMath 7B, bfloat16
        'vocab_size': 102_400, 'width': 4096, 'layers': 30, 'heads': 32, 'kv_heads': 32,
        'head_dim': 128, 'mlp_width': 11_008, 'tied_head': False, 'dtype': 'bfloat16',
        'param_dtype': 'bfloat16', 'remat': True,
    },
}  # fmt: skip
BATCHES = {  # B, G, P, T, groups per microbatch
    'small': (32, 8, 8, 24, 32),
    '7b': (64, 8, 512, 1024, 8),
}

MODEL = flags.DEFINE_enum('model', 'small', [*SHAPES], 'which model')
TOPOLOGY = flags.DEFINE_string('topology', '', 'TPU slice, such as v5p:4x4x4; empty: this machine')
FSDP = flags.DEFINE_integer('fsdp', 1, 'devices')


def main(arguments: list[str]) -> None:
    """Compiles both programs and prints the table."""
    if arguments[1:]:
        raise app.UsageError(f'unexpected arguments: {arguments[1:]}')
    mesh = make_mesh()
    model = models.Transformer(models.ModelConfig(**SHAPES[MODEL.value]))
    memory = {name: measure(model, mesh, name == 'PPO') for name in ('GRPO', 'PPO')}
    rows = [*memory['PPO'], 'total']
    b, g, p, t, m = BATCHES[MODEL.value]
    print(f'{MODEL.value}, B={b}, G={g}, P={p}, T={t}, {m} groups at a time, {mesh.size} devices')
    print('\n| MiB per device | GRPO | PPO |\n|---|---|---|')
    totals = {name: sum(parts.values()) for name, parts in memory.items()}
    for row in rows:
        cells = [
            totals[name] if row == 'total' else parts.get(row, 0) for name, parts in memory.items()
        ]
        print(f'| {row} | ' + ' | '.join(f'{cell / 2**20:,.2f}' for cell in cells) + ' |')
    print(f'\nGRPO needs {1 - totals["GRPO"] / totals["PPO"]:.1%} less.')


def make_mesh() -> Mesh:
    """Devices of this machine, or of a TPU slice described by its topology."""
    devices: Any = jax.devices()
    if TOPOLOGY.value:
        devices = topologies.get_topology_desc(platform='tpu', topology_name=TOPOLOGY.value).devices
    return sharding.make_mesh(fsdp=FSDP.value, devices=devices)


def measure(model: models.Transformer, mesh: Mesh, with_critic: bool) -> dict[str, int]:
    """Bytes per device of the program's parts."""
    b, g, p, t, microbatch = BATCHES[MODEL.value]
    optimizer, _ = adamw(learning_rate=1e-6, steps=1)
    critic = None
    options: dict[str, Any] = {'kl': 'k3', 'beta': 0.04}
    if with_critic:
        critic = Critic(models.Transformer(models.with_scalar_head(model.config)), optimizer)
        options |= {'baseline': 'critic', 'scale': 'batch', 'kl': 'k1', 'kl_place': 'reward'}
    algorithm = Algorithm(**options)
    compute = Compute(microbatch=microbatch, logprob_chunk=128)
    step: Any = make_train_step(model, optimizer, algorithm, mesh, compute=compute, critic=critic)
    key = jax.eval_shape(lambda: jax.random.key(0))
    state = sharding.placed(
        jax.eval_shape(functools.partial(init_state, model, optimizer, critic=critic), key),
        mesh,
    )
    reference = state.params
    i32, f32 = jnp.int32, jnp.float32

    def array(shape: tuple[int, ...], dtype: Any) -> Any:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding.groups(mesh))

    rollout = Rollout(
        Prompts(array((b, p), i32), array((b,), i32), array((b,), i32)),
        array((b, g, t), i32), array((b, g, t), jnp.bool), array((b, g, t), f32),
        array((b, g), jnp.bool),
    )  # fmt: skip
    scalar = jax.ShapeDtypeStruct((), f32, sharding=sharding.replicated(mesh))
    scalars = jax.tree.map(lambda _: scalar, (Sampling(), algorithm))
    compiled = step.lower(state, reference, rollout, array((b, g), f32), *scalars).compile()
    analysis = compiled.memory_analysis()
    parts = {
        'policy': size(state.params, mesh),
        'its moments': size(state.opt_state, mesh),
        'reference': size(reference, mesh),
    }
    if with_critic:
        parts |= {
            'critic': size(state.value_params, mesh),
            "the critic's moments": size(state.value_opt_state, mesh),
        }
    parts['batch'] = analysis.argument_size_in_bytes - sum(parts.values())
    parts['temporaries'] = analysis.temp_size_in_bytes
    return parts


def size(tree: Any, mesh: Mesh) -> int:
    """Bytes on one device."""
    return sum(
        int(np.prod(leaf.sharding.shard_shape(leaf.shape))) * leaf.dtype.itemsize
        for leaf in jax.tree.leaves(tree)
    )


if __name__ == '__main__':
    app.run(main)
