"""What the parts of one update program share: the model with its settings bound, and microbatches.

It holds no state. A microbatch is a number of groups, over all devices, that are computed at a
time; arrays cut into them have shape [microbatches, m, ...].
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from grpo_jax import models
from grpo_jax.losses import Objective
from grpo_jax.score import completion_logprobs
from grpo_jax.types import Params, Rollout, Sampling


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
