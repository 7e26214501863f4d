"""PPO's critic: its loss, generalized advantage estimation, and the advantages of a batch."""

import functools
from typing import TYPE_CHECKING, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Bool, Float

from grpo_jax import models
from grpo_jax.algorithm.estimators import total_rewards
from grpo_jax.types import Array, Batch, Rewards, Rollout, Scalar, StepRewards

if TYPE_CHECKING:
    from grpo_jax.algorithm.config import Algorithm


class Critic(NamedTuple):
    """A value function that is trained along with the policy."""

    model: models.Transformer  # with `scalar_head=True`
    optimizer: optax.GradientTransformation


def gae(
    rewards: Float[Array, 'G T'],
    values: Float[Array, 'G T'],
    mask: Bool[Array, 'G T'],
    *,
    gamma: Scalar,
    lam: Scalar,
) -> Float[Array, 'G T']:
    """Generalized advantage estimation of each completion's tokens, for PPO.

    A_t = sum over l of (gamma * lam)^l * d_{t+l}, d_t = r_t + gamma * V_{t+1} - V_t (Schulman et
    al., arXiv 1506.02438, eq. 16). The value after the last token is 0. The critic's targets are
    A + V.

    Args:
      rewards: f32[G, T], one for each token.
      values: f32[G, T], V_t of the state before token t.
      mask: bool[G, T], true up to a completion's last token.
      gamma: f32[], discount per token.
      lam: f32[]; 0: the one-step error d_t; 1: the discounted sum of rewards minus V_t.

    Returns:
      f32[G, T], 0 outside the mask.
    """
    values = jnp.where(mask, values, 0.0)
    following = jnp.pad(values[:, 1:], ((0, 0), (0, 1)))
    errors = jnp.where(mask, rewards + gamma * following - values, 0.0)

    def add(later: jax.Array, error: jax.Array) -> tuple[jax.Array, jax.Array]:
        advantage = error + gamma * lam * later
        return advantage, advantage

    _, advantages = jax.lax.scan(add, jnp.zeros_like(errors[:, 0]), errors.T, reverse=True)
    return advantages.T


def value_loss(
    values: Float[Array, 'G T'],
    old_values: Float[Array, 'G T'],
    returns: Float[Array, 'G T'],
    *,
    value_clip: Scalar,
) -> Float[Array, 'G T']:
    """max((v - R)^2, (clip(v, old - value_clip, old + value_clip) - R)^2) / 2.

    PPO's critic loss as in OpenAI's baselines: a value that has moved toward its return by more
    than value_clip has no gradient. value_clip = 0: no clip. All arrays are f32[G, T].
    """
    clip = jnp.asarray(value_clip)
    near = old_values + jnp.clip(values - old_values, -clip, clip)
    near = jnp.where(clip > 0, near, values)
    return 0.5 * jnp.maximum(jnp.square(values - returns), jnp.square(near - returns))


def estimate(
    algorithm: 'Algorithm',
    rewards: Rewards,
    values: Float[Array, 'B G T'],
    rollout: Rollout,
    penalty: Float[Array, 'B G T'] | None,
) -> Float[Array, 'B G T']:
    """Advantages f32[B, G, T] by `gae`; a completion's reward is given to its last token.

    An environment's tokens are left out: the policy's last token of a turn is followed by its first
    one of the next turn.

    Args:
      algorithm: gamma and lam.
      rewards: one for each completion or step.
      values: the critic's values before the inner updates.
      rollout: the completions.
      penalty: beta * KL of each token, if the KL is part of the reward.
    """
    mask, order = rollout.policy_mask, None
    if rollout.trained is not None:
        rewards = rewards if isinstance(rewards, StepRewards) else total_rewards(rewards)
        order = jnp.argsort(~mask, axis=-1, stable=True)
        mask, values, penalty, rewards = jax.tree.map(
            lambda x: x if x.ndim < 3 else jnp.take_along_axis(x, order, -1),
            (mask, values, penalty, rewards),
        )
    if isinstance(rewards, StepRewards):
        per_token = jnp.where(rewards.ends, rewards.values, 0.0)
    else:
        last = jnp.arange(mask.shape[-1]) == mask.sum(-1, keepdims=True) - 1
        per_token = jnp.where(last, total_rewards(rewards)[..., None], 0.0)
    if penalty is not None:
        per_token = per_token - penalty
    gamma, lam = jnp.asarray(algorithm.gamma), jnp.asarray(algorithm.lam)
    advantages = jax.vmap(functools.partial(gae, gamma=gamma, lam=lam))(per_token, values, mask)
    if order is None:
        return advantages
    return jnp.take_along_axis(advantages, jnp.argsort(order, axis=-1), -1)


def loss_fn(
    algorithm: 'Algorithm', values: Float[Array, 'B G T'], batch: Batch
) -> Float[Array, '']:
    """The critic's loss of a batch: the weighted sum of `value_loss` over tokens."""
    return jax.vmap(functools.partial(group_loss, algorithm))(values, batch).sum()


def group_loss(
    algorithm: 'Algorithm', values: Float[Array, 'G T'], group: Batch
) -> Float[Array, '']:
    """One group's share of the loss."""
    assert group.old_values is not None
    assert group.returns is not None
    per_token = value_loss(values, group.old_values, group.returns, value_clip=algorithm.value_clip)
    return jnp.where(group.rollout.policy_mask, group.weights * per_token, 0.0).sum()
