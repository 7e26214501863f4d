"""The training state and the jitted training step, sharded over a mesh."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from grpo_jax import models, sharding
from grpo_jax.algorithm.checks import check_critic
from grpo_jax.algorithm.config import Algorithm
from grpo_jax.algorithm.critic import Critic
from grpo_jax.algorithm.update import train_step
from grpo_jax.engine.compute import Compute
from grpo_jax.types import Params, Rollout, Sampling, TrainState

Step = Callable[..., tuple[TrainState, dict[str, jax.Array]]]
MOMENTS = ('opt_state', 'value_opt_state')  # of a TrainState


def init_state(
    model: models.Transformer,
    optimizer: optax.GradientTransformation,
    params: Params | jax.Array,
    mesh: Mesh | None = None,
    *,
    donate: bool = False,
    critic: Critic | None = None,
    value_params: Params | jax.Array | None = None,
    moving_reference: bool = False,
    offload_moments: bool = False,
) -> TrainState:
    """A new training state on the mesh.

    Args:
      model: the decoder.
      optimizer: any optax transformation.
      params: what is trained (all parameters, or the adapters), or a random key to make them from.
        They are copied, since the training step donates its state.
      mesh: the devices; None: the default device.
      donate: donate `params` instead of copying them.
      critic: the critic's model and optimizer, if there is one.
      value_params: the critic's parameters (copied), or a random key; None: the key in `params`.
      moving_reference: keep a reference in the state that starts as a copy of `params` and follows
        the policy by `Algorithm.reference_decay`.
      offload_moments: keep moments in the host's memory, see `make_train_step`.

    Raises:
      ValueError: a moving reference with adapters, for which the reference is the fixed base; or
        devices that cannot read the host's memory.
    """
    if offload_moments:
        sharding.check_host_memory(mesh, 'offload_moments')
    if moving_reference and model.config.lora.rank:
        raise ValueError(
            'moving_reference=True with adapters, whose reference is their fixed base: use '
            'reference_decay=1, or train all parameters'
        )
    if critic is not None and value_params is None and not isinstance(params, jax.Array):
        raise ValueError(
            'a critic without value_params: pass its parameters, such as models.scalar_params of '
            "the policy's, or a random key"
        )

    def make(params: Any, value_params: Any) -> TrainState:
        if isinstance(params, jax.Array):
            value_params = params if value_params is None else value_params
            params = models.init_params(model, params)
            if model.config.lora.rank:
                _, params = models.split_adapters(params)
        params = jax.tree.map(jnp.copy, params)
        state = TrainState(jnp.int32(0), params, optimizer.init(params), jnp.int32(0))
        if critic is not None:
            if isinstance(value_params, jax.Array):
                value_params = models.init_params(critic.model, value_params)
            value_params = jax.tree.map(jnp.copy, value_params)
            moments = critic.optimizer.init(value_params)
            state = state._replace(value_params=value_params, value_opt_state=moments)
        if moving_reference:
            # At least float32: bfloat16 would round most of its small steps to 0.
            wide = jax.tree.map(lambda x: x.astype(jnp.promote_types(x.dtype, jnp.float32)), params)
            state = state._replace(reference=jax.tree.map(jnp.copy, wide))
        return state

    out = None
    if mesh is not None:
        made = jax.eval_shape(make, params, value_params)
        out = sharding.shardings(made, mesh, host=MOMENTS if offload_moments else ())
    program = jax.jit(make, out_shardings=out, donate_argnums=0 if donate else ())
    return program(params, value_params)


def make_train_step(
    model: models.Transformer,
    optimizer: optax.GradientTransformation,
    algorithm: Algorithm,
    mesh: Mesh | None = None,
    *,
    compute: Compute | None = None,
    critic: Critic | None = None,
    offload_moments: bool = False,
) -> Step:
    """The jitted training step of one model, optimizer and algorithm.

    Args:
      model: the decoder.
      optimizer: any optax transformation; step='trust_region' does not use it.
      algorithm: what the step computes.
      mesh: the devices; with one, rollout and rewards are placed by `sharding.put_rollout`, and the
        new state is sharded as `sharding.shardings`.
      compute: how the step computes it; None: chosen from shapes and platform.
      critic: the critic's model and optimizer, for baseline='critic'.
      offload_moments: the state's moments lie in the host's memory, those of policy and critic.
        They are copied to the devices for the update of the parameters, and back.

    Returns:
      `step(state, ref_params, rollout, rewards, sampling=Sampling(), algorithm=algorithm)`, which
      returns (state, metrics) and donates the old state. ref_params: the reference's parameters, or
      with adapters the base that policy and reference share; None without a reference. rewards:
      f32[B, G], or `StepRewards` for process supervision. algorithm: pass one with other
      coefficients but the same choices for a schedule. metrics: f32[] scalars by name.

    Raises:
      ValueError: the critic is missing, or has no effect; or devices that cannot read the host's
        memory.
    """
    check_critic(algorithm, critic)
    if offload_moments:
        sharding.check_host_memory(mesh, 'offload_moments')
    sharding.check_heads(model.config.heads, model.config.kv_heads, mesh)
    settings = {
        'model': model, 'optimizer': optimizer, 'compute': compute, 'mesh': mesh,
        'critic_model': critic,
    }  # fmt: skip
    default_sampling, default_algorithm = Sampling(), algorithm

    def step(
        state: TrainState,
        ref_params: Params | None,
        rollout: Rollout,
        rewards: Any,
        sampling: Sampling = default_sampling,
        algorithm: Algorithm = default_algorithm,
    ) -> tuple[TrainState, dict[str, jax.Array]]:
        return train_step(state, ref_params, rollout, rewards, sampling, algorithm, **settings)

    out: Any = None
    if mesh is not None:
        fresh = functools.partial(
            init_state, model, optimizer, critic=critic, moving_reference=algorithm.moves_reference
        )
        shapes = jax.eval_shape(fresh, jax.eval_shape(lambda: jax.random.key(0)))
        where = sharding.shardings(shapes, mesh, host=MOMENTS if offload_moments else ())
        out = where, sharding.replicated(mesh)
    return jax.jit(step, donate_argnums=0, out_shardings=out)
