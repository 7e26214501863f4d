"""Gradient and step of one update: the model with its settings bound, microbatches, losses.

Nothing here holds state. A microbatch is a number of groups, over all devices, that are computed
at a time; arrays cut into them have shape [microbatches, m, ...].
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from grpo_jax import losses, models, trust_region
from grpo_jax.algorithm import Algorithm
from grpo_jax.metrics import critic_terms, group_terms, pair_terms
from grpo_jax.preferences import PAIRWISE
from grpo_jax.score import completion_kl, completion_logprobs
from grpo_jax.types import Batch, Objective, Params, Rollout, Sampling, TrainState


@dataclasses.dataclass(frozen=True)
class Microbatches:
    """How a batch is cut."""

    size: int  # groups
    mesh: Mesh | None

    def cut(self, tree: Any) -> Any:
        """[B, ...] -> [microbatches, m, ...], strided so that devices keep the groups they hold."""

        def one(x):
            x = x.reshape(self.size, -1, *x.shape[1:]).swapaxes(0, 1)
            if self.mesh is None:
                return x
            return jax.lax.with_sharding_constraint(
                x, NamedSharding(self.mesh, PartitionSpec(None, 'fsdp'))
            )

        return jax.tree.map(one, tree)

    def map(self, function: Callable[[Any], Any], tree: Any) -> Any:
        """`function` of a microbatch at a time, its results [B, ...] without gradient."""
        out = jax.lax.map(function, self.cut(tree))
        return jax.tree.map(
            lambda x: jax.lax.stop_gradient(x.swapaxes(0, 1).reshape(-1, *x.shape[2:])), out
        )

    def sum(self, function: Callable[[Any], Any], tree: Any, *, like: Any) -> tuple[Any, Any]:
        """Adds up (total, terms) = `function(microbatch)`: the sum of totals, the terms stacked."""

        def add(total, microbatch):
            part, terms = function(microbatch)
            return jax.tree.map(jnp.add, total, part), terms

        return jax.lax.scan(add, jax.tree.map(jnp.zeros_like, like), self.cut(tree))


@dataclasses.dataclass(frozen=True)
class Actor:
    """A decoder that gives log-probs, its settings bound."""

    model: models.Transformer
    frozen: Params | None  # with adapters the base that they belong to
    sampling: Sampling
    objective: Objective
    chunk: int

    def params(self, trained: Params) -> Params:
        """The policy's parameters from the trained ones."""
        return models.join(self.frozen, trained) if self.model.config.lora.rank else trained

    def logprobs(
        self, trained: Params, rollout: Rollout, *, entropy: bool = False
    ) -> tuple[jax.Array, jax.Array | None]:
        """See `score.completion_logprobs`."""
        return completion_logprobs(
            self.model,
            self.params(trained),
            rollout,
            self.sampling,
            chunk=self.chunk,
            entropy=entropy,
        )

    def reference(self) -> 'Actor':
        """The same without adapters."""
        config = self.model.config
        model = self.model.clone(config=config.base) if config.lora.rank else self.model
        return dataclasses.replace(self, model=model, frozen=None)


def values(model: models.Transformer, params: Params, rollout: Rollout) -> jax.Array:
    """A critic's values f32[B, G, T] of the states before each completion token.

    Args:
      model: a decoder with a scalar head.
      params: its parameters.
      rollout: prompts and completions.
    """
    prompts = rollout.prompts
    hidden = models.completion_hidden(model, params, prompts.tokens, prompts.length, rollout.tokens)
    return models.apply(model, params, hidden, method='scores')


class Critic(NamedTuple):
    """A value function beside the policy: PPO's."""

    model: models.Transformer  # with a scalar head
    optimizer: optax.GradientTransformation


