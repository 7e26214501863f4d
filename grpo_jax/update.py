"""The update: one jitted program from rewards to new parameters.

`step(state, ref_params, rollout, rewards, sampling, objective) -> (state, metrics)` computes
advantages, weights, reference and old log-probs (`batch`), then scans inner updates and
microbatches of groups. SFT is the same program with one demonstration per group, reward 1 and the
loss `nll`; DPO with two completions and a preference loss; PPO with a critic in the state.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from grpo_jax import models, sharding
from grpo_jax.advantages import check_group_options
from grpo_jax.algorithm import Algorithm
from grpo_jax.batch import make_batch
from grpo_jax.metrics import reduce_terms, rollout_metrics
from grpo_jax.microbatch import Microbatches, check_rows
from grpo_jax.preferences import PAIRWISE
from grpo_jax.program import Actor, Critic, Program
from grpo_jax.types import Objective, Params, Rollout, Sampling, StepRewards, TrainState

__all__ = ['Algorithm', 'Critic', 'init_state', 'make_step', 'update']


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
) -> TrainState:
    """A fresh training state on the mesh.

    Args:
      model: the decoder.
      optimizer: from `optimizer.adamw`, or any optax transformation.
      params: what is trained, all parameters or the adapters, or a random key to make them from.
        They are copied, since the update program takes its state's memory over.
      mesh: where it lies; the default device without one.
      donate: take the parameters themselves in place of a copy; the caller's are gone.
      critic: its model and optimizer, if there is one.
      value_params: its parameters (copied), or a random key; by default the key of `params`.
      moving_reference: keep a reference in the state, at first a copy of `params`, that follows
        the policy by `Objective.reference_decay`.

    Raises:
      ValueError: a moving reference with adapters, whose reference is their base.
    """
    if moving_reference and model.config.lora.rank:
        raise ValueError(
            'a moving reference with adapters: theirs is the base, which stays; use '
            'reference_decay=1 or train all parameters'
        )

    def make(params, value_params):
        if isinstance(params, jax.Array):
            value_params = params if value_params is None else value_params
            params = models.init(model, params)
            if model.config.lora.rank:
                _, params = models.split(params)
        params = jax.tree.map(jnp.copy, params)
        state = TrainState(jnp.int32(0), params, optimizer.init(params), jnp.int32(0))
        if critic is not None:
            if isinstance(value_params, jax.Array):
                value_params = models.init(critic.model, value_params)
            value_params = jax.tree.map(jnp.copy, value_params)
            moments = critic.optimizer.init(value_params)
            state = state._replace(value_params=value_params, value_opt_state=moments)
        if moving_reference:
            # In float32 whatever the policy is: bfloat16 would round most steps of it away.
            wide = jax.tree.map(lambda x: x.astype(jnp.promote_types(x.dtype, jnp.float32)), params)
            state = state._replace(reference=jax.tree.map(jnp.copy, wide))
        return state

    out = None
    if mesh is not None:
        out = sharding.shardings(jax.eval_shape(make, params, value_params), mesh)
    made = jax.jit(make, out_shardings=out, donate_argnums=0 if donate else ())
    return made(params, value_params)


Step = Callable[..., tuple[TrainState, dict[str, jax.Array]]]


def make_step(
    model: models.Transformer,
    optimizer: optax.GradientTransformation,
    algorithm: Algorithm,
    mesh: Mesh | None = None,
    *,
    critic: Critic | None = None,
    moving_reference: bool = False,
) -> Step:
    """Compiles-on-first-call the update program for one model, optimizer and algorithm.

    Args:
      model: the decoder.
      optimizer: from `optimizer.adamw`, or any optax transformation; a trust region has none.
      algorithm: what to compute.
      mesh: the devices; with one, rollout and rewards lie as `sharding.groups` says and the new
        state as `sharding.shardings`.
      critic: for baseline 'critic'.
      moving_reference: the state holds the reference, see `init_state`.

    Returns:
      `step(state, ref_params, rollout, rewards, sampling, objective) -> (state, metrics)`. It takes
      the old state's memory over. `ref_params` are the reference's; None, or kl='none', leaves the
      KL term and the reference pass out of the program. With adapters they are the base that policy
      and reference share, and always needed. rewards: f32[B, G], or `StepRewards` for process
      supervision. metrics: scalars under the names of the README.

    Raises:
      ValueError: a critic is missing, or nothing reads it.
    """
    if algorithm.has_critic and critic is None:
        raise ValueError(
            "baseline='critic' without a critic: give make_step and init_state critic=Critic(model "
            "with a scalar head, optimizer), or use a group baseline such as 'mean'"
        )
    if critic is not None and not algorithm.has_critic:
        raise ValueError(
            f'a critic with baseline={algorithm.baseline!r}, which does not read it: use '
            "baseline='critic', or leave the critic away"
        )
    step = functools.partial(
        update, model=model, optimizer=optimizer, algorithm=algorithm, mesh=mesh, critic=critic
    )
    if mesh is None:
        return jax.jit(step, donate_argnums=0)
    key = jax.eval_shape(lambda: jax.random.key(0))
    fresh = functools.partial(
        init_state, model, optimizer, critic=critic, moving_reference=moving_reference
    )
    out = (sharding.shardings(jax.eval_shape(fresh, key), mesh), sharding.replicated(mesh))
    return jax.jit(step, donate_argnums=0, out_shardings=out)


def update(
    state: TrainState,
    ref_params: Params | None,
    rollout: Rollout,
    rewards: jax.Array | StepRewards,
    sampling: Sampling,
    objective: Objective,
    *,
    model: models.Transformer,
    optimizer: optax.GradientTransformation,
    algorithm: Algorithm,
    mesh: Mesh | None = None,
    critic: Critic | None = None,
) -> tuple[TrainState, dict[str, jax.Array]]:
    """The program behind `make_step`, not jitted. See there for arguments and result.

    Raises:
      ValueError: the batch does not divide by the microbatch or the mesh, the group is too small,
        attention cannot read packed sequences, or rewards, critic or reference are not what the
        algorithm needs.
    """
    a = algorithm
    _check_rewards(a, rollout, rewards)
    size, group_size, _ = rollout.tokens.shape
    if model.config.lora.rank and ref_params is None:
        raise ValueError('ref_params=None with adapters: give the parameters of their base')
    reference = ref_params if state.reference is None else state.reference
    if a.loss in PAIRWISE and reference is None:
        raise ValueError(f'ref_params=None with loss={a.loss!r}: give the parameters of its policy')
    sharding.check_batch(size, a.microbatch, mesh)
    check_group_options(group_size, baseline=a.baseline, scale=a.scale)
    laid = models.unstacked if a.unroll else lambda params: params
    if a.unroll:
        model = model.clone(unrolled=True)
        critic = critic and critic._replace(model=critic.model.clone(unrolled=True))
    actor = Actor(model, laid(ref_params), sampling, objective, a.logprob_chunk)
    check_rows(a.rows, a.microbatch * group_size, mesh)
    microbatches = Microbatches(a.microbatch, mesh, a.rows, a.widths, a.packed)
    bound = Program(actor, a, optimizer, critic, microbatches)

    def computed(state):
        return state._replace(params=laid(state.params), value_params=laid(state.value_params))

    def inner(state, _):
        gradient, terms = bound.gradient(computed(state), batch)
        if a.unroll:
            gradient = tuple(map(models.stacked, gradient))
        state, applied = bound.apply(state, gradient, batch)
        return state, terms | applied

    with sharding.use(mesh):
        metrics = rollout_metrics(rollout, rewards)
        batch = make_batch(
            a, actor, critic, computed(state), laid(reference), rollout, rewards, microbatches
        )
        state, terms = jax.lax.scan(inner, state, length=a.inner_updates)
    if state.reference is not None:
        share = 1 - jnp.asarray(objective.reference_decay, jnp.float32)
        moved = jax.tree.map(
            lambda old, new: old + share * (new - old), state.reference, state.params
        )
        state = state._replace(reference=moved)
    return state._replace(step=state.step + 1), metrics | reduce_terms(terms)


def _check_rewards(a: Algorithm, rollout: Rollout, rewards: jax.Array | StepRewards) -> None:
    shape = rollout.tokens.shape
    if isinstance(rewards, StepRewards):
        if a.supervision == 'outcome':
            raise ValueError(
                "supervision='outcome' with step rewards, which it does not read: give one reward "
                "for each completion, or use supervision='process'"
            )
        for name, given in rewards._asdict().items():
            if given.shape != shape:
                raise ValueError(
                    f'step rewards have {name} of shape {given.shape}: the rollout needs one for '
                    f'each token, [B, G, T] = {shape}'
                )
        return
    if a.supervision == 'process':
        raise ValueError(
            "supervision='process' without step rewards: give types.StepRewards, or use "
            "supervision='outcome'"
        )
    if rewards.shape != shape[:2]:
        raise ValueError(
            f'rewards have shape {rewards.shape}: the rollout needs one for each completion, '
            f'[B, G] = {shape[:2]}'
        )
