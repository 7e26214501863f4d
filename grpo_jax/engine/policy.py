"""A model applied to a batch: log-probs or values of all tokens, and the gradient of a loss.

Microbatches, bundles, packing, chunks of logits and unrolled layers are combined here.
"""

import dataclasses
from collections.abc import Callable

import jax
from jax.sharding import Mesh

from grpo_jax import models
from grpo_jax.engine.accumulate import Decoder, Learner, Microbatches, tree_add
from grpo_jax.engine.bundles import Outputs
from grpo_jax.engine.chunked_loss import ChunkedLoss
from grpo_jax.engine.chunks import map_chunks
from grpo_jax.engine.compute import ComputePlan
from grpo_jax.engine.token_distribution import token_logprobs
from grpo_jax.sharding import join_groups
from grpo_jax.types import Batch, Params, Sampling

# f32[] from log-probs [b, g, w], entropies [b, g, w] (or None) and the part of the batch.
PolicyLoss = Callable[[jax.Array, jax.Array | None, Batch], jax.Array]
ValueLoss = Callable[[jax.Array, Batch], jax.Array]  # from values [b, g, w]


def microbatches_of(plan: ComputePlan, mesh: Mesh | None) -> Microbatches:
    """How the plan cuts a batch."""
    return Microbatches(plan.microbatch, mesh, plan.rows, plan.widths, plan.packed)


@dataclasses.dataclass(frozen=True)
class Policy:
    """A decoder with its sampling distribution.

    Attributes:
      model: the decoder.
      ref_params: parameters of the reference; with adapters, the base that they are added to; None
        without a reference.
      sampling: temperature and filters.
      plan: how a batch is computed.
      mesh: the devices.
    """

    model: models.Transformer
    ref_params: Params | None
    sampling: Sampling
    plan: ComputePlan
    mesh: Mesh | None = None

    def without_adapters(self) -> 'Policy':
        """The policy without adapters: with them, the reference is their base."""
        config = self.model.config
        model = self.model.clone(config=config.base) if config.lora.rank else self.model
        return dataclasses.replace(self, model=model, ref_params=None)

    def full_params(self, trained: Params) -> Params:
        """All parameters from the trained ones."""
        has_adapters = self.model.config.lora.rank
        return models.join_adapters(self.ref_params, trained) if has_adapters else trained

    def outputs(self, trained: Params, batch: Batch, *, entropy: bool = False) -> Outputs:
        """'logprobs' f32[B, G, T], and 'entropy' f32[B, G, T] if requested, without gradient."""
        policy = self._unrolled()

        def scorer(params: Params, hidden: jax.Array, part: Batch) -> Outputs:
            return policy._outputs(params, hidden, part, entropy)

        microbatches = microbatches_of(self.plan, self.mesh)
        return microbatches.outputs(policy._decoder, scorer, self._layers(trained), batch)

    def gradient(
        self, loss: PolicyLoss, trained: Params, batch: Batch, *, tokenwise: bool, entropy: bool
    ) -> tuple[Params, Outputs]:
        """The gradient of a loss in the trained parameters, and the `outputs` it was computed from.

        Args:
          loss: a function of log-probs, entropies and part of the batch; a sum over groups.
          trained: the trained parameters.
          batch: what the loss uses.
          tokenwise: the loss is a sum over tokens, so it can be computed from any chunk of them.
          entropy: pass entropies to the loss.
        """
        policy, microbatches = self._unrolled(), microbatches_of(self.plan, self.mesh)

        def from_logits(logits: jax.Array, part: Batch) -> tuple[jax.Array, Outputs]:
            tokens = part.rollout.tokens
            logprobs, h = token_logprobs(
                logits, tokens, self.sampling, support=part.rollout.support, entropy=entropy
            )
            return loss(logprobs, h, part.loss_inputs()), _named(logprobs, h)

        def from_hidden(
            trained: Params, hidden: jax.Array, part: Batch
        ) -> tuple[jax.Array, Outputs]:
            params = policy.full_params(trained)
            outputs = policy._outputs(params, hidden, part, entropy)
            slices = 1 if self.plan.rows else microbatches.slices(batch)
            of_groups, part = join_groups((outputs, part.loss_inputs()), slices, self.mesh)
            return loss(of_groups['logprobs'], of_groups.get('entropy'), part), outputs

        if tokenwise:
            learner: Learner = ChunkedLoss(
                policy.model.config, policy._output_matrix, from_logits, self.plan.logprob_chunk
            ).add_gradient
        else:
            learner = _learner(from_hidden)
        gradient, outputs = microbatches.gradient(
            policy._decoder, learner, self._layers(trained), batch
        )
        return models.stack_layers(gradient) if self.plan.unroll else gradient, outputs

    def loss_shapes(self, shape: tuple[int, ...], *, tokenwise: bool) -> list[tuple[int, ...]]:
        """The shapes [b, g, c] of the parts for which `gradient` calls its loss, the largest first.

        Args:
          shape: [B, G, T] of the batch.
          tokenwise: as in `gradient`.
        """
        shapes = microbatches_of(self.plan, self.mesh).shapes(shape)
        if not tokenwise and not self.plan.rows:
            return [(self.plan.microbatch, shape[1], width) for *_, width in shapes]
        if not tokenwise:
            return shapes
        chunk = self.plan.logprob_chunk
        return list(dict.fromkeys((*groups, min(width, chunk)) for *groups, width in shapes))

    @property
    def _decoder(self) -> Decoder:
        return Decoder(self.model, self.full_params)

    def _output_matrix(self, trained: Params) -> jax.Array:
        return models.apply(self.model, self.full_params(trained), method='output_matrix')

    def _outputs(self, params: Params, hidden: jax.Array, part: Batch, entropy: bool) -> Outputs:
        """What `outputs` returns, for a bundle with hidden states [b, g, w, D]."""

        def piece(
            states: jax.Array, targets: jax.Array, support: jax.Array | None
        ) -> tuple[jax.Array, jax.Array | None]:
            logits = models.apply(self.model, params, states, method='logits')
            return token_logprobs(logits, targets, self.sampling, support=support, entropy=entropy)

        arrays = hidden, part.rollout.tokens, part.rollout.support
        return _named(*map_chunks(piece, arrays, self.plan.logprob_chunk))

    def _unrolled(self) -> 'Policy':
        """The policy with its layers unrolled, if the plan says so."""
        if not self.plan.unroll:
            return self
        model = self.model.clone(unrolled=True)
        layers = models.unstack_layers(self.ref_params) if model.config.lora.rank else None
        return dataclasses.replace(self, model=model, ref_params=layers)

    def _layers(self, params: Params) -> Params:
        return models.unstack_layers(params) if self.plan.unroll else params


