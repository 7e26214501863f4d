"""Gradients and outputs of a batch, accumulated over microbatches of groups and bundles of rows.

Cut into microbatches, arrays have shape [microbatches, m, ...], where m counts groups, or slices of
groups if the mesh splits groups (see `sharding.split_groups`). The prompts of a microbatch are
processed once, forward and backward, however many bundles its completions are processed in; see
`bundles`, and `packing` for completions that are packed into sequences.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from grpo_jax import models
from grpo_jax.engine import bundles, packing
from grpo_jax.engine.bundles import Carry, Outputs, widths_of
from grpo_jax.sharding import DATA, data_devices, join_groups, slices_of, split_groups
from grpo_jax.types import Batch, Params

# Hidden states [b, g, w, D] that predict a bundle's tokens, from all parameters and the keys and
# values [L, m, K, P, h] of the microbatch's prompts.
Hidden = Callable[[models.Transformer, Params, models.KeyValues], jax.Array]
# Outputs [b, g, w] from all parameters, hidden states and the bundle.
Scorer = Callable[[Params, jax.Array, Batch], Outputs]
# Adds the gradient of a loss of hidden states to a total: (trained parameters, states, bundle,
# total) -> (new total, gradient with respect to the states, outputs).
Learner = Callable[[Params, jax.Array, Batch, Params], tuple[Params, jax.Array, Outputs]]
BundleStep = Callable[[Carry, Batch, Hidden], tuple[Carry, Outputs]]


@dataclasses.dataclass(frozen=True)
class Decoder:
    """A model, and the function from its trained parameters to all its parameters."""

    model: models.Transformer
    full_params: Callable[[Params], Params]

    def prompt_cache(self, trained: Params, part: Batch) -> models.KeyValues:
        """Keys and values [L, m, K, P, h] of a microbatch's prompts."""
        prompts, params = part.rollout.prompts, self.full_params(trained)
        return models.apply_routed(
            self.model, params, prompts.routing, prompts.tokens, prompts.length, method='prefill'
        )[0]


