"""Reward models: scoring completions with a decoder, and the losses and step that train it.

An outcome model gives a completion one score, at its last token; a process model gives one at the
end of each step of the solution. Both are a `Transformer` with `scalar_head` and process each
prompt once for its group.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from grpo_jax import models, sharding
from grpo_jax.algorithm.checks import shape_of
from grpo_jax.algorithm.optimizer import apply_gradient
from grpo_jax.algorithm.program import init_state
from grpo_jax.engine.accumulate import Microbatches
from grpo_jax.engine.compute import Compute, choose
from grpo_jax.types import Params, Rollout, TrainState

KINDS = ('outcome', 'process')
LOSSES = ('bradley_terry', 'label', 'step')

Scorer = Callable[[Params, Rollout], jax.Array]
Step = Callable[..., tuple[TrainState, dict[str, jax.Array]]]


# Scores


def outcome_scores(model: models.Transformer, params: Params, rollout: Rollout) -> jax.Array:
    """f32[B, G]: the score of the hidden state at each completion's last token.

    Args:
      model: with `scalar_head`.
      params: its parameters.
      rollout: prompts and completions [B, G, T], each of at least one token.

    Raises:
      ValueError: the model has no scalar head.
    """
    hidden = _hidden_states(model, params, rollout)
    last = jnp.maximum(rollout.mask.sum(-1) - 1, 0)
    hidden = jnp.take_along_axis(hidden, last[..., None, None], axis=2)[:, :, 0]
    return models.apply(model, params, hidden, method='scores')


def token_scores(model: models.Transformer, params: Params, rollout: Rollout) -> jax.Array:
    """f32[B, G, T]: the score of the hidden state at each token; 0 outside the mask.

    Arguments and errors are those of `outcome_scores`.
    """
    hidden = _hidden_states(model, params, rollout)
    scores = models.apply(model, params, hidden, method='scores')
    return jnp.where(rollout.mask, scores, 0.0)


def _hidden_states(model: models.Transformer, params: Params, rollout: Rollout) -> jax.Array:
    prompts = rollout.prompts
    return models.hidden_at_tokens(model, params, prompts.tokens, prompts.length, rollout.tokens)


def make_scorer(
    model: models.Transformer, mesh: Mesh | None = None, *, kind: str = 'outcome'
) -> Scorer:
    """Makes a jitted function that scores a rollout.

    Args:
      model: with `scalar_head`.
      mesh: the devices; with one, the rollout is placed by `sharding.put_rollout`.
      kind: 'outcome' or 'process'.

    Returns:
      `scorer(params, rollout)`: f32[B, G] of `outcome_scores` or f32[B, G, T] of `token_scores`. It
      raises ValueError if the batch cannot be split over the mesh.

    Raises:
      ValueError: unknown kind.
    """
    if kind not in KINDS:
        raise ValueError(f'reward model kind={kind!r} is unknown: use one of {", ".join(KINDS)}')
    function = outcome_scores if kind == 'outcome' else token_scores

    def scorer(params: Params, rollout: Rollout) -> jax.Array:
        groups, group_size = rollout.ended.shape
        slices = sharding.slices_of(groups, group_size, mesh)
        with sharding.use(mesh, splits_params=True):
            parts = sharding.split_groups(rollout, slices, mesh)
            return sharding.join_groups(function(model, params, parts), slices, mesh)

    return jax.jit(scorer)


# Losses


def bradley_terry(scores: jax.Array, labels: jax.Array) -> tuple[jax.Array, jax.Array]:
    """One group's mean of -log sigmoid(s_i - s_j) over all pairs with label_i > label_j.

    The negative log-likelihood of the comparisons in the Bradley-Terry model (Ouyang et al., arXiv
    2203.02155, eq. 1). Completions with equal labels are not compared.

    Args:
      scores: f32[G].
      labels: f32[G], of which only the order counts.

    Returns:
      The mean f32[] (0 without a pair), and the number of pairs i32[].
    """
    margins = scores[:, None] - scores[None, :]
    return _mean(jax.nn.softplus(-margins), _pairs(labels))


def label_loss(
    scores: jax.Array, labels: jax.Array, where: jax.Array | None = None
) -> tuple[jax.Array, jax.Array]:
    """One group's mean cross-entropy of sigmoid(score) as the probability of being correct.

    With a label per completion it trains a verifier (Cobbe et al., arXiv 2110.14168), with a label
    per step a process reward model (Lightman et al., arXiv 2305.20050).

    Args:
      scores: f32[...].
      labels: f32[...] of the same shape, within [0, 1].
      where: bool[...], which labels to use; None: all.

    Returns:
      The mean f32[] (0 without a label), and the number of labels used i32[].
    """
    losses = optax.losses.sigmoid_binary_cross_entropy(scores, labels)
    return _mean(losses, jnp.ones(labels.shape, bool) if where is None else where)


def _pairs(labels: jax.Array) -> jax.Array:
    """bool[..., G, G]: whether completion i is better than completion j."""
    return labels[..., :, None] > labels[..., None, :]


def _mean(values: jax.Array, where: jax.Array) -> tuple[jax.Array, jax.Array]:
    count = where.sum()
    return jnp.where(where, values, 0.0).sum() / jnp.maximum(count, 1), count


# Training


def make_step(
    model: models.Transformer,
    optimizer: optax.GradientTransformation,
    loss: str,
    mesh: Mesh | None = None,
    *,
    microbatch: int | None = None,
) -> Step:
    """Makes a jitted optimizer update of a reward model.

    The loss is the mean over all pairs, completions or steps of the batch. They are counted before
    the batch is cut into microbatches or spread over devices, so neither changes the loss.

    Args:
      model: with `scalar_head`.
      optimizer: from `optimizer.adamw`, or any optax transformation.
      loss: 'bradley_terry' or 'label' of `outcome_scores`, or 'step', the `label_loss` of
        `token_scores` where steps end.
      mesh: the devices; with one, the batch is placed by `sharding.put_groups` and the new state
        sharded as `sharding.shardings`. Groups are not split.
      microbatch: groups whose gradient is computed at a time; None: chosen by `engine.compute`.

    Returns:
      `step(state, rollout, labels, ends=None) -> (state, metrics)`. It donates the state, which
      comes from `program.init_state`. labels: f32[B, G], or f32[B, G, T] for 'step', used where
      ends, bool[B, G, T], is true. metrics: the scalars 'loss', 'accuracy' (share of the pairs
      scored in the right order, or of the labels whose score has the right sign), 'grad_norm' and
      'skipped_updates' (updates skipped because the gradient was not finite). It raises ValueError
      for labels or ends of another shape, and for a batch that is not divisible by microbatch
      or mesh.

    Raises:
      ValueError: unknown loss.
    """
    if loss not in LOSSES:
        raise ValueError(f'reward model loss={loss!r} is unknown: use one of {", ".join(LOSSES)}')

    def step(
        state: TrainState, rollout: Rollout, labels: jax.Array, ends: jax.Array | None = None
    ) -> tuple[TrainState, dict[str, jax.Array]]:
        _check(loss, rollout, labels, ends)
        plan = choose(Compute(microbatch), model.config, shape_of(rollout), mesh)
        sharding.check_batch(rollout.tokens.shape[0], plan.microbatch, mesh)
        with sharding.use(mesh, splits_params=True):
            counted = _counted(loss, rollout, labels, ends)
            total = jnp.maximum(counted.sum(), 1)
            gradient_of = jax.grad(functools.partial(_loss, model, loss, total), has_aux=True)
            gradient, terms = Microbatches(plan.microbatch, mesh).sum(
                functools.partial(gradient_of, state.params),
                (rollout, labels, counted),
                like=state.params,
            )
            finite = jnp.isfinite(optax.tree.norm(gradient))
            state, step_metrics = apply_gradient(optimizer, state, gradient, finite)
            state = state._replace(step=state.step + 1)
        step_metrics['skipped_updates'] = state.skipped
        return state, jax.tree.map(jnp.sum, terms) | step_metrics

    if mesh is None:
        return jax.jit(step, donate_argnums=0)
    key = jax.eval_shape(lambda: jax.random.key(0))
    state = jax.eval_shape(functools.partial(init_state, model, optimizer), key)
    out = (sharding.shardings(state, mesh), sharding.replicated(mesh))
    return jax.jit(step, donate_argnums=0, out_shardings=out)


def _check(loss: str, rollout: Rollout, labels: jax.Array, ends: jax.Array | None) -> None:
    shape = rollout.tokens.shape if loss == 'step' else rollout.tokens.shape[:2]
    axes = '[B, G, T]' if loss == 'step' else '[B, G]'
    if labels.shape != shape:
        raise ValueError(
            f'labels have shape {labels.shape}: the loss {loss!r} needs {axes} = {shape}'
        )
    if (ends is None) == (loss == 'step') or (ends is not None and ends.shape != shape):
        actual = 'None' if ends is None else f'of shape {ends.shape}'
        needed = f'bool{axes} = {shape}, where steps end' if loss == 'step' else 'None'
        raise ValueError(f'ends are {actual}: the loss {loss!r} needs {needed}')


def _counted(loss: str, rollout: Rollout, labels: jax.Array, ends: jax.Array | None) -> jax.Array:
    """What the loss is a mean over: pairs bool[B, G, G], completions [B, G] or steps [B, G, T]."""
    if loss == 'bradley_terry':
        return _pairs(labels)
    return jnp.ones(labels.shape, bool) if ends is None else ends & rollout.mask


def _loss(
    model: models.Transformer, loss: str, total: jax.Array, params: Params,
    microbatch: tuple[Rollout, jax.Array, jax.Array],
) -> tuple[jax.Array, dict[str, jax.Array]]:  # fmt: skip
    """A microbatch's share of the batch's loss, and of its metrics."""
    rollout, labels, counted = microbatch
    function = token_scores if loss == 'step' else outcome_scores
    scores = function(model, params, rollout)
    if loss == 'bradley_terry':
        means, counts = jax.vmap(bradley_terry)(scores, labels)
        right = _pairs(scores)
    else:
        means, counts = jax.vmap(label_loss)(scores, labels, counted)
        right = jnp.where(labels > 0.5, scores > 0, scores < 0)
    value = (means * counts).sum() / total
    return value, {'loss': value, 'accuracy': (right & counted).sum() / total}