@dataclasses.dataclass(frozen=True)
class ValueModel:
    """A decoder with a scalar head, which gives each token the value of the state before it."""

    model: models.Transformer
    plan: ComputePlan
    mesh: Mesh | None = None

    def outputs(self, params: Params, batch: Batch) -> Outputs:
        """'values' f32[B, G, T], without gradient."""
        decoder, microbatches = self._decoder, microbatches_of(self.plan, self.mesh)

        def scorer(params: Params, hidden: jax.Array, part: Batch) -> Outputs:
            return {'values': models.apply(decoder.model, params, hidden, method='scores')}

        return microbatches.outputs(decoder, scorer, self._layers(params), batch.without_routing())

    def gradient(self, loss: ValueLoss, params: Params, batch: Batch) -> tuple[Params, Outputs]:
        """The gradient of a loss of values, and the values."""
        decoder, microbatches = self._decoder, microbatches_of(self.plan, self.mesh)

        def from_hidden(
            params: Params, hidden: jax.Array, part: Batch
        ) -> tuple[jax.Array, Outputs]:
            values = models.apply(decoder.model, params, hidden, method='scores')
            return loss(values, part), {'values': values}

        gradient, outputs = microbatches.gradient(
            decoder, _learner(from_hidden), self._layers(params), batch.without_routing()
        )
        return models.stack_layers(gradient) if self.plan.unroll else gradient, outputs

    @property
    def _decoder(self) -> Decoder:
        model = self.plan.configure(self.model)
        model = model.clone(unrolled=True) if self.plan.unroll else model
        return Decoder(model, lambda params: params)

    def _layers(self, params: Params) -> Params:
        return models.unstack_layers(params) if self.plan.unroll else params


def _learner(loss: Callable[..., tuple[jax.Array, Outputs]]) -> Learner:
    """The `Learner` of a function (trained, hidden, part) -> (loss f32[], outputs)."""

    def learn(
        trained: Params, hidden: jax.Array, part: Batch, total: Params
    ) -> tuple[Params, jax.Array, Outputs]:
        gradient = jax.grad(loss, argnums=(0, 1), has_aux=True)
        (grad_params, grad_states), outputs = gradient(trained, hidden, part)
        return tree_add(total, grad_params), grad_states, outputs

    return learn


def _named(logprobs: jax.Array, entropy: jax.Array | None) -> Outputs:
    return {'logprobs': logprobs} | ({} if entropy is None else {'entropy': entropy})
