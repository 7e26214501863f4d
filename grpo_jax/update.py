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
from grpo_jax.advantages import check_group_options, group_advantages
from grpo_jax.losses import Objective
from grpo_jax.score import AGGREGATIONS, group_logprobs, rollout_metrics, token_weights
from grpo_jax.types import Batch, Params, Rollout, Sampling, TrainState

LOSSES = ('clipped', 'nll')
KL_ESTIMATORS = ('k1', 'k2', 'k3')
KL_PLACES = ('loss', 'reward')


@dataclasses.dataclass(frozen=True)
class Algorithm:
    """What the update computes. All static: changing one compiles a new program.

    Raises:
      ValueError: an unknown option, or the k1 estimator in the loss, where it has no effect on
        average.
    """

    loss: str = 'clipped'  # a function of `losses`
    baseline: str = 'mean'  # see `advantages.group_advantages`
    scale: str = 'std'
    advantage_eps: float = 1e-4
    aggregation: str = 'sequence_mean'  # see `score.token_weights`
    kl: str = 'k3'  # estimator, read where reference parameters are given
    kl_place: str = (
        'loss'  # 'loss', or 'reward': r - beta * (sum of the row's KL), before advantages
    )
    inner_updates: int = 1  # optimizer updates per rollout (the paper's mu)
    microbatch: int = 1  # groups whose gradient is computed at a time
    logprob_chunk: int = 128  # completion positions whose logits exist at a time
    entropy: bool = False  # also report the policy's entropy

    def __post_init__(self) -> None:
        check_group_options(2, baseline=self.baseline, scale=self.scale)
        for name, known in (
            ('loss', LOSSES),
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


def adamw(
    *,
    learning_rate: float,
    steps: int,
    warmup_steps: int = 0,
    decay: str = 'constant',
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    clip_norm: float = 1.0,
) -> tuple[optax.GradientTransformation, optax.Schedule]:
    """AdamW behind a clip of the gradient's global norm, with linear warm-up.

    Args:
      learning_rate: the peak.
      steps: optimizer updates in all, where the decay ends.
      warmup_steps: updates over which the rate rises linearly; the first already moves.
      decay: 'constant', 'linear' or 'cosine' (both to zero at `steps`).
      b1: decay of the first moment.
      b2: decay of the second moment.
      eps: Adam's epsilon.
      weight_decay: of matrices; norm scales and biases are left alone.
      clip_norm: largest global norm of the gradient.

    Returns:
      The transformation, and its schedule from the number of updates made to the learning rate.

    Raises:
      ValueError: unknown decay, or a warm-up that is longer than the run.
    """
    if warmup_steps > steps:
        raise ValueError(
            f'warmup_steps={warmup_steps} is more than steps={steps}: shorten the warm-up'
        )
    shapes: dict[str, Callable[[Any], Any]] = {
        'constant': lambda x: 1.0,
        'linear': lambda x: 1.0 - x,
        'cosine': lambda x: 0.5 * (1 + jnp.cos(jnp.pi * x)),
    }
    if decay not in shapes:
        raise ValueError(f'decay={decay!r} is unknown: use one of {", ".join(shapes)}')

    def schedule(count):
        warm = jnp.minimum((count + 1) / (warmup_steps + 1), 1.0)
        done = jnp.clip((count - warmup_steps) / max(steps - warmup_steps, 1), 0.0, 1.0)
        return learning_rate * warm * shapes[decay](done)

    def matrices(params):
        return jax.tree_util.tree_map_with_path(
            lambda path, _: not path[-1].key.endswith(('scale', 'bias')), params
        )

    optimizer = optax.chain(
        optax.clip_by_global_norm(clip_norm),
        optax.adamw(schedule, b1=b1, b2=b2, eps=eps, weight_decay=weight_decay, mask=matrices),
    )
    return optimizer, schedule


def init_state(
    model: models.Transformer,
    optimizer: optax.GradientTransformation,
    params: Params | jax.Array,
    mesh: Mesh | None = None,
) -> TrainState:
    """A fresh training state on the mesh.

    Args:
      model: the decoder.
      optimizer: from `adamw`, or any optax transformation.
      params: parameters (copied: the update program takes its state's memory over), or a random key
        to
        make them from.
      mesh: where it lies; the default device without one.
    """

    def make(params):
        if isinstance(params, jax.Array):
            params = models.init(model, params)
        params = jax.tree.map(jnp.copy, params)
        return TrainState(jnp.int32(0), params, optimizer.init(params), jnp.int32(0))

    out = None if mesh is None else sharding.shardings(jax.eval_shape(make, params), mesh)
    return jax.jit(make, out_shardings=out)(params)


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
      optimizer: from `adamw`, or any optax transformation.
      algorithm: what to compute.
      mesh: the devices; with one, rollout and rewards lie as `sharding.groups` says and the new
        state as
        `sharding.shardings`.

    Returns:
      `step(state, ref_params, rollout, rewards, sampling, objective) -> (state, metrics)`. It takes
      the old state's memory over. `ref_params=None` leaves the KL term and the reference pass out
      of the program. rewards: f32[B, G]. metrics: scalars under the names of the README.
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
    sharding.check_batch(size, algorithm.microbatch, mesh)
    check_group_options(group_size, baseline=algorithm.baseline, scale=algorithm.scale)
    program = _Program(model, optimizer, algorithm, mesh, sampling, objective)
    metrics = rollout_metrics(rollout, rewards)
    batch = program.score(state.params, ref_params, rollout, rewards)

    def inner(state, _):
        gradient, terms = program.gradient(state.params, batch)
        state, applied = program.apply(state, gradient)
        return state, terms | applied

    state, terms = jax.lax.scan(inner, state, length=algorithm.inner_updates)
    return state._replace(step=state.step + 1), metrics | _reduce(terms)


@dataclasses.dataclass(frozen=True)
class _Program:
    """The pieces of one update with their settings bound; it holds no state."""

    model: models.Transformer
    optimizer: optax.GradientTransformation
    algorithm: Algorithm
    mesh: Mesh | None
    sampling: Sampling
    objective: Objective

    def score(self, params, ref_params, rollout, rewards) -> Batch:
        """Everything that stays fixed during the inner updates, from the whole batch at once."""
        a = self.algorithm
        in_reward = ref_params is not None and a.kl_place == 'reward'
        old = ref = None
        if a.inner_updates > 1 or in_reward:  # else the current ones are the old ones
            old = self._logprobs(params, rollout)
        if ref_params is not None:
            ref = self._logprobs(ref_params, rollout)
        if in_reward:
            kl = getattr(losses, a.kl)(old, ref)
            rewards = rewards - self.objective.beta * jnp.where(rollout.mask, kl, 0.0).sum(-1)
        advantages = jax.vmap(
            functools.partial(
                group_advantages, baseline=a.baseline, scale=a.scale, eps=a.advantage_eps
            )
        )(rewards)
        advantages = jnp.broadcast_to(advantages[..., None], rollout.mask.shape)
        weights = token_weights(rollout.mask, aggregation=a.aggregation)
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
        norm = optax.global_norm(gradient)
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
        loss, terms = jax.vmap(functools.partial(self._group_loss, params))(microbatch)
        return loss.sum(), terms

    def _group_loss(self, params, group: Batch):
        """One group's share of the loss, and its terms for the metrics."""
        a, rollout = self.algorithm, group.rollout
        logprobs, entropy = group_logprobs(
            self.model, params, rollout, self.sampling, chunk=a.logprob_chunk, entropy=a.entropy
        )
        if group.old_logprobs is None:
            group = group._replace(old_logprobs=jax.lax.stop_gradient(logprobs))
        per_token = getattr(losses, a.loss)(logprobs, group, self.objective)
        kl = None
        if group.ref_logprobs is not None:
            kl = getattr(losses, a.kl)(logprobs, group.ref_logprobs)
            if a.kl_place == 'loss':
                per_token = per_token + self.objective.beta * kl
        loss = jnp.where(rollout.mask, group.weights * per_token, 0.0).sum()
        terms = _group_terms(logprobs, group, self.objective, kl, entropy)
        return loss, jax.lax.stop_gradient(terms | {'loss': loss})

    def _logprobs(self, params, rollout: Rollout) -> jax.Array:
        """f32[B, G, T] without gradient, a microbatch at a time."""
        chunk = self.algorithm.logprob_chunk

        def one(group):
            return group_logprobs(self.model, params, group, self.sampling, chunk=chunk)[0]

        def some(microbatch):
            return jax.vmap(one)(microbatch)

        out = jax.lax.map(some, self._cut(rollout)).swapaxes(0, 1)
        return jax.lax.stop_gradient(out.reshape(-1, *out.shape[2:]))

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


def _group_terms(logprobs, group: Batch, objective: Objective, kl, entropy) -> dict[str, jax.Array]:
    """Sums and extremes over one group's tokens, from which `_reduce` makes the metrics."""
    mask = group.rollout.mask
    count = mask.sum()
    low, high = losses.clip_masks(logprobs, group, objective)
    mismatch = jnp.where(mask, group.old_logprobs - group.rollout.logprobs, 0.0)
    ratio = jnp.exp(mismatch)
    terms = {
        'count': count,
        'clip_low': (low & mask).sum() / jnp.maximum(count, 1),
        'clip_high': (high & mask).sum() / jnp.maximum(count, 1),
        'difference_sum': jnp.abs(mismatch).sum(),
        'difference_max': jnp.abs(mismatch).max(),
        'ratio_min': ratio.min(),
        'ratio_sum': jnp.where(mask, ratio, 0.0).sum(),
        'ratio_max': ratio.max(),
    }
    if kl is not None:
        terms['kl_sum'] = jnp.where(mask, kl, 0.0).sum()
    if entropy is not None:
        terms['entropy_sum'] = jnp.where(mask, entropy, 0.0).sum()
    return terms


def _reduce(terms: dict[str, jax.Array]) -> dict[str, jax.Array]:
    """Metrics from terms [inner updates, microbatches, m]: means over tokens, groups or updates."""
    per_update = terms['loss'].shape[0]
    tokens = jnp.maximum(terms['count'].sum(), 1)
    low, high = terms['clip_low'], terms['clip_high']
    metrics = {
        'loss': terms['loss'].sum() / per_update,
        'grad_norm': terms['grad_norm'].mean(),
        'skipped_updates': terms['skipped_updates'][-1],
        'clip_ratio/low_mean': low.mean(),
        'clip_ratio/low_min': low.min(),
        'clip_ratio/high_mean': high.mean(),
        'clip_ratio/high_max': high.max(),
        'clip_ratio/region_mean': (low + high).mean(),
        'sampling/sampling_logp_difference/mean': terms['difference_sum'].sum() / tokens,
        'sampling/sampling_logp_difference/max': terms['difference_max'].max(),
        'sampling/importance_sampling_ratio/min': terms['ratio_min'].min(),
        'sampling/importance_sampling_ratio/mean': terms['ratio_sum'].sum() / tokens,
        'sampling/importance_sampling_ratio/max': terms['ratio_max'].max(),
    }
    for name in ('kl', 'entropy'):
        if f'{name}_sum' in terms:
            metrics[name] = terms[f'{name}_sum'].sum() / tokens
    return metrics
