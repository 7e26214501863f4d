"""Times Tunix's GRPOLearner on a workload, with its own sampler.

    python3.12 -m venv .venv/tunix && .venv/tunix/bin/pip install google-tunix
    .venv/tunix/bin/python -m benchmarks.peers.run_tunix --workload W1 --micro 1 --rollout-micro 8

Run it in the root of this repository; it needs nothing of `grpo_jax`. The learner is Tunix's, its
methods are only wrapped with a clock.
"""

import argparse
import importlib.metadata
import os
from typing import Any

os.environ.setdefault('JAX_PLATFORMS', 'cpu')
os.environ.setdefault('HF_HUB_OFFLINE', '1')
os.environ.setdefault('TOKENIZERS_PARALLELISM', 'false')

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from tunix.models.qwen2 import model as qwen2  # type: ignore[import-not-found,unused-ignore]
from tunix.rl import rl_cluster  # type: ignore[import-not-found,unused-ignore]
from tunix.rl.grpo import grpo_learner  # type: ignore[import-not-found,unused-ignore]
from tunix.rl.rollout import base_rollout  # type: ignore[import-not-found,unused-ignore]

from benchmarks import timing, workloads
from benchmarks.workloads import Shape, Workload

PACKAGES = ('google-tunix', 'jax', 'flax', 'optax')


def main() -> None:
    """Measures the workload that the arguments name."""
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    parser.add_argument('--workload', default='W1', choices=[*workloads.WORKLOADS])
    parser.add_argument('--steps', type=int, default=5)
    parser.add_argument('--warmup', type=int, default=2)
    parser.add_argument('--micro', type=int, default=1, help='prompts per backward pass')
    parser.add_argument('--rollout-micro', type=int, default=8, help='prompts sampled at a time')
    parser.add_argument('--record', default='', help='file that a line of JSON is added to')
    options = parser.parse_args()
    workload = workloads.WORKLOADS[options.workload]
    clock = timing.Clock()
    steps = options.steps + options.warmup
    learner = make_learner(workload, steps, options)
    found = wrap(learner.rl_cluster, clock)
    learner.train(batches(workload, steps, clock))
    if len(clock.steps) < steps:
        clock.cut()
    for step in clock.steps:
        step['update'] = step['step'] - step['sample'] - step['score']
    tokens = np.asarray(found).reshape(steps, -1).sum(1)  # some calls of the sampler a step
    memory = jax.devices()[0].memory_stats() or {}
    row = timing.record(
        'tunix',
        options.workload,
        clock,
        tokens.tolist(),
        warmup=options.warmup,
        versions={name: importlib.metadata.version(name) for name in PACKAGES},
        settings={
            'device': jax.devices()[0].device_kind,
            'micro': options.micro,
            'rollout_micro': options.rollout_micro,
        },
        peak_bytes=memory.get('peak_bytes_in_use'),
    )
    timing.write(row, options.record)


def make_learner(workload: Workload, steps: int, options: Any) -> Any:
    """Tunix's learner, policy and reference with the same random parameters."""
    mesh = jax.make_mesh((1, 1), ('fsdp', 'tp'), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    with mesh:
        actor, reference = make_model(workload.shape), make_model(workload.shape)
    optimizer = optax.chain(
        optax.clip_by_global_norm(workloads.CLIP_NORM), optax.adamw(workloads.LEARNING_RATE)
    )
    roles = rl_cluster.Role
    config = rl_cluster.ClusterConfig(
        role_to_mesh={role: mesh for role in (roles.ACTOR, roles.REFERENCE, roles.ROLLOUT)},
        rollout_engine='vanilla',
        training_config=rl_cluster.RLTrainingConfig(
            actor_optimizer=optimizer,
            eval_every_n_steps=10**9,
            max_steps=steps,
            mini_batch_size=workload.groups,
            train_micro_batch_size=options.micro,
            rollout_micro_batch_size=min(options.rollout_micro, workload.groups),
        ),
        rollout_config=base_rollout.RolloutConfig(
            max_tokens_to_generate=workload.completion,
            max_prompt_length=workload.prompt,
            kv_cache_size=workload.prompt + workload.completion,
            temperature=1.0,
            top_p=1.0,
            top_k=None,
            eos_tokens=workload.eos_ids,
        ),
    )
    cluster = rl_cluster.RLCluster(
        actor=actor,
        reference=reference,
        tokenizer=workloads.hugging_face_tokenizer(workload.shape.vocab_size),
        cluster_config=config,
    )

    def reward(prompts, completions, **_):
        del prompts
        return [workloads.reward(text) for text in completions]

    algorithm = grpo_learner.GRPOConfig(
        num_generations=workload.group_size, num_iterations=1, beta=workloads.BETA
    )
    return grpo_learner.GRPOLearner(rl_cluster=cluster, reward_fns=reward, algo_config=algorithm)


def make_model(c: Shape) -> Any:
    """A Qwen2 with small random matrices; norms and biases as Tunix makes them."""
    config = qwen2.ModelConfig(
        num_layers=c.layers,
        vocab_size=c.vocab_size,
        embed_dim=c.width,
        hidden_dim=c.mlp_width,
        num_heads=c.heads,
        head_dim=c.head_dim,
        num_kv_heads=c.kv_heads,
        rope_theta=c.rope_theta,
        norm_eps=c.norm_eps,
        use_tied_embedding=c.tied_head,
        dtype=jnp.dtype(c.dtype),
        param_dtype=jnp.dtype(c.dtype),
    )
    model = qwen2.Qwen2(config, rngs=nnx.Rngs(0))
    rng = np.random.default_rng(0)

    def fill(x):
        return x if x.ndim < 2 else jnp.asarray(rng.normal(0, workloads.SPREAD, x.shape), x.dtype)

    nnx.update(model, jax.tree.map(fill, nnx.state(model)))
    return model


def batches(workload: Workload, steps: int, clock: timing.Clock) -> Any:
    """Prompts of each step; asking for the next one ends a step."""
    texts = workloads.prompt_texts(workload.groups * steps, workload.prompt)
    clock.start()
    for k in range(steps + 1):
        if k:
            clock.cut()
        if k < steps:
            yield {'prompts': np.array(texts[k * workload.groups : (k + 1) * workload.groups])}


def wrap(cluster: Any, clock: timing.Clock) -> list[int]:
    """Puts the clock around sampling and scoring; returns the list that tokens are counted in."""
    tokens: list[int] = []

    def count(rollout: Any) -> None:
        tokens.append(sum(map(len, rollout.tokens)))

    cluster.generate = clock.timed('sample', cluster.generate, count)
    cluster.get_ref_per_token_logps = clock.timed(
        'score', cluster.get_ref_per_token_logps, jax.block_until_ready
    )
    cluster.update_actor = clock.timed(
        'gradient',
        cluster.update_actor,
        lambda _: jax.block_until_ready(nnx.state(cluster.actor_trainer.model)),
    )
    return tokens


if __name__ == '__main__':
    main()
