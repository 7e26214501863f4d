"""Abstract arrays: what the programs of a run are called with, without any data."""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from grpo_jax import models, sharding
from grpo_jax.algorithm.config import Algorithm
from grpo_jax.algorithm.sample import sample
from grpo_jax.run.mesh import parameter_shapes
from grpo_jax.run.setup import Setup
from grpo_jax.types import (
    BaselinedRewards,
    FunctionRewards,
    Params,
    Prompts,
    Rollout,
    Sampling,
    StepRewards,
)

Shape = tuple[int, int, int, int]  # B, G, P, T


def key() -> Any:
    """A random key."""
    return jax.eval_shape(lambda: jax.random.key(0))


def params(setup: Setup, model: models.Transformer) -> Params:
    """Parameters of a model on the mesh, those of a frozen base as they are kept."""
    lora = setup.model.config.lora
    base = lora.base if lora.rank and not model.config.scalar_head else 'model'
    return sharding.placed(parameter_shapes(model, base), setup.mesh)


def prompts(shape: Shape, where: Any = None) -> Prompts:
    """A batch of prompts, sharded as `where` says."""
    groups, _, length, _ = shape
    i32: Any = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.int32, sharding=where)
    return Prompts(i32((groups, length)), i32((groups,)), i32((groups,)))


def rollout(shape: Shape) -> Rollout:
    """A rollout with what every rollout holds, not yet on the mesh."""
    groups, group_size, _, columns = shape
    array: Any = jax.ShapeDtypeStruct
    rows, tokens = (groups, group_size), (groups, group_size, columns)
    return Rollout(
        prompts(shape), array(tokens, jnp.int32), array(tokens, jnp.bool),
        array(tokens, jnp.float32), array(rows, jnp.bool),
    )  # fmt: skip


def sampled_rollout(
    setup: Setup, shape: Shape, sampling: Sampling, record: tuple[str, ...], *, kept: bool = False
) -> Rollout:
    """A rollout that the run's sampler returns, not yet on the mesh.

    Args:
      setup: the run.
      shape: B, G, P, T.
      sampling: how completions are sampled; the sampler records a support only under filters.
      record: what the sampler records, see `types.Rollout`.
      kept: whether the completions to train on are chosen.
    """
    result, ends = rollout(shape), jnp.asarray(setup.ends)
    if record:
        draw = functools.partial(
            sample, setup.model, seed=0, step=0, sampling=sampling, eos_ids=ends,
            group_size=shape[1], max_tokens=shape[3], block=shape[3], record=record,
        )  # fmt: skip
        shapes = jax.eval_shape(functools.partial(models.init_params, setup.model), key())
        result = jax.eval_shape(draw, shapes, result.prompts)
    flags: Any = jax.ShapeDtypeStruct(shape[:2], jnp.bool)
    trained = None if setup.environment is None else result.mask
    return result._replace(kept=flags if kept else None, trained=trained)


def rewards(algorithm: Algorithm, shape: Shape, functions: int) -> Any:
    """The rewards of a rollout, as `collector` makes them.

    Args:
      algorithm: of the policy's stage.
      shape: B, G, P, T.
      functions: number of reward functions, with the reward model.
    """
    groups, group_size, _, columns = shape
    f32: Any = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.float32)
    if algorithm.uses_function_rewards:
        return FunctionRewards(f32((groups, group_size, functions)), f32((groups, functions)))
    if algorithm.supervision == 'process':
        tokens = groups, group_size, columns
        ends: Any = jax.ShapeDtypeStruct(tokens, jnp.bool)
        return StepRewards(f32(tokens), ends)
    if algorithm.baseline == 'greedy':
        return BaselinedRewards(f32((groups, group_size)), f32((groups,)))
    return f32((groups, group_size))


def on_mesh(setup: Setup, rollout: Rollout, rewards: Any) -> tuple[Rollout, Any]:
    """A rollout and its rewards with the shardings of `sharding.put_rollout`."""
    where = sharding.rollout_shardings(rollout, rewards, setup.mesh)
    placed: tuple[Rollout, Any] = jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), (rollout, rewards), where
    )
    return placed
