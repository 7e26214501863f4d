"""Checks of the inputs of a training step, before its computation is traced."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from grpo_jax import models
from grpo_jax.algorithm.config import Algorithm
from grpo_jax.algorithm.critic import Critic
from grpo_jax.algorithm.estimators import check_group_size, total_rewards
from grpo_jax.engine.bundles import check_rows
from grpo_jax.engine.compute import ComputePlan
from grpo_jax.engine.policy import Policy
from grpo_jax.sharding import check_batch
from grpo_jax.types import (
    BaselinedRewards,
    Batch,
    FunctionRewards,
    Params,
    Rewards,
    Rollout,
    Scalar,
    StepRewards,
    TrainState,
)


def shape_of(rollout: Rollout) -> tuple[int, int, int, int]:
    """(B, G, P, T)."""
    groups, group_size, length = rollout.tokens.shape
    return groups, group_size, rollout.prompts.tokens.shape[1], length


def check_inputs(
    algorithm: Algorithm,
    state: TrainState,
    ref_params: Params | None,
    rollout: Rollout,
    rewards: Rewards,
    model: models.Transformer,
) -> None:
    """Checks that rewards, reference and group size are what the algorithm needs.

    Raises:
      ValueError: one of them is missing or does not fit.
    """
    a = algorithm
    _check_rewards(a, rollout, rewards)
    check_support(a, recorded=rollout.support is not None)
    check_group_size(a, rollout.tokens.shape[1])
    if model.config.lora.rank and ref_params is None:
        raise ValueError('ref_params=None with adapters: pass the parameters of the base model')
    if a.uses_reference and ref_params is None and state.reference is None:
        use = f'loss={a.name_of_loss!r}' if a.pairwise or not a.has_kl else f'beta={a.beta}'
        raise ValueError(
            f'ref_params=None with {use}, which needs a reference: pass its parameters'
            + ('' if a.pairwise else ', or set beta=0')
        )
    if a.balances_routers:
        check_routers(a.router_balance, model.config.experts)
    if a.moves_reference and state.reference is None:
        raise ValueError(
            f'reference_decay={a.reference_decay} with a state that has no reference of its own: '
            'create it with init_state(..., moving_reference=True), or set reference_decay=1'
        )


def check_support(algorithm: Algorithm, *, recorded: bool) -> None:
    """Checks that the update uses a support that the sampler recorded.

    Raises:
      ValueError: it does not.
    """
    if recorded and algorithm.step == 'trust_region':
        raise ValueError(
            "a recorded support has no effect with step='trust_region', which applies the filters "
            "to each policy's own logits: sample without record='support'"
        )


def check_routers(weight: Scalar, experts: int, *, name: str = 'router_balance') -> None:
    """Checks that a model whose routers are to be balanced has some.

    Args:
      weight: `Algorithm.router_balance`, not 0.
      experts: of each layer; 0: the model has none.
      name: of the weight, for error messages.

    Raises:
      ValueError: it has none.
    """
    if not experts:
        raise ValueError(f'{name}={weight} has no effect with a model without experts: remove it')


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


def trace_loss(
    loss_fn: Callable[..., jax.Array], algorithm: Algorithm, policy: Policy, batch: Batch
) -> None:
    """Traces the loss for all shapes that the engine calls it with; JAX then reuses the result.

    So Python runs a loss here and not inside of the engine's loops, and a mistake in a loss of your
    own gives a short traceback, before anything is compiled.

    Args:
      loss_fn: `update.loss_fn`, jitted.
      algorithm: the options.
      policy: the model and its plan.
      batch: what the loss uses, [B, G, T].
    """
    a, part, mesh = algorithm, batch.loss_inputs(), jax.sharding.get_abstract_mesh()
    # A part of the type that it has inside of the loops, or JAX would not find the trace again.
    where = None if mesh.empty else NamedSharding(mesh, PartitionSpec())
    for shape in policy.loss_shapes(part.rollout.mask.shape, tokenwise=a.tokenwise):
        array = functools.partial(jax.ShapeDtypeStruct, shape, sharding=where)
        logprobs, arrays = array(jnp.float32), jax.tree.map(lambda x, f=array: f(x.dtype), part)
        jax.eval_shape(loss_fn, a, logprobs, logprobs if a.needs_entropy else None, arrays)


def check_plan(
    algorithm: Algorithm, plan: ComputePlan, rollout: Rollout, mesh: Mesh | None
) -> None:
    """Checks that the batch can be cut as planned, and that the algorithm allows it.

    Raises:
      ValueError: the batch is not divisible, or the plan does not fit the algorithm.
    """
    groups, group_size, *_ = shape_of(rollout)
    check_batch(groups, plan.microbatch, mesh, group_size=group_size)
    check_rows(plan.rows, plan.microbatch * group_size, mesh)
    if plan.rows and algorithm.pairwise:
        raise ValueError(
            f'rows={plan.rows} with loss={algorithm.loss!r}, which compares whole groups: use '
            'rows=0'
        )
    if plan.packed and not algorithm.tokenwise:
        masks, value = algorithm.masks_off_policy, algorithm.off_policy_threshold
        threshold = f', off_policy_threshold={value}' if masks else ''
        raise ValueError(
            f'packed=True with loss={algorithm.name_of_loss!r}, ratio={algorithm.ratio!r}, '
            f'importance={algorithm.importance!r}{threshold}, which need whole completions: use '
            'packed=False'
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


def _check_rewards(a: Algorithm, rollout: Rollout, rewards: Rewards) -> None:
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
    if isinstance(rewards, BaselinedRewards) != (a.baseline == 'greedy'):
        raise ValueError(
            "baseline='greedy' without the reward of each prompt's greedy completion: pass "
            'BaselinedRewards'
            if a.baseline == 'greedy'
            else f'the baseline of BaselinedRewards has no effect with baseline={a.baseline!r}: '
            "pass their values alone, or use baseline='greedy'"
        )
    if isinstance(rewards, FunctionRewards) != a.uses_function_rewards:
        given = 'rewards of each function are' if a.uses_function_rewards else 'their sum is'
        raise ValueError(
            f'reward_aggregation={a.reward_aggregation!r} with advantage_estimator='
            f'{a.name_of_estimator!r}: {given} needed; pass '
            + ('FunctionRewards' if a.uses_function_rewards else 'one reward for each completion')
        )
    if a.supervision == 'process':
        raise ValueError(
            "supervision='process' without step rewards: pass StepRewards, or use "
            "supervision='outcome'"
        )
    given_shape = jax.eval_shape(total_rewards, rewards).shape
    if given_shape != shape[:2]:
        raise ValueError(
            f'rewards have shape {given_shape}: the rollout needs one for each completion, '
            f'[B, G] = {shape[:2]}'
        )
    if isinstance(rewards, BaselinedRewards) and rewards.baseline.shape != shape[:1]:
        raise ValueError(
            f'the baseline has shape {rewards.baseline.shape}: the rollout needs one for each '
            f'prompt, [B] = {shape[:1]}'
        )
