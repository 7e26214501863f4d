"""The load-balancing loss of a mixture of experts.

Routers whose gradient comes from rewards alone may send most tokens to few experts. With E experts,
the number f_e of times that expert e is among a token's chosen ones, and the probability P_e that
the router gives it, both means over tokens and layers, the loss is E * sum_e f_e P_e. It is
smallest where all experts are used alike (Fedus et al., arXiv 2101.03961, eq. 4). As in
transformers, prompts count too; a prompt counts once for each of its completions.

f_e has no gradient. It is a mean over the whole batch and computed first, so microbatches do not
change the gradient. Both passes read whole sequences, one for each completion, and are not shared
with those of the policy's loss.
"""

from typing import TYPE_CHECKING, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from grpo_jax import models
from grpo_jax.engine.accumulate import loss_scale, zeros_float32
from grpo_jax.engine.policy import Policy, microbatches_of
from grpo_jax.types import Batch, Params, Prompts

if TYPE_CHECKING:
    from grpo_jax.algorithm.config import Algorithm


class Load(NamedTuple):
    """Sums over tokens and layers."""

    chosen: Float[Array, ' E']  # how often each expert was chosen
    probability: Float[Array, ' E']  # that the routers gave to each expert
    tokens: Float[Array, '']  # times layers


class Sequences(NamedTuple):
    """The prompts and completions of some groups."""

    prompts: Prompts
    tokens: Int[Array, 'B G T']
    mask: Bool[Array, 'B G T']

    def joined(self) -> tuple[Int[Array, 'N S'], Int[Array, ' N']]:
        """Each completion after its prompt, without a gap, [B * G, P + T]; and their lengths."""
        groups, group_size, columns = self.tokens.shape
        length = self.prompts.length[:, None]
        place = jnp.arange(self.prompts.tokens.shape[1] + columns)
        after = (place - length)[:, None]  # negative in the prompt
        index = jnp.broadcast_to(jnp.clip(after, 0, columns - 1), (groups, group_size, len(place)))
        completions = jnp.take_along_axis(self.tokens, index, axis=2)
        prompts = jnp.pad(self.prompts.tokens, ((0, 0), (0, columns)))[:, None]
        joined = jnp.where(after < 0, prompts, completions)
        total = length + self.mask.sum(-1)
        return joined.reshape(-1, len(place)), total.reshape(-1)


def add_gradient(
    algorithm: 'Algorithm', policy: Policy, trained: Params, batch: Batch, gradient: Params
) -> tuple[Params, dict[str, jax.Array]]:
    """Adds `router_balance` times the gradient of the load-balancing loss.

    Args:
      algorithm: the options; without a load-balancing loss nothing is computed.
      policy: the model and its plan.
      trained: its trained parameters.
      batch: the rollout, [B, G, T].
      gradient: of the policy's loss.

    Returns:
      The sum of the gradients, and {'aux_loss': the load-balancing loss f32[]}.
    """
    if not algorithm.balances_routers:
        return gradient, {}
    microbatches = microbatches_of(policy.plan, policy.mesh)
    rollout, slices = batch.rollout, microbatches.slices(batch)
    prompts = rollout.prompts._replace(routing=None)
    parts = jax.tree.map(jnp.asarray, Sequences(prompts, rollout.tokens, rollout.mask))
    experts = jnp.zeros(policy.model.config.experts)
    total, _ = microbatches.sum(
        lambda part: (load(policy, trained, part), None),
        parts,
        like=Load(experts, experts, jnp.float32(0)),
        slices=slices,
    )
    share, scale = total.chosen / total.tokens, loss_scale(policy.model, parts.mask)

    def loss(trained: Params, part: Sequences) -> jax.Array:
        mean = load(policy, trained, part).probability / total.tokens
        return scale * len(experts) * (jax.lax.stop_gradient(share) * mean).sum()

    balance, _ = microbatches.sum(
        lambda part: (jax.grad(loss)(trained, part), None),
        parts,
        like=zeros_float32(trained),
        slices=slices,
    )
    factor = algorithm.router_balance / scale
    gradient = jax.tree.map(lambda x, y: x + (factor * y).astype(x.dtype), gradient, balance)
    return gradient, {'aux_loss': len(experts) * (share * total.probability).sum() / total.tokens}


def load(policy: Policy, trained: Params, part: Sequences) -> Load:
    """The load of some groups' sequences."""
    tokens, length = part.joined()
    params = policy.full_params(trained)
    probabilities, chosen = models.router_outputs(policy.model, params, tokens, length)
    layers, *_, size = probabilities.shape
    real = (jnp.arange(tokens.shape[1]) < length[:, None])[..., None]
    uses = jnp.where(real, jax.nn.one_hot(chosen, size).sum(-2), 0.0)
    probabilities = jnp.where(real, probabilities, 0.0)
    count = jnp.float32(layers) * real.sum()
    return Load(uses.sum((0, 1, 2)), probabilities.sum((0, 1, 2)), count)
