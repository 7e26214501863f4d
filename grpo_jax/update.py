"""The update: one jitted program from rewards to new parameters.

`step(state, ref_params, rollout, rewards, sampling, objective) -> (state, metrics)` computes group
advantages, weights, reference and old log-probs, then scans inner updates and microbatches of
groups. SFT is the same program with one demonstration per group, reward 1 and the loss `nll`.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from grpo_jax import losses, models, sharding
from grpo_jax.advantages import check_group_options, group_advantages, normalize_batch
from grpo_jax.losses import Objective
from grpo_jax.metrics import group_terms, reduce_terms, rollout_metrics
from grpo_jax.score import AGGREGATIONS, completion_logprobs, least_certain, token_weights
from grpo_jax.types import Batch, Params, Rollout, Sampling, TrainState

LOSSES = ('clipped', 'nll', 'cispo', 'sapo')
RATIOS = ('token', 'sequence', 'sequence_token')
IMPORTANCES = ('none', 'token', 'sequence', 'token_mask', 'sequence_mask')
KL_ESTIMATORS = ('k1', 'k2', 'k3', 'none')
KL_PLACES = ('loss', 'reward')


@dataclasses.dataclass(frozen=True)
class Algorithm:
    """What the update computes. All static: changing one compiles a new program.

    Raises:
      ValueError: an unknown option, or the k1 estimator in the loss, where it has no effect on
        average.
    """

    loss: str = 'clipped'  # a function of `losses`
    ratio: str = 'token'  # see `losses.at_level`
    importance: str = 'none'  # correction for the sampler, see `losses.importance_weights`
    baseline: str = 'mean'  # see `advantages.group_advantages`
    scale: str = 'std'
    advantage_eps: float = 1e-4
    aggregation: str = 'sequence_mean'  # see `score.token_weights`
    kl: str = 'k3'  # estimator; 'none' leaves the reference out of the program
    kl_place: str = (
        'loss'  # 'loss', or 'reward': r - beta * (sum of the row's KL), before advantages
    )
    inner_updates: int = 1  # optimizer updates per rollout (the paper's mu)
    microbatch: int = 1  # groups whose gradient is computed at a time
    logprob_chunk: int = 128  # completion positions whose logits exist at a time
    entropy: bool = False  # compute the policy's entropy: a metric, and what its bonus needs
    entropy_mask: bool = False  # train only the share `top_entropy` of the tokens

    def __post_init__(self) -> None:
        check_group_options(2, baseline=self.baseline, scale=self.scale)
        for name, known in (
            ('loss', LOSSES),
            ('ratio', RATIOS),
            ('importance', IMPORTANCES),
            ('aggregation', AGGREGATIONS),
            ('kl', KL_ESTIMATORS),
            ('kl_place', KL_PLACES),
        ):
            if getattr(self, name) not in known:
                value = getattr(self, name)
                raise ValueError(f'{name}={value!r} is unknown: use one of {", ".join(known)}')
        for name in ('inner_updates', 'microbatch', 'logprob_chunk'):
            if getattr(self, name) < 1:
                raise ValueError(f'{name}={getattr(self, name)} must be at least 1')
        if self.kl == 'k1' and self.kl_place == 'loss':
            raise ValueError(
                "kl='k1' with kl_place='loss' has an expected on-policy gradient of zero: "
                "use kl='k2' or 'k3', or kl_place='reward'"
            )


def init_state(
    model: models.Transformer,
    optimizer: optax.GradientTransformation,
    params: Params | jax.Array,
    mesh: Mesh | None = None,
    *,
    donate: bool = False,
) -> TrainState:
    """A fresh training state on the mesh.

    Args:
      model: the decoder.
      optimizer: from `optimizer.adamw`, or any optax transformation.
      params: what is trained, all parameters or the adapters, or a random key to make them from.
        They are copied, since the update program takes its state's memory over.
      mesh: where it lies; the default device without one.
      donate: take the parameters themselves in place of a copy; the caller's are gone.
    """

    def make(params):
        if isinstance(params, jax.Array):
            params = models.init(model, params)
            if model.config.lora.rank:
                _, params = models.split(params)
        params = jax.tree.map(jnp.copy, params)
        return TrainState(jnp.int32(0), params, optimizer.init(params), jnp.int32(0))

    out = None if mesh is None else sharding.shardings(jax.eval_shape(make, params), mesh)
    return jax.jit(make, out_shardings=out, donate_argnums=0 if donate else ())(params)


Step = Callable[..., tuple[TrainState, dict[str, jax.Array]]]


def make_step(
    model: models.Transformer,
    optimizer: optax.GradientTransformation,
    algorithm: Algorithm,
    mesh: Mesh | None = None,
) -> Step:
    """Compiles-on-first-call the update program for one model, optimizer and algorithm.

    Args:
      model: the decoder.
      optimizer: from `optimizer.adamw`, or any optax transformation.
      algorithm: what to compute.
      mesh: the devices; with one, rollout and rewards lie as `sharding.groups` says and the new
        state as `sharding.shardings`.

    Returns:
      `step(state, ref_params, rollout, rewards, sampling, objective) -> (state, metrics)`. It takes
      the old state's memory over. `ref_params` are the reference's; None, or kl='none', leaves the
      KL term and the reference pass out of the program. With adapters they are the base that policy
      and reference share, and always needed. rewards: f32[B, G]. metrics: scalars under the names
      of the README.
    """
    step = functools.partial(
        update, model=model, optimizer=optimizer, algorithm=algorithm, mesh=mesh
    )
    if mesh is None:
        return jax.jit(step, donate_argnums=0)
    key = jax.eval_shape(lambda: jax.random.key(0))
    state = jax.eval_shape(functools.partial(init_state, model, optimizer), key)
    out = (sharding.shardings(state, mesh), sharding.replicated(mesh))
    return jax.jit(step, donate_argnums=0, out_shardings=out)


def update(
    state: TrainState,
    ref_params: Params | None,
    rollout: Rollout,
    rewards: jax.Array,
    sampling: Sampling,
    objective: Objective,
    *,
    model: models.Transformer,
    optimizer: optax.GradientTransformation,
    algorithm: Algorithm,
    mesh: Mesh | None = None,
) -> tuple[TrainState, dict[str, jax.Array]]:
    """The program behind `make_step`, not jitted. See there for arguments and result.

    Raises:
      ValueError: the batch does not divide by the microbatch or the mesh, or the group is too
        small.
    """
    size, group_size, _ = rollout.tokens.shape
    if rewards.shape != (size, group_size):
        raise ValueError(
            f'rewards have shape {rewards.shape}: the rollout needs one for each completion, '
            f'[B, G] = ({size}, {group_size})'
        )
    if model.config.lora.rank and ref_params is None:
        raise ValueError('ref_params=None with adapters: give the parameters of their base')
    sharding.check_batch(size, algorithm.microbatch, mesh)
    check_group_options(group_size, baseline=algorithm.baseline, scale=algorithm.scale)
    program = _Program(model, optimizer, algorithm, mesh, ref_params, sampling, objective)

    def inner(state, _):
        gradient, terms = program.gradient(state.params, batch)
        state, applied = program.apply(state, gradient)
        return state, terms | applied

    with sharding.use(mesh):
        metrics = rollout_metrics(rollout, rewards)
        batch = program.score(state.params, rollout, rewards)
        state, terms = jax.lax.scan(inner, state, length=algorithm.inner_updates)
    return state._replace(step=state.step + 1), metrics | reduce_terms(terms)


@dataclasses.dataclass(frozen=True)
class _Program:
    """The pieces of one update with their settings bound; it holds no state."""

    model: models.Transformer
    optimizer: optax.GradientTransformation
    algorithm: Algorithm
    mesh: Mesh | None
    frozen: Params | None  # of the reference, and with adapters the policy's base
    sampling: Sampling
    objective: Objective

    def score(self, params, rollout, rewards) -> Batch:
        """Everything that stays fixed during the inner updates, from the whole batch at once."""
        a = self.algorithm
        reference = self.frozen is not None and a.kl != 'none'
        in_reward = reference and a.kl_place == 'reward'
        old: Any = None
        ref: Any = None
        entropy: Any = None
        if a.inner_updates > 1 or in_reward or a.entropy_mask:  # else the current ones are the old
            old, entropy = self._fixed_logprobs(
                self.model, self._policy(params), rollout, entropy=a.entropy_mask
            )
        if reference:
            ref, _ = self._fixed_logprobs(self._reference_model(), self.frozen, rollout)
        if in_reward:
            kl = losses.kl_term(old, ref, a.kl, self.objective)
            rewards = rewards - self.objective.beta * jnp.where(rollout.mask, kl, 0.0).sum(-1)
        advantages = jax.vmap(
            functools.partial(
                group_advantages, baseline=a.baseline, scale=a.scale, eps=a.advantage_eps
            )
        )(rewards)
        advantages = jnp.broadcast_to(advantages[..., None], rollout.mask.shape)
        if a.scale == 'batch':
            advantages = normalize_batch(advantages, rollout.mask, eps=a.advantage_eps)
        weights = token_weights(rollout.mask, aggregation=a.aggregation, microbatch=a.microbatch)
        if a.entropy_mask:
            weights = weights * least_certain(
                entropy, rollout.mask, jnp.asarray(self.objective.top_entropy)
            )
        return Batch(rollout, advantages, weights, ref, old)

    def gradient(self, params, batch: Batch):
        """Sum of the microbatches' gradients, and their terms [microbatches, m, ...]."""
        value_and_grad = jax.value_and_grad(self._loss, has_aux=True)

        def add(total, microbatch):
            (_, terms), gradient = value_and_grad(params, microbatch)
            return jax.tree.map(jnp.add, total, gradient), terms

        zero = jax.tree.map(jnp.zeros_like, params)
        return jax.lax.scan(add, zero, self._cut(batch))

    def apply(self, state: TrainState, gradient):
        """One optimizer update, or none where the gradient is not finite."""
        norm = optax.tree.norm(gradient)
        finite = jnp.isfinite(norm)
        updates, opt_state = self.optimizer.update(gradient, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        params, opt_state = jax.tree.map(
            lambda new, old: jnp.where(finite, new, old),
            (params, opt_state),
            (state.params, state.opt_state),
        )
        skipped = state.skipped + (1 - finite.astype(jnp.int32))
        return TrainState(state.step, params, opt_state, skipped), {
            'grad_norm': norm,
            'skipped_updates': skipped,
        }

    def _loss(self, params, microbatch: Batch):
        a = self.algorithm
        logprobs, entropy = self._logprobs(
            self.model, self._policy(params), microbatch.rollout, entropy=a.entropy
        )
        loss, terms = jax.vmap(self._group_loss)(logprobs, entropy, microbatch)
        return loss.sum(), terms

    def _group_loss(self, logprobs, entropy, group: Batch):
        """One group's share of the loss, and its terms for the metrics."""
        a, rollout = self.algorithm, group.rollout
        if group.old_logprobs is None:
            group = group._replace(old_logprobs=jax.lax.stop_gradient(logprobs))
        per_token, kl = losses.per_token(
            logprobs,
            group,
            self.objective,
            entropy,
            loss=a.loss,
            ratio=a.ratio,
            importance=a.importance,
            kl=a.kl,
            kl_place=a.kl_place,
        )
        loss = jnp.where(rollout.mask, group.weights * per_token, 0.0).sum()
        terms = group_terms(
            losses.at_level(logprobs, group, a.ratio), group, self.objective, kl, entropy
        )
        return loss, jax.lax.stop_gradient(terms | {'loss': loss})

    def _policy(self, params):
        """The policy's parameters from the trained ones."""
        return models.join(self.frozen, params) if self.model.config.lora.rank else params

    def _reference_model(self):
        """The model itself, without the adapters if it has any."""
        config = self.model.config
        return self.model.clone(config=config.base) if config.lora.rank else self.model

    def _logprobs(self, model, params, rollout: Rollout, *, entropy: bool = False):
        return completion_logprobs(
            model,
            params,
            rollout,
            self.sampling,
            chunk=self.algorithm.logprob_chunk,
            entropy=entropy,
        )

    def _fixed_logprobs(self, model, params, rollout: Rollout, *, entropy: bool = False):
        """Log-probs and entropies f32[B, G, T] without gradient, a microbatch at a time."""
        out = jax.lax.map(
            lambda some: self._logprobs(model, params, some, entropy=entropy), self._cut(rollout)
        )
        return jax.tree.map(
            lambda x: jax.lax.stop_gradient(x.swapaxes(0, 1).reshape(-1, *x.shape[2:])), out
        )

    def _cut(self, tree):
        """[B, ...] -> [microbatches, m, ...], strided so that devices keep the groups they hold."""

        def cut(x):
            x = x.reshape(self.algorithm.microbatch, -1, *x.shape[1:]).swapaxes(0, 1)
            if self.mesh is None:
                return x
            return jax.lax.with_sharding_constraint(
                x, NamedSharding(self.mesh, PartitionSpec(None, 'fsdp'))
            )

        return jax.tree.map(cut, tree)