@dataclasses.dataclass(frozen=True)
class Microbatches:
    """How a batch is cut into microbatches and bundles; the fields are those of `Compute`."""

    size: int  # groups per microbatch
    mesh: Mesh | None = None
    rows: int = 0
    widths: int = 1
    packed: bool = False

    def shapes(self, shape: tuple[int, ...]) -> list[tuple[int, ...]]:
        """The shapes [b, g, w] of the bundles of a batch [B, G, T], the largest first."""
        groups, group_size, length = shape
        if not self.rows:
            slices = slices_of(groups, group_size, self.mesh)
            size = self.size * slices, group_size // slices
            return [(*size, w) for w in widths_of(length, self.widths)[::-1]]
        if self.packed:
            rows = dict.fromkeys((self.rows, data_devices(self.mesh)))
            return [(n, 1, length) for n in rows]
        return [(self.rows, 1, w) for w in widths_of(length, self.widths)[::-1]]

    def slices(self, batch: Batch) -> int:
        """How many slices each group is processed in."""
        groups, group_size, _ = batch.rollout.mask.shape
        return slices_of(groups, group_size, self.mesh)

    def cut(self, tree: Any, slices: int = 1) -> Any:
        """[B, ...] -> [microbatches, m, ...], strided so that devices keep the groups they hold.

        Args:
          tree: arrays [B, ...]; with slices [B, G, ...], and `Prompts`.
          slices: of each group; m counts them.
        """

        def cut_array(x: jax.Array) -> jax.Array:
            x = x.reshape(self.size * slices, -1, *x.shape[1:]).swapaxes(0, 1)
            if self.mesh is None:
                return x
            where = NamedSharding(self.mesh, PartitionSpec(None, DATA))
            return jax.lax.with_sharding_constraint(x, where)

        return jax.tree.map(cut_array, split_groups(tree, slices, self.mesh))

    def sum(
        self, function: Callable[[Any], Any], tree: Any, *, like: Any, slices: int = 1
    ) -> tuple[Any, Any]:
        """Calls `function` on each microbatch; sums its first results, stacks its second ones.

        Args:
          function: microbatch -> (total, terms).
          tree: arrays [B, ...].
          like: a tree with the shapes and dtypes of the total.
          slices: of each group, if the function needs no whole groups; see `sharding.slices_of`.
        """

        def add(total: Any, microbatch: Any) -> tuple[Any, Any]:
            part, terms = function(microbatch)
            return jax.tree.map(jnp.add, total, part), terms

        return jax.lax.scan(add, jax.tree.map(jnp.zeros_like, like), self.cut(tree, slices))

    def outputs(self, decoder: Decoder, scorer: Scorer, trained: Params, batch: Batch) -> Outputs:
        """The scorer's outputs [B, G, T] for a whole batch, without gradient."""
        params = decoder.full_params(trained)
        decoder = dataclasses.replace(decoder, full_params=lambda params: params)

        def microbatch(part: Batch) -> Outputs:
            prompts = decoder.prompt_cache(params, part)

            def bundle(carry: Carry, rows: Batch, hidden: Hidden) -> tuple[Carry, Outputs]:
                return carry, scorer(params, hidden(decoder.model, params, prompts), rows)

            return self._over_bundles(bundle, (), part)[1]

        slices = self.slices(batch)
        outputs = jax.lax.map(microbatch, self.cut(batch, slices))
        return jax.lax.stop_gradient(self._uncut(outputs, slices))

    def gradient(
        self, decoder: Decoder, learner: Learner, trained: Params, batch: Batch
    ) -> tuple[Params, Outputs]:
        """The gradient of the summed loss in the trained parameters, and outputs [B, G, T].

        The forward and backward passes of a prompt run once, however many bundles use it. Sums are
        float32 whatever the dtype of the parameters.
        """
        scale = loss_scale(decoder.model, batch.rollout.mask)
        batch = batch._replace(weights=batch.weights * scale)

        def microbatch(total: Params, part: Batch) -> tuple[Params, Outputs]:
            prompts, pull_back_prompts = jax.vjp(
                lambda p: decoder.prompt_cache(p, part), trained
            )  # fmt: skip

            def bundle(totals: Carry, rows: Batch, hidden: Hidden) -> tuple[Carry, Outputs]:
                states, pull_back = jax.vjp(
                    lambda p, prompts: hidden(decoder.model, decoder.full_params(p), prompts),
                    trained,
                    prompts,
                )
                total, grad_prompts = totals
                total, grad_states, outputs = learner(trained, states, rows, total)
                return tree_add((total, grad_prompts), pull_back(grad_states)), outputs

            totals = (total, zeros_float32(prompts))
            (total, grad_prompts), outputs = self._over_bundles(bundle, totals, part)
            grad_prompts = jax.tree.map(lambda x, y: x.astype(y.dtype), grad_prompts, prompts)
            (through_prompts,) = pull_back_prompts(grad_prompts)
            return tree_add(total, through_prompts), outputs

        slices = self.slices(batch)
        total, outputs = jax.lax.scan(microbatch, zeros_float32(trained), self.cut(batch, slices))
        total = jax.tree.map(lambda x, y: (x / scale).astype(y.dtype), total, trained)
        return total, self._uncut(outputs, slices)

    def _uncut(self, outputs: Outputs, slices: int) -> Outputs:
        """[microbatches, m, ...] -> [B, ...], undoing `cut`."""
        outputs = jax.tree.map(lambda x: x.swapaxes(0, 1).reshape(-1, *x.shape[2:]), outputs)
        return join_groups(outputs, slices, self.mesh)

    def _over_bundles(self, step: BundleStep, carry: Carry, part: Batch) -> tuple[Carry, Outputs]:
        """Threads a carry through all bundles, and joins their outputs into [m, G, T]."""
        if not self.rows:
            return _in_columns(step, carry, part, lambda prompts: prompts, self.widths)
        shards = data_devices(self.mesh)
        if self.packed:
            return packing.over_sequences(step, carry, part, shards, self.rows)
        mask = part.rollout.mask
        order = bundles.by_length(mask, shards, self.rows)

        def bundle(carry: Carry, index: jax.Array) -> tuple[Carry, Outputs]:
            groups = index // mask.shape[1]
            rows = bundles.take_rows(part, index, groups)
            pick = functools.partial(bundles.take_prompts, groups=groups)
            return _in_columns(step, carry, rows, pick, self.widths)

        carry, outputs = jax.lax.scan(bundle, carry, order)
        return carry, jax.tree.map(lambda x: bundles.put_back(x, order, mask.shape), outputs)


def _in_columns(
    step: BundleStep,
    carry: Carry,
    rows: Batch,
    pick: Callable[[models.KeyValues], models.KeyValues],
    widths: int,
) -> tuple[Carry, Outputs]:
    """Processes one bundle in as few columns as its tokens need; `pick` selects its prompts."""

    def narrow(carry: Carry, rows: Batch) -> tuple[Carry, Outputs]:
        prompts, tokens = rows.rollout.prompts, rows.rollout.tokens

        def hidden(model: models.Transformer, params: Params, cache: models.KeyValues) -> jax.Array:
            last = models.last_tokens(prompts.tokens, prompts.length)
            return models.hidden_after_prompt(
                model, params, pick(cache), last, prompts.length, tokens,
                routing=rows.rollout.routing,
            )  # fmt: skip

        return step(carry, rows, hidden)

    return bundles.in_smallest_width(narrow, carry, rows, widths)


def loss_scale(model: models.Transformer, mask: jax.Array) -> float:
    """The factor of the loss while its gradient is computed: a power of 2 for float16, else 1.

    Token weights are about 1 / tokens, so with many tokens gradients would underflow in float16
    (Micikevicius et al., arXiv 1710.03740, section 3.2). Scaled weights are 2^-4 to 2^-3 for any
    number of tokens.
    """
    if getattr(model.config, 'dtype', '') != 'float16':
        return 1.0
    return max(1.0, 2.0 ** (mask.size.bit_length() - 4))


def zeros_float32(like: Any) -> Any:
    """Zeros of the same shapes, in float32."""
    return jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), like)


def tree_add(total: Any, new: Any) -> Any:
    """The sum, in the total's dtypes."""
    return jax.tree.map(lambda x, y: x + y.astype(x.dtype), total, new)