@dataclasses.dataclass(frozen=True)
class Program:
    """Gradient and step of one update, their settings bound; it holds no state."""

    actor: Actor
    algorithm: Algorithm
    optimizer: optax.GradientTransformation
    critic: Critic | None
    microbatches: Microbatches

    def gradient(self, state: TrainState, batch: Batch):
        """Gradients of policy and critic (or None), and terms [microbatches, m, ...].

        One after the other, so that the activations of only one are in memory.
        """
        policy, terms = self._sum_gradients(self._loss, state.params, batch)
        if self.critic is None:
            return (policy, None), terms
        policy, value_params = jax.lax.optimization_barrier((policy, state.value_params))
        critic, more = self._sum_gradients(self._value_loss, value_params, batch)
        return (policy, critic), terms | more

    def _sum_gradients(self, loss, params, batch: Batch):
        gradient = jax.grad(loss, has_aux=True)
        return self.microbatches.sum(lambda part: gradient(params, part), batch, like=params)

    def apply(self, state: TrainState, gradient, batch: Batch):
        """One update of policy and critic, or none where a gradient is not finite."""
        norm = optax.tree.norm(gradient[0])
        finite = jnp.isfinite(optax.tree.norm(gradient))
        terms = {'grad_norm': norm}
        if self.algorithm.step == 'trust_region':
            params, taken = self._natural_step(state.params, gradient[0], batch)
            new = state._replace(params=params)
            terms |= {f'trust_region/{name}': value for name, value in taken.items()}
        else:
            updates, moments = self.optimizer.update(gradient[0], state.opt_state, state.params)
            params = optax.apply_updates(state.params, updates)
            new = state._replace(params=params, opt_state=moments)
        if self.critic is not None:
            updates, moments = self.critic.optimizer.update(
                gradient[1], state.value_opt_state, state.value_params
            )
            value_params = optax.apply_updates(state.value_params, updates)
            new = new._replace(value_params=value_params, value_opt_state=moments)
            terms['critic/grad_norm'] = optax.tree.norm(gradient[1])
        new = jax.tree.map(lambda new, old: jnp.where(finite, new, old), new, state)
        new = new._replace(skipped=state.skipped + (1 - finite.astype(jnp.int32)))
        return new, terms | {'skipped_updates': new.skipped}

    def _natural_step(self, params, gradient, batch: Batch):
        """TRPO's step inside the KL ball around `params`, see `trust_region.natural_step`."""
        o, rollout = self.actor.objective, batch.rollout
        tokens = jnp.maximum(rollout.mask.sum(), 1)

        def divergence(new, part):
            old = jax.lax.stop_gradient(params)
            kl = completion_kl(
                self.actor.model, self.actor.params(old), self.actor.params(new), part,
                self.actor.sampling, chunk=self.actor.chunk,
            )  # fmt: skip
            return jnp.where(part.mask, kl, 0.0).sum() / tokens

        def total(function, tree):
            """The sum of a scalar function of microbatches."""
            zero = jnp.float32(0)
            return self.microbatches.sum(lambda part: (function(part), None), tree, like=zero)[0]

        def fisher(vector):
            def one(part):
                product = trust_region.fisher_vector_product(
                    lambda new: divergence(new, part), params, vector, 0.0
                )
                return product, None

            product, _ = self.microbatches.sum(one, rollout, like=params)
            return jax.tree.map(lambda p, v: p + o.damping * v, product, vector)

        return trust_region.natural_step(
            params,
            gradient,
            surrogate_of=lambda new: total(lambda part: self._loss(new, part)[0], batch),
            kl_of=lambda new: total(functools.partial(divergence, new), rollout),
            fisher=fisher,
            max_kl=o.max_kl,
            cg_steps=self.algorithm.cg_steps,
            backtracks=self.algorithm.backtracks,
        )

    def _loss(self, params, microbatch: Batch):
        logprobs, entropy = self.actor.logprobs(
            params, microbatch.rollout, entropy=self.algorithm.entropy
        )
        loss, terms = jax.vmap(self._group_loss)(logprobs, entropy, microbatch)
        return loss.sum(), terms

    def _value_loss(self, value_params, microbatch: Batch):
        assert self.critic is not None
        found = values(self.critic.model, value_params, microbatch.rollout)
        loss, terms = jax.vmap(self._group_value_loss)(found, microbatch)
        return loss.sum(), terms

    def _group_loss(self, logprobs, entropy, group: Batch):
        """One group's share of the loss, and its terms for the metrics."""
        a, objective = self.algorithm, self.actor.objective
        if group.old_logprobs is None:
            group = group._replace(old_logprobs=jax.lax.stop_gradient(logprobs))
        per_token, kl = losses.per_token(
            logprobs,
            group,
            objective,
            entropy,
            loss=a.loss,
            ratio=a.ratio,
            importance=a.importance,
            kl=a.kl,
            kl_place=a.kl_place,
        )
        loss = _weighted(group, per_token)
        bounded = a.loss not in ('nll', 'surrogate', *PAIRWISE)
        level = losses.at_level(logprobs, group, a.ratio) if bounded else None
        terms = group_terms(level, group, objective, kl, entropy)
        if a.loss in PAIRWISE:
            terms |= pair_terms(logprobs, group, objective)
        return loss, jax.lax.stop_gradient(terms | {'loss': loss})

    def _group_value_loss(self, values, group: Batch):
        loss = _weighted(group, losses.value_loss(values, group, self.actor.objective))
        return loss, jax.lax.stop_gradient(critic_terms(values, group) | {'critic_loss': loss})


def _weighted(group: Batch, per_token: jax.Array) -> jax.Array:
    return jnp.where(group.rollout.mask, group.weights * per_token, 0.0).sum()
