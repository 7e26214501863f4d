"""Checks of the inputs of a training step, before its computation is traced."""

from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Float

from grpo_jax import models
from grpo_jax.algorithm.advantages import check_group_options
from grpo_jax.algorithm.binding import bind
from grpo_jax.algorithm.config import Algorithm
from grpo_jax.algorithm.critic import Critic
from grpo_jax.algorithm.losses import arrays_of
from grpo_jax.engine.bundles import check_rows
from grpo_jax.engine.compute import ComputePlan
from grpo_jax.sharding import check_batch
from grpo_jax.types import Array, Batch, Params, Rollout, StepRewards, TrainState


def shape_of(rollout: Rollout) -> tuple[int, int, int, int]:
    """(B, G, P, T)."""
    groups, group_size, length = rollout.tokens.shape
    return groups, group_size, rollout.prompts.tokens.shape[1], length


def check_inputs(
    algorithm: Algorithm,
    state: TrainState,
    ref_params: Params | None,
    rollout: Rollout,
    rewards: Float[Array, 'B G'] | StepRewards,
    model: models.Transformer,
) -> None:
    """Checks that rewards, reference and group size are what the algorithm needs.

    Raises:
      ValueError: one of them is missing or does not fit.
    """
    a = algorithm
    _check_rewards(a, rollout, rewards)
    check_group_options(rollout.tokens.shape[1], baseline=a.baseline, scale=a.scale)
    if model.config.lora.rank and ref_params is None:
        raise ValueError('ref_params=None with adapters: pass the parameters of the base model')
    if a.uses_reference and ref_params is None and state.reference is None:
        use = f'loss={a.name_of_loss!r}' if a.pairwise or not a.has_kl else f'beta={a.beta}'
        raise ValueError(
            f'ref_params=None with {use}, which needs a reference: pass its parameters'
            + ('' if a.pairwise else ', or set beta=0')
        )
    if a.moves_reference and state.reference is None:
        raise ValueError(
            f'reference_decay={a.reference_decay} with a state that has no reference of its own: '
            'create it with init_state(..., moving_reference=True), or set reference_decay=1'
        )


def check_critic(algorithm: Algorithm, critic: Critic | None) -> None:
    """Checks that there is a critic where advantages come from one, and only there.

    Raises:
      ValueError: it is missing, or has no effect.
    """
    if algorithm.has_critic and critic is None:
        raise ValueError(
            "baseline='critic' without a critic: pass critic=Critic(model with a scalar head, "
            "optimizer), or use a group baseline such as 'mean'"
        )
    if critic is not None and not algorithm.has_critic:
        raise ValueError(
            f'a critic has no effect with baseline={algorithm.baseline!r}: use '
            "baseline='critic', or remove the critic"
        )


def check_loss(algorithm: Algorithm, rollout: Rollout) -> None:
    """Traces the loss of one group, so that a mistake in a loss of your own is reported early.

    Raises:
      ValueError: it has a parameter that nothing provides, or its shape is not [G, T].
    """
    shape = rollout.tokens.shape[1:]
    array: Any = jax.ShapeDtypeStruct(shape, jnp.float32)
    absent: Any = None
    ref = array if algorithm.uses_reference else None
    mask: Any = jax.ShapeDtypeStruct(shape, bool)
    group = Batch(Rollout(absent, absent, mask, array, absent), array, array, ref, array)
    entropy = array if algorithm.needs_entropy else None

    def evaluate(logprobs: jax.Array, group: Batch, entropy: jax.Array | None) -> Any:
        arrays = arrays_of(logprobs, group, entropy)
        return bind(algorithm.loss_function, arrays, algorithm.coefficients)()

    loss = jax.eval_shape(evaluate, array, group, entropy)
    if loss.shape != shape:
        raise ValueError(
            f'the loss {algorithm.name_of_loss!r} returned shape {loss.shape}: it has to return '
            f'one number for each token, [G, T] = {shape}'
        )


def check_plan(
    algorithm: Algorithm, plan: ComputePlan, rollout: Rollout, mesh: Mesh | None
) -> None:
    """Checks that the batch can be cut as planned, and that the algorithm allows it.

    Raises:
      ValueError: the batch is not divisible, or the plan does not fit the algorithm.
    """
    groups, group_size, *_ = shape_of(rollout)
    check_batch(groups, plan.microbatch, mesh)
    check_rows(plan.rows, plan.microbatch * group_size, mesh)
    if plan.rows and algorithm.pairwise:
        raise ValueError(
            f'rows={plan.rows} with loss={algorithm.loss!r}, which compares whole groups: use '
            'rows=0'
        )
    if plan.packed and not algorithm.tokenwise:
        raise ValueError(
            f'packed=True with loss={algorithm.name_of_loss!r}, ratio={algorithm.ratio!r}, '
            f'importance={algorithm.importance!r}, which need whole completions: use packed=False'
        )
    if plan.rows and not isinstance(algorithm.loss, str):
        raise ValueError(
            f'rows={plan.rows} with a loss of your own, which may compare completions: use rows=0'
        )
    if plan.unroll and algorithm.step == 'trust_region':
        raise ValueError(
            "unroll=True with step='trust_region', whose Fisher products scan over the layers: "
            'use unroll=False'
        )


def _check_rewards(
    a: Algorithm, rollout: Rollout, rewards: Float[Array, 'B G'] | StepRewards
) -> None:
    shape = rollout.tokens.shape
    if isinstance(rewards, StepRewards):
        if a.supervision == 'outcome':
            raise ValueError(
                "step rewards have no effect with supervision='outcome': pass one reward for each "
                "completion, or use supervision='process'"
            )
        for name, array in rewards._asdict().items():
            if array.shape != shape:
                raise ValueError(
                    f'step rewards have {name} of shape {array.shape}: the rollout needs one for '
                    f'each token, [B, G, T] = {shape}'
                )
        return
    if a.supervision == 'process':
        raise ValueError(
            "supervision='process' without step rewards: pass StepRewards, or use "
            "supervision='outcome'"
        )
    if rewards.shape != shape[:2]:
        raise ValueError(
            f'rewards have shape {rewards.shape}: the rollout needs one for each completion, '
            f'[B, G] = {shape[:2]}'
        )
