"""What the devices send each other in compiled programs. As a program: in an update on 64 devices.

`python tests/collectives.py '{"experts": 4, "experts_per_token": 2}'` prints the collectives of the
update of a model with these options, and whether the state stays where it is, as JSON.
"""

import functools
import json
import re
import sys

import jax
import jax.numpy as jnp

KINDS = 'all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute'
_COLLECTIVE = re.compile(rf'= (.*?) ({KINDS})(?:-start)?\((?:.*?op_name="([^"]*)")?')

# No two of these sizes, nor of their parts on 16 x 2 x 2 devices, are equal.
GROUPS, GROUP_SIZE, PROMPT, LENGTH = 16, 4, 23, 29
VOCAB, WIDTH, LAYERS, HEADS, KV_HEADS, HEAD, MLP = 640, 96, 5, 4, 2, 10, 224
MESH = (16, 2, 2)


def collectives(program):
    """(kind, sizes of its result, name of the operation) of each array that is sent."""
    return [
        (kind, [int(n) for n in dims.split(',') if n], name or '')
        for result, kind, name in _COLLECTIVE.findall(program)
        for dims in re.findall(r'\w\d*\[([\d,]*)\]', result)
    ]


def gathered(program):
    """(sizes, devices that take part) of each array that is gathered."""
    gather = re.compile(
        r'= (.*?) all-gather(?:-start)?\(.*?replica_groups=(?:\[\d+,(\d+)\]|\{\{([\d,]*)\})'
    )
    return [
        ([int(n) for n in dims.split(',') if n], int(size) if size else len(members.split(',')))
        for result, size, members in gather.findall(program)
        for dims in re.findall(r'\w\d*\[([\d,]*)\]', result)
    ]


def main(options):
    from grpo_jax import sharding
    from grpo_jax.algorithm.config import Algorithm
    from grpo_jax.algorithm.optimizer import adamw
    from grpo_jax.algorithm.program import init_state, make_train_step
    from grpo_jax.engine.compute import Compute
    from grpo_jax.models import ModelConfig, Transformer
    from grpo_jax.types import Prompts, Rollout

    model = Transformer(ModelConfig(
        vocab_size=VOCAB, width=WIDTH, layers=LAYERS, heads=HEADS, kv_heads=KV_HEADS, head_dim=HEAD,
        mlp_width=MLP, tied_head=False, **options,
    ))  # fmt: skip
    algorithm, (optimizer, _) = Algorithm(beta=0.04), adamw(learning_rate=1e-3, steps=10)
    groups, completions, tensor = MESH
    mesh = sharding.make_mesh(fsdp=groups * completions, completions=completions, tensor=tensor)
    make = functools.partial(init_state, model, optimizer)
    state = sharding.placed(jax.eval_shape(make, jax.random.key(0)), mesh)
    array = jax.ShapeDtypeStruct
    shape = (GROUPS, GROUP_SIZE, LENGTH)
    prompts = Prompts(
        array((GROUPS, PROMPT), jnp.int32), array((GROUPS,), jnp.int32), array((GROUPS,), jnp.int32)
    )
    rollout = Rollout(
        prompts, array(shape, jnp.int32), array(shape, bool), array(shape, jnp.float32),
        array(shape[:2], bool),
    )  # fmt: skip
    batch = rollout, array(shape[:2], jnp.float32)
    batch = jax.tree.map(
        lambda x, s: array(x.shape, x.dtype, sharding=s),
        batch,
        sharding.rollout_shardings(*batch, mesh),
    )
    compute = Compute(microbatch=GROUPS, widths=1, logprob_chunk=8)
    step = make_train_step(model, optimizer, algorithm, mesh, compute=compute)
    program = step.lower(state, state.params, *batch).compile({'xla_backend_optimization_level': 0})
    before, after = program.input_shardings[0][0], program.output_shardings[0]
    stays = jax.tree.map(lambda x, a, b: a.is_equivalent_to(b, x.ndim), state, before, after)
    text = program.as_text()
    return {
        'stays': jax.tree.all(stays),
        'collectives': collectives(text),
        'gathered': gathered(text),
    }


if __name__ == '__main__':
    print(json.dumps(main(json.loads(sys.argv[1]))))
