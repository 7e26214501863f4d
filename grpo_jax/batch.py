"""Rewards to a `Batch`: what stays fixed during the inner updates, from the whole batch at once."""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from grpo_jax import losses
from grpo_jax.advantages import gae, group_advantages, normalize_batch, process_advantages
from grpo_jax.algorithm import Algorithm
from grpo_jax.microbatch import Microbatches
from grpo_jax.program import Actor, Critic
from grpo_jax.score import least_certain, token_weights
from grpo_jax.types import Batch, Objective, Params, Rollout, StepRewards, TrainState


def make_batch(
    algorithm: Algorithm,
    actor: Actor,
    critic: Critic | None,
    state: TrainState,
    reference: Params | None,
    rollout: Rollout,
    rewards: jax.Array | StepRewards,
    microbatches: Microbatches,
) -> Batch:
    """Advantages, weights, reference and old log-probs of a rollout; those that the loss reads.

    Args:
      algorithm: what the loss reads.
      actor: gives log-probs.
      critic: for baseline 'critic'.
      state: the parameters of the policy, and of the critic.
      reference: parameters, or None to leave the KL term out.
      rollout: the completions.
      rewards: f32[B, G], or one for each step.
      microbatches: how many groups are computed at a time.
    """
    a, objective, mask = algorithm, actor.objective, rollout.mask
    bare = Batch(rollout, None, None)
    in_reward = reference is not None and a.kl != 'none' and a.kl_place == 'reward'
    old: Any = None
    ref: Any = None
    entropy: Any = None
    if a.inner_updates > 1 or in_reward or a.entropy_mask or a.step == 'trust_region':
        # Else the current log-probs are the old ones.
        scores = functools.partial(actor.scores, entropy=a.entropy_mask)
        found = microbatches.outputs(actor.reader, scores, state.params, bare)
        old, entropy = found['logprobs'], found.get('entropy')
    if reference is not None and a.reads_reference:
        other = actor.reference()
        ref = microbatches.outputs(other.reader, other.scores, reference, bare)['logprobs']
    penalty: Any = None
    if in_reward:
        divergence = losses.kl_term(old, ref, a.kl, objective)
        penalty = objective.beta * jnp.where(mask, divergence, 0.0)
    values: Any = None
    returns: Any = None
    if critic is not None:
        found = microbatches.outputs(critic.reader, critic.values, state.value_params, bare)
        values = found['values']
        advantages = _critic_advantages(rewards, penalty, values, mask, objective)
        returns = advantages + values
    else:
        advantages = _group_advantages(a, rewards, penalty, mask)
    trained = mask if rollout.kept is None else mask & rollout.kept[..., None]
    if a.scale == 'batch':
        advantages = normalize_batch(advantages, trained, eps=a.advantage_eps)
    weights = token_weights(trained, aggregation=a.aggregation, microbatch=a.microbatch)
    if a.entropy_mask:
        share = jnp.asarray(objective.top_entropy)
        weights = weights * least_certain(entropy, trained, share)
    return Batch(rollout, advantages, weights, ref, old, values, returns)


def _group_advantages(
    a: Algorithm, rewards: jax.Array | StepRewards, penalty: jax.Array | None, mask: jax.Array
) -> jax.Array:
    """f32[B, G, T] relative to the group."""
    options: dict[str, Any] = {'baseline': a.baseline, 'scale': a.scale, 'eps': a.advantage_eps}
    if isinstance(rewards, StepRewards):
        of_steps = jax.vmap(lambda values, ends: process_advantages(values, ends, **options))
        return of_steps(rewards.values, rewards.ends)
    to_go: Any = 0.0
    if penalty is not None and a.penalty_to_go:
        to_go = jnp.cumsum(penalty[..., ::-1], -1)[..., ::-1]
    elif penalty is not None:
        rewards = rewards - penalty.sum(-1)
    advantages = jax.vmap(lambda some: group_advantages(some, **options))(rewards)
    return jnp.broadcast_to(advantages[..., None], mask.shape) - to_go


def _critic_advantages(
    rewards: jax.Array | StepRewards,
    penalty: jax.Array | None,
    values: jax.Array,
    mask: jax.Array,
    objective: Objective,
) -> jax.Array:
    """f32[B, G, T] by generalized advantage estimation; an outcome comes with the last token."""
    if isinstance(rewards, StepRewards):
        per_token = jnp.where(rewards.ends, rewards.values, 0.0)
    else:
        last = jnp.arange(mask.shape[-1]) == mask.sum(-1, keepdims=True) - 1
        per_token = jnp.where(last, rewards[..., None], 0.0)
    if penalty is not None:
        per_token = per_token - penalty
    gamma, lam = jnp.asarray(objective.gamma), jnp.asarray(objective.lam)
    return jax.vmap(functools.partial(gae, gamma=gamma, lam=lam))(per_token, values, mask)
