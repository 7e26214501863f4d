"""Gradient and step of one update: models with their settings bound, and what is read off them.

Nothing here holds state.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from grpo_jax import losses, models, trust_region
from grpo_jax.algorithm import Algorithm
from grpo_jax.head import Head, add_gradient
from grpo_jax.metrics import critic_terms, group_terms, pair_terms
from grpo_jax.microbatch import Learner, Microbatches, Reader, loss_scale, plus
from grpo_jax.optimizer import either, updated
from grpo_jax.preferences import PAIRWISE
from grpo_jax.score import (
    completion_kl,
    completion_logprobs,
    hidden_logprobs,
    token_logprobs,
)
from grpo_jax.types import Batch, Objective, Params, Rollout, Sampling, TrainState


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
            self.model, self.params(trained), rollout, self.sampling, chunk=self.chunk,
            entropy=entropy,
        )  # fmt: skip

    def scores(
        self, params: Params, hidden: jax.Array, part: Batch, *, entropy: bool = False
    ) -> dict[str, jax.Array]:
        """'logprobs', and on demand 'entropy', from a reader's hidden states."""
        return _named(
            *hidden_logprobs(
                self.model, params, hidden, part.rollout.tokens, self.sampling, chunk=self.chunk,
                entropy=entropy,
            )
        )  # fmt: skip

    @property
    def reader(self) -> Reader:
        """Reads completions."""
        return Reader(self.model, self.params)

    def reference(self) -> 'Actor':
        """The same without adapters."""
        config = self.model.config
        model = self.model.clone(config=config.base) if config.lora.rank else self.model
        return dataclasses.replace(self, model=model, frozen=None)


class Critic(NamedTuple):
    """A value function beside the policy: PPO's."""

    model: models.Transformer  # with a scalar head
    optimizer: optax.GradientTransformation

    @property
    def reader(self) -> Reader:
        """Reads completions."""
        return Reader(self.model, lambda params: params)

    def values(self, params: Params, hidden: jax.Array, part: Batch) -> dict[str, jax.Array]:
        """'values' f32[b, g, w] of the states [b, g, w, D] before each completion token."""
        return {'values': models.apply(self.model, params, hidden, method='scores')}


