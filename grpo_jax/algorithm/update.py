"""The update: new parameters from a rollout and its rewards, in one program.

In order: `make_batch` (advantages, weights, reference and old log-probs, once per rollout),
`loss_fn` (from log-probs to the loss) and `train_step` (gradient and optimizer step).
`program.make_train_step` compiles it. SFT is the same program with one demonstration per group,
reward 1 and the loss 'nll'; DPO has two completions and a preference loss; PPO has a critic.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh
from jaxtyping import Float

from grpo_jax import models, sharding
from grpo_jax.algorithm import (
    advantages,
    checks,
    covariance,
    critic,
    estimators,
    losses,
    metrics,
    router_balance,
    trpo,
)
from grpo_jax.algorithm.config import Algorithm
from grpo_jax.algorithm.logprobs import highest_entropy, token_weights
from grpo_jax.algorithm.optimizer import accept_params, apply_gradient, apply_value_gradient
from grpo_jax.engine.compute import Compute, choose
from grpo_jax.engine.policy import Policy, ValueModel
from grpo_jax.types import Array, Batch, Params, Rewards, Rollout, Sampling, TrainState


def make_batch(
    algorithm: Algorithm,
    policy: Policy,
    value_model: ValueModel | None,
    state: TrainState,
    rollout: Rollout,
    rewards: Rewards,
) -> Batch:
    """Computes what all inner updates share; fields that the algorithm does not use are None.

    Args:
      algorithm: the options.
      policy: the model, its sampling distribution and its reference.
      value_model: the critic; None unless baseline='critic'.
      state: parameters of the policy and the critic.
      rollout: the completions.
      rewards: f32[B, G], or those of each step or of each function.
    """
    a, mask = algorithm, rollout.policy_mask
    absent: Any = None  # a field that is not computed, or not yet
    batch = Batch(rollout, advantages=absent, weights=absent)
    old = ref = penalty = values = returns = absent
    if a.needs_old_logprobs:  # otherwise they equal the current ones
        old = policy.outputs(state.params, batch)['logprobs']
    if a.uses_reference:
        reference = policy.ref_params if state.reference is None else state.reference
        own = batch.without_routing()
        ref = policy.without_adapters().outputs(reference, own)['logprobs']
    if a.kl_in_reward:
        kl = losses.kl_divergence(old, ref, a.kl, a.kl_clamp)
        penalty = a.beta * jnp.where(mask, kl, 0.0)

    if value_model is None:
        advantage = estimators.estimate(a, rewards, rollout, penalty)
    else:
        values = value_model.outputs(state.value_params, batch)['values']
        advantage = critic.estimate(a, rewards, values, rollout, penalty)
        returns = advantage + values
    trained = mask if rollout.kept is None else mask & rollout.kept[..., None]
    if a.scale == 'batch':
        advantage = advantages.normalize_batch(advantage, trained, eps=a.advantage_eps)
    weights = token_weights(trained, aggregation=a.aggregation, microbatch=policy.plan.microbatch)
    chosen = absent
    if a.covariance != 'none':
        chosen = covariance.choose_tokens(a, old, advantage, trained, state.step)
    selected = trained if a.masks_entropy else absent  # until the first inner update
    return Batch(rollout, advantage, weights, ref, old, values, returns, chosen, selected)


def select_tokens(algorithm: Algorithm, policy: Policy, params: Params, batch: Batch) -> Batch:
    """The batch with the tokens selected at which the current policy's entropy is highest."""
    if not algorithm.masks_entropy:
        return batch
    entropy, trained = policy.outputs(params, batch, entropy=True)['entropy'], batch.weights > 0
    return batch._replace(selected=highest_entropy(entropy, trained, algorithm.top_entropy))


@functools.partial(jax.jit, inline=True)
def loss_fn(
    algorithm: Algorithm,
    logprobs: Float[Array, 'B G T'],
    entropy: Float[Array, 'B G T'] | None,
    batch: Batch,
) -> Float[Array, '']:
    """The loss of a batch: the weighted sum over tokens of `losses.policy_loss`.

    A sum, so `Policy.gradient` may add up parts: groups, or any tokens if the loss is tokenwise.
    Jitted, so that JAX traces it once for each shape of a part, see `checks.trace_loss`.
    """

    def group_loss(logprobs: Array, entropy: Array | None, group: Batch) -> Array:
        per_token, _ = losses.policy_loss(algorithm, logprobs, group, entropy)
        return jnp.where(group.rollout.policy_mask, group.weights * per_token, 0.0).sum()

    return jax.vmap(group_loss)(logprobs, entropy, batch).sum()


