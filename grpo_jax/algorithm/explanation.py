"""What an update does with each token: the terms of its loss, and its gradient coefficient."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Bool, Float

from grpo_jax import models, sharding
from grpo_jax.algorithm import checks, losses
from grpo_jax.algorithm.config import Algorithm
from grpo_jax.algorithm.critic import Critic
from grpo_jax.algorithm.off_policy import sequence_level
from grpo_jax.algorithm.update import loss_fn, make_batch, select_tokens
from grpo_jax.engine.compute import Compute, choose
from grpo_jax.engine.policy import Policy, ValueModel
from grpo_jax.types import Array, Batch, Params, Rewards, Rollout, Sampling, TrainState


class TokenTerms(NamedTuple):
    """The terms of an update's loss for each token; 0 or false outside of the mask.

    What the algorithm does not use is None.
    """

    logprobs: Float[Array, 'B G T']  # of the policy that is updated
    old_logprobs: Float[Array, 'B G T']  # of the policy before the inner updates
    sampled_logprobs: Float[Array, 'B G T']  # that the sampler recorded
    ratio: Float[Array, 'B G T']  # as `Algorithm.ratio` defines it
    advantages: Float[Array, 'B G T']
    weights: Float[Array, 'B G T']  # the loss is sum(weights * losses)
    losses: Float[Array, 'B G T']
    coefficients: Float[Array, 'B G T']  # d loss / d log-prob: weights, clipping and KL included
    trained: Bool[Array, 'B G T']  # whether the token counts in the loss
    ref_logprobs: Float[Array, 'B G T'] | None = None  # of the reference
    kl: Float[Array, 'B G T'] | None = None  # by the estimator `Algorithm.kl`, in nats
    entropy: Float[Array, 'B G T'] | None = None  # of the policy that is updated, in nats
    clipped: Bool[Array, 'B G T'] | None = None  # whether a bound removes the ratio's gradient
    values: Float[Array, 'B G T'] | None = None  # of the critic before the inner updates
    returns: Float[Array, 'B G T'] | None = None  # the critic's targets


def explain(
    state: TrainState,
    ref_params: Params | None,
    rollout: Rollout,
    rewards: Rewards,
    sampling: Sampling,
    algorithm: Algorithm,
    *,
    model: models.Transformer,
    compute: Compute | None = None,
    mesh: Mesh | None = None,
    critic_model: Critic | None = None,
    updated: Params | None = None,
) -> TokenTerms:
    """The terms of an update, not jitted; for arguments and result see `make_explain`.

    Raises:
      ValueError: as `update.train_step`.
    """
    a = algorithm
    checks.check_critic(a, critic_model)
    checks.check_inputs(a, state, ref_params, rollout, rewards, model)
    plan = choose(compute or Compute(), model.config, checks.shape_of(rollout), mesh)
    checks.check_plan(a, plan, rollout, mesh)
    policy = Policy(plan.configure(model), ref_params, sampling, plan, mesh)
    value_model = None if critic_model is None else ValueModel(critic_model.model, plan, mesh)
    params = state.params if updated is None else updated
    with sharding.use(mesh, splits_params=True):
        batch = make_batch(a, policy, value_model, state, rollout, rewards)
        if updated is not None and batch.old_logprobs is None:
            old = policy.outputs(state.params, batch)['logprobs']
            batch = batch._replace(old_logprobs=old)
        batch = select_tokens(a, policy, params, batch)
        outputs = policy.outputs(params, batch, entropy=a.needs_entropy)
        return _terms(a, outputs['logprobs'], outputs.get('entropy'), batch)


def _terms(a: Algorithm, logprobs: Array, entropy: Array | None, batch: Batch) -> TokenTerms:
    def of_group(logprobs: Array, entropy: Array | None, group: Batch) -> tuple[Any, ...]:
        old = losses.arrays_of(a, logprobs, group, entropy)['old_logprobs']
        level = sequence_level(logprobs, old, group.rollout.policy_mask, a.ratio)
        return old, jnp.exp(level - old), *losses.policy_loss(a, logprobs, group, entropy)

    old, ratio, per_token, kl = jax.vmap(of_group)(logprobs, entropy, batch)
    coefficients = jax.grad(functools.partial(loss_fn, a))(logprobs, entropy, batch)
    trained = batch.weights > 0
    if batch.selected is not None:
        trained &= batch.selected
    clipped = None
    if a.has_clip_bounds:
        low, high = ratio < 1 - a.clip_low, ratio > 1 + a.clip_high
        if a.loss == 'cispo':  # whose bounds limit a weight, whatever the advantage's sign
            clipped = trained & (low | high)
        else:
            clipped = trained & jnp.where(batch.advantages < 0, low, high)
            clipped &= batch.advantages != 0
    terms = TokenTerms(
        logprobs, old, batch.rollout.logprobs, ratio, batch.advantages, batch.weights, per_token,
        coefficients, trained, batch.ref_logprobs, kl, entropy, clipped, batch.old_values,
        batch.returns,
    )  # fmt: skip
    mask = batch.rollout.policy_mask
    return jax.tree.map(lambda x: jnp.where(mask, x, jnp.zeros((), x.dtype)), terms)


def make_explain(
    model: models.Transformer,
    algorithm: Algorithm,
    mesh: Mesh | None = None,
    *,
    compute: Compute | None = None,
    critic: Critic | None = None,
) -> Callable[..., TokenTerms]:
    """The jitted function that shows what a training step does with each token.

    Its log-probs are computed as `program.make_train_step` does with the same arguments, and its
    coefficients by automatic differentiation of the same loss.

    Args:
      model: the decoder.
      algorithm: what the step computes.
      mesh: the devices, see `program.make_train_step`.
      compute: how the step computes it; None: chosen from shapes and platform.
      critic: the critic's model and optimizer, for baseline='critic'.

    Returns:
      `explain(state, ref_params, rollout, rewards, sampling=Sampling(), algorithm=algorithm, *,
      updated=None)`, which returns `TokenTerms` and donates nothing. The arguments are those of the
      step, with the state before it: the terms are those of its first inner update, at which ratios
      are 1. For those of a later one pass the parameters before it as `updated`.
    """
    checks.check_critic(algorithm, critic)
    settings: dict[str, Any] = {
        'model': model,
        'compute': compute,
        'mesh': mesh,
        'critic_model': critic,
    }
    default_sampling, default_algorithm = Sampling(), algorithm

    def run(
        state: TrainState,
        ref_params: Params | None,
        rollout: Rollout,
        rewards: Rewards,
        sampling: Sampling = default_sampling,
        algorithm: Algorithm = default_algorithm,
        *,
        updated: Params | None = None,
    ) -> TokenTerms:
        return explain(
            state, ref_params, rollout, rewards, sampling, algorithm, updated=updated, **settings
        )

    out = None if mesh is None else sharding.replicated(mesh)
    return jax.jit(run, out_shardings=out)