@dataclasses.dataclass(frozen=True)
class Program:
    """Gradient and step of one update, their settings bound; it holds no state."""

    actor: Actor
    algorithm: Algorithm
    optimizer: optax.GradientTransformation
    critic: Critic | None
    microbatches: Microbatches

    def gradient(self, state: TrainState, batch: Batch):
        """Gradients of policy and critic (or None), and terms [B] for the metrics.

        One after the other, so that the activations of only one are in memory.
        """
        learner = self._token_learner if self.algorithm.of_tokens else _traced(self._policy_loss)
        policy, found = self.microbatches.gradient(self.actor.reader, learner, state.params, batch)
        terms = jax.vmap(self._group_terms)(found['logprobs'], found.get('entropy'), batch)
        if self.critic is None:
            return (policy, None), terms
        policy, value_params = jax.lax.optimization_barrier((policy, state.value_params))
        critic, found = self.microbatches.gradient(
            self.critic.reader, _traced(self._value_loss), value_params, batch
        )
        more = jax.vmap(self._group_value_terms)(found['values'], batch)
        return (policy, critic), terms | more

    def apply(self, state: TrainState, gradient, batch: Batch):
        """One update of policy and critic, or none where a gradient is not finite."""
        norm = optax.tree.norm(gradient[0])
        finite = jnp.isfinite(optax.tree.norm(gradient))
        terms = {'grad_norm': norm}
        new = state._replace(skipped=state.skipped + (1 - finite.astype(jnp.int32)))
        if self.algorithm.step == 'trust_region':
            params, taken = self._natural_step(state.params, gradient[0], batch)
            new = new._replace(params=either(finite, params, state.params))
            terms |= {f'trust_region/{name}': value for name, value in taken.items()}
        else:
            params, moments = updated(
                self.optimizer, gradient[0], state.params, state.opt_state, finite
            )
            new = new._replace(params=params, opt_state=moments)
        if self.critic is not None:
            old = state.value_params, state.value_opt_state
            params, moments = updated(self.critic.optimizer, gradient[1], *old, finite)
            new = new._replace(value_params=params, value_opt_state=moments)
            terms['critic/grad_norm'] = optax.tree.norm(gradient[1])
        return new, terms | {'skipped_updates': new.skipped}

    def _natural_step(self, params, gradient, batch: Batch):
        """TRPO's step inside the KL ball around `params`, see `trust_region.natural_step`."""
        o, rollout = self.actor.objective, batch.rollout
        tokens = jnp.maximum(rollout.mask.sum(), 1)
        model = _twice_differentiable(self.actor.model)
        scale = loss_scale(model, rollout.mask)

        def divergence(new, part):
            old = jax.lax.stop_gradient(params)
            kl = completion_kl(
                model, self.actor.params(old), self.actor.params(new), part,
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
                    lambda new: scale * divergence(new, part), params, vector, 0.0
                )
                return product, None

            product, _ = self.microbatches.sum(one, rollout, like=vector)
            return jax.tree.map(lambda p, v: p / scale + o.damping * v, product, vector)

        return trust_region.natural_step(
            params,
            gradient,
            surrogate_of=lambda new: total(functools.partial(self._surrogate, new), batch),
            kl_of=lambda new: total(functools.partial(divergence, new), rollout),
            fisher=fisher,
            max_kl=o.max_kl,
            cg_steps=self.algorithm.cg_steps,
            backtracks=self.algorithm.backtracks,
        )

    def _surrogate(self, params, part: Batch) -> jax.Array:
        """The loss of a microbatch."""
        found = self.actor.logprobs(params, part.rollout, entropy=self.algorithm.entropy)
        return self._loss(*found, part)

    def _token_learner(self, trained, hidden, part: Batch, total):
        """`microbatch.Learner` of a loss that is a sum over tokens."""
        actor = self.actor
        head = Head(
            actor.model.config,
            lambda p: models.apply(actor.model, actor.params(p), method='output_matrix'),
            self._of_logits,
            self.algorithm.logprob_chunk,
        )
        return add_gradient(head, trained, hidden, part.per_token(), total)

    def _of_logits(self, logits, part: Batch):
        found = token_logprobs(
            logits, part.rollout.tokens, self.actor.sampling, entropy=self.algorithm.entropy
        )
        return self._loss(*found, part), _named(*found)

    def _policy_loss(self, trained, hidden, part: Batch):
        params = self.actor.params(trained)
        found = self.actor.scores(params, hidden, part, entropy=self.algorithm.entropy)
        return self._loss(found['logprobs'], found.get('entropy'), part), found

    def _value_loss(self, params, hidden, part: Batch):
        assert self.critic is not None
        found = self.critic.values(params, hidden, part)
        return jax.vmap(self._group_value_loss)(found['values'], part).sum(), found

    def _loss(self, logprobs, entropy, part: Batch) -> jax.Array:
        """The loss of groups, or of rows as groups of one: no loss but a pair's couples them."""
        return jax.vmap(lambda *group: self._group_loss(*group)[0])(logprobs, entropy, part).sum()

    def _group_loss(self, logprobs, entropy, group: Batch):
        """One group's share of the loss, and its KL per token."""
        a = self.algorithm
        per_token, kl = losses.per_token(
            logprobs,
            _with_old(logprobs, group),
            self.actor.objective,
            entropy,
            loss=a.loss,
            ratio=a.ratio,
            importance=a.importance,
            kl=a.kl,
            kl_place=a.kl_place,
        )
        return _weighted(group, per_token), kl

    def _group_terms(self, logprobs, entropy, group: Batch) -> dict[str, jax.Array]:
        """What the metrics need of one group."""
        a, objective = self.algorithm, self.actor.objective
        loss, kl = self._group_loss(logprobs, entropy, group)
        group = _with_old(logprobs, group)
        clipped = None
        if a.has_bounds:
            level = losses.at_level(logprobs, group, a.ratio)
            clipped = losses.clip_masks(level, group, objective, a.loss)
        terms = group_terms(group, clipped, kl, entropy) | {'loss': loss}
        if a.loss in PAIRWISE:
            terms |= pair_terms(logprobs, group, objective)
        return terms

    def _group_value_loss(self, values, group: Batch) -> jax.Array:
        return _weighted(group, losses.value_loss(values, group, self.actor.objective))

    def _group_value_terms(self, values, group: Batch) -> dict[str, jax.Array]:
        loss = self._group_value_loss(values, group)
        return critic_terms(values, group) | {'critic_loss': loss}


def _traced(loss: Callable[..., Any]) -> Learner:
    """A learner from `loss(trained, hidden, part)`, f32[] and outputs."""

    def learn(trained, hidden, part: Batch, total):
        (found, slope), out = jax.grad(loss, argnums=(0, 1), has_aux=True)(trained, hidden, part)
        return plus(total, found), slope, out

    return learn


def _named(logprobs: jax.Array, entropy: jax.Array | None) -> dict[str, jax.Array]:
    return {'logprobs': logprobs} | ({} if entropy is None else {'entropy': entropy})


def _twice_differentiable(model: models.Transformer) -> models.Transformer:
    """The model without kernels, whose gradients have no derivative of their own."""
    if getattr(model.config, 'attention', 'einsum') == 'einsum':
        return model
    return model.clone(config=dataclasses.replace(model.config, attention='einsum'))


def _with_old(logprobs: jax.Array, group: Batch) -> Batch:
    """The current log-probs are the old ones where the policy has not moved since sampling."""
    if group.old_logprobs is not None:
        return group
    return group._replace(old_logprobs=jax.lax.stop_gradient(logprobs))


def _weighted(group: Batch, per_token: jax.Array) -> jax.Array:
    return jnp.where(group.rollout.mask, group.weights * per_token, 0.0).sum()