def train_step(
    state: TrainState,
    ref_params: Params | None,
    rollout: Rollout,
    rewards: Rewards,
    sampling: Sampling,
    algorithm: Algorithm,
    *,
    model: models.Transformer,
    optimizer: optax.GradientTransformation,
    compute: Compute | None = None,
    mesh: Mesh | None = None,
    critic_model: critic.Critic | None = None,
) -> tuple[TrainState, dict[str, jax.Array]]:
    """One training step, not jitted; for arguments and result see `program.make_train_step`.

    Raises:
      ValueError: the batch is not divisible by the microbatch or the mesh, the group is too small,
        the loss has a parameter that nothing provides, or rewards, critic, reference or `compute`
        do not fit the algorithm.
    """
    a = algorithm
    checks.check_critic(a, critic_model)
    checks.check_inputs(a, state, ref_params, rollout, rewards, model)
    plan = choose(compute or Compute(), model.config, checks.shape_of(rollout), mesh)
    checks.check_plan(a, plan, rollout, mesh)
    policy = Policy(plan.configure(model), ref_params, sampling, plan, mesh)
    value_model = None if critic_model is None else ValueModel(critic_model.model, plan, mesh)

    def inner_update(state: TrainState, _: None) -> tuple[TrainState, dict[str, jax.Array]]:
        batch = select_tokens(a, policy, state.params, shared)
        # The gradient of loss_fn, and the log-probs f32[B, G, T] (and entropies) it came from.
        gradient, outputs = policy.gradient(
            functools.partial(loss_fn, a), state.params, batch,
            tokenwise=a.tokenwise, entropy=a.needs_entropy,
        )  # fmt: skip
        terms = metrics.policy_terms(a, outputs['logprobs'], outputs.get('entropy'), batch)
        gradient, aux = router_balance.add_gradient(a, policy, state.params, batch, gradient)
        terms |= aux
        value_gradient = None
        if value_model is not None:
            # Policy first, then critic: never the activations of both in memory.
            gradient, params = jax.lax.optimization_barrier((gradient, state.value_params))
            value_loss = functools.partial(critic.loss_fn, a)
            value_gradient, outputs = value_model.gradient(value_loss, params, batch)
            terms |= metrics.critic_terms(a, outputs['values'], batch)

        finite = jnp.isfinite(optax.tree.norm((gradient, value_gradient)))
        if a.step == 'trust_region':
            params, step_terms = trpo.step(a, policy, loss_fn, state.params, gradient, batch)
            state = accept_params(state, params, finite)
        else:
            state, step_terms = apply_gradient(optimizer, state, gradient, finite)
        if critic_model is not None:
            critic_optimizer = critic_model.optimizer
            state, norm = apply_value_gradient(critic_optimizer, state, value_gradient, finite)
            step_terms |= norm
        return state, terms | step_terms | {'skipped_updates': state.skipped}

    with sharding.use(mesh, splits_params=True):
        shared = make_batch(a, policy, value_model, state, rollout, rewards)
        checks.trace_loss(loss_fn, a, policy, shared)
        state, terms = jax.lax.scan(inner_update, state, length=a.inner_updates)
        scalars = metrics.rollout_metrics(rollout, rewards) | metrics.reduce_terms(terms)
    state = state._replace(step=state.step + 1, reference=_moved_reference(a, state))
    return state, scalars


def _moved_reference(algorithm: Algorithm, state: TrainState) -> Params | None:
    """The new reference d * reference + (1 - d) * policy; None if the state has none."""
    if state.reference is None:
        return None
    share = 1 - jnp.asarray(algorithm.reference_decay, jnp.float32)
    return jax.tree.map(lambda old, new: old + share * (new - old), state.reference, state.params)
