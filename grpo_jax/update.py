"""The update: one jitted program from rewards to new parameters.

`step(state, ref_params, rollout, rewards, sampling, objective) -> (state, metrics)` computes
advantages, weights, reference and old log-probs (`batch`), then scans inner updates and
microbatches of groups. SFT is the same program with one demonstration per group, reward 1 and the
loss `nll`; DPO with two completions and a preference loss; PPO with a critic in the state.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from grpo_jax import losses, models, program, sharding, trust_region
from grpo_jax.advantages import check_group_options
from grpo_jax.algorithm import Algorithm
from grpo_jax.batch import make_batch
from grpo_jax.losses import Objective
from grpo_jax.metrics import critic_terms, group_terms, pair_terms, reduce_terms, rollout_metrics
from grpo_jax.program import Actor, Microbatches
from grpo_jax.score import completion_kl
from grpo_jax.types import Batch, Params, Rollout, Sampling, StepRewards, TrainState

__all__ = ['Algorithm', 'Critic', 'init_state', 'make_step', 'update']


class Critic(NamedTuple):
    """A value function beside the policy: PPO's."""

    model: models.Transformer  # with a scalar head
    optimizer: optax.GradientTransformation


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
            state = state._replace(reference=jax.tree.map(jnp.copy, params))
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
        or rewards, critic or reference are not what the algorithm needs.
    """
    a = algorithm
    _check_rewards(a, rollout, rewards)
    size, group_size, _ = rollout.tokens.shape
    if model.config.lora.rank and ref_params is None:
        raise ValueError('ref_params=None with adapters: give the parameters of their base')
    reference = ref_params if state.reference is None else state.reference
    if a.loss in losses.PAIRWISE and reference is None:
        raise ValueError(f'ref_params=None with loss={a.loss!r}: give the parameters of its policy')
    sharding.check_batch(size, a.microbatch, mesh)
    check_group_options(group_size, baseline=a.baseline, scale=a.scale)
    actor = Actor(model, ref_params, sampling, objective, a.logprob_chunk)
    microbatches = Microbatches(a.microbatch, mesh)
    bound = _Program(actor, a, optimizer, critic, microbatches)

    def inner(state, _):
        gradient, terms = bound.gradient(state, batch)
        state, applied = bound.apply(state, gradient, batch)
        return state, terms | applied

    with sharding.use(mesh):
        metrics = rollout_metrics(rollout, rewards)
        batch = make_batch(
            a, actor, critic and critic.model, state, reference, rollout, rewards, microbatches
        )
        state, terms = jax.lax.scan(inner, state, length=a.inner_updates)
    if state.reference is not None:
        decay = jnp.asarray(objective.reference_decay)
        state = state._replace(
            reference=jax.tree.map(
                lambda old, new: (decay * old + (1 - decay) * new).astype(old.dtype),
                state.reference,
                state.params,
            )
        )
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


@dataclasses.dataclass(frozen=True)
class _Program:
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
        policy, values = jax.lax.optimization_barrier((policy, state.value_params))
        critic, more = self._sum_gradients(self._value_loss, values, batch)
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
            values = optax.apply_updates(state.value_params, updates)
            new = new._replace(value_params=values, value_opt_state=moments)
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
        values = program.values(self.critic.model, value_params, microbatch.rollout)
        loss, terms = jax.vmap(self._group_value_loss)(values, microbatch)
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
        bounded = a.loss != 'nll' and a.loss not in losses.PAIRWISE
        level = losses.at_level(logprobs, group, a.ratio) if bounded else None
        terms = group_terms(level, group, objective, kl, entropy)
        if a.loss in losses.PAIRWISE:
            terms |= pair_terms(logprobs, group, objective)
        return loss, jax.lax.stop_gradient(terms | {'loss': loss})

    def _group_value_loss(self, values, group: Batch):
        loss = _weighted(group, losses.value_loss(values, group, self.actor.objective))
        return loss, jax.lax.stop_gradient(critic_terms(values, group) | {'critic_loss': loss})


def _weighted(group: Batch, per_token: jax.Array) -> jax.Array:
    return jnp.where(group.rollout.mask, group.weights * per_token, 0.0).sum()
