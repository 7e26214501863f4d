"""TRPO's step, in place of an optimizer's: natural gradient, bounded mean KL, line search.

Schulman et al., arXiv 1502.05477. The linear algebra is in `engine.trust_region`.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from grpo_jax.algorithm.logprobs import completion_logprobs
from grpo_jax.engine import trust_region
from grpo_jax.engine.accumulate import loss_scale
from grpo_jax.engine.chunks import map_chunks
from grpo_jax.engine.policy import Policy, microbatches_of
from grpo_jax.engine.token_distribution import filter_logits
from grpo_jax.models import Transformer, apply, completion_hidden
from grpo_jax.sharding import join_groups
from grpo_jax.types import Batch, Params, Rollout, Sampling

if TYPE_CHECKING:
    from grpo_jax.algorithm.config import Algorithm


def step(
    algorithm: 'Algorithm',
    policy: Policy,
    loss_fn: Callable[..., Float[Array, '']],
    params: Params,
    gradient: Params,
    batch: Batch,
) -> tuple[Params, dict[str, jax.Array]]:
    """One natural gradient step.

    Args:
      algorithm: max_kl, damping, cg_steps and backtracks.
      policy: the model and its sampling distribution.
      loss_fn: `update.loss_fn`, the surrogate loss of a batch.
      params: the policy's parameters before the step.
      gradient: of the loss at `params`.
      batch: the rollout, advantages and weights.

    Returns:
      The new parameters (unchanged if no step is accepted), and f32[] metrics by name.
    """
    a, rollout = algorithm, batch.rollout
    plan = policy.plan
    microbatches, chunk = microbatches_of(plan, policy.mesh), plan.logprob_chunk
    tokens, slices = jnp.maximum(rollout.policy_mask.sum(), 1), microbatches.slices(batch)
    model = _twice_differentiable(policy.model)
    scale = loss_scale(model, rollout.mask)

    def divergence(new: Params, part: Rollout) -> Array:
        old, new = policy.full_params(jax.lax.stop_gradient(params)), policy.full_params(new)
        kl = completion_kl(model, old, new, part, policy.sampling, chunk=chunk)
        return jnp.where(part.policy_mask, kl, 0.0).sum() / tokens

    def surrogate(new: Params, part: Batch) -> Array:
        logprobs = completion_logprobs(
            policy.model, policy.full_params(new), part.rollout, policy.sampling, chunk=chunk,
            entropy=a.needs_entropy,
        )  # fmt: skip
        return loss_fn(a, *join_groups((*logprobs, part), slices, policy.mesh))

    def total(function: Callable[[Any], Array], tree: Any) -> Array:
        """The sum of a scalar function of microbatches."""
        zero = jnp.float32(0)
        parts = microbatches.sum(
            lambda part: (function(part), None), tree, like=zero, slices=slices
        )
        return parts[0]

    def fisher(vector: Params) -> Params:
        def of_microbatch(part: Rollout) -> tuple[Params, None]:
            product = trust_region.fisher_vector_product(
                lambda new: scale * divergence(new, part), params, vector
            )
            return product, None

        product, _ = microbatches.sum(of_microbatch, rollout, like=vector, slices=slices)
        return jax.tree.map(lambda p, v: p / scale + a.damping * v, product, vector)

    new_params, taken = trust_region.natural_step(
        params,
        gradient,
        surrogate_of=lambda new: total(functools.partial(surrogate, new), batch),
        kl_of=lambda new: total(functools.partial(divergence, new), rollout),
        fisher=fisher,
        max_kl=a.max_kl,
        cg_steps=a.cg_steps,
        backtracks=a.backtracks,
    )
    terms = {f'trust_region/{name}': value for name, value in taken.items()}
    return new_params, terms | {'grad_norm': optax.tree.norm(gradient)}


def completion_kl(
    model: Transformer,
    old_params: Params,
    params: Params,
    rollout: Rollout,
    sampling: Sampling,
    *,
    chunk: int,
) -> Float[Array, 'B G T']:
    """KL(old || new) of each completion token's distribution, summed over the vocabulary.

    Both distributions are those that `sampling` describes. With filters, the KL would be infinite
    if the new policy filtered out a token of the old support. So the new support includes all of
    the old one (and both include the sampled token); a token outside the old support adds nothing.
    The supports are the same at `params = old_params`.

    Logits exist for `chunk` positions at a time, as in `logprobs.completion_logprobs`.

    Args:
      model: the decoder.
      old_params: of the policy under which the expectation is taken; they get no gradient.
      params: of the other policy; the KL is twice differentiable in them, by `jvp` of `grad` too.
      rollout: prompts and completions [B, G, T].
      sampling: temperature and filters.
      chunk: positions whose logits exist at a time.

    Returns:
      f32[B, G, T] in nats, at least 0 up to rounding. Values outside the mask are finite but
      meaningless.
    """
    prompts, tokens = rollout.prompts, rollout.tokens
    old_params = jax.lax.stop_gradient(old_params)
    old_hidden, hidden = (
        completion_hidden(model, p, prompts.tokens, prompts.length, tokens)
        for p in (old_params, params)
    )

    def piece(old_states: jax.Array, states: jax.Array, targets: jax.Array) -> jax.Array:
        old = apply(model, old_params, old_states, method='logits')
        old = filter_logits(old, sampling, keep=targets)
        inside = old > -jnp.inf
        logits = apply(model, params, states, method='logits')
        whole = filter_logits(logits, Sampling(sampling.temperature, None, None, None))
        new = jnp.where(inside, whole, filter_logits(logits, sampling))
        old_norm, norm = (jax.nn.logsumexp(x, axis=-1) for x in (old, new))
        probability = jnp.exp(old - old_norm[..., None])
        return (probability * jnp.where(inside, old - new, 0.0)).sum(-1) + norm - old_norm

    return map_chunks(piece, (old_hidden, hidden, tokens), chunk)


def _twice_differentiable(model: Transformer) -> Transformer:
    """The model with einsum attention, the only one whose gradient can be differentiated again."""
    if getattr(model.config, 'attention', 'einsum') == 'einsum':
        return model
    return model.clone(config=dataclasses.replace(model.config, attention='einsum'))
