"""A loss of logits, computed for a chunk of positions at a time with its gradient in the same pass.

A chunk's logits exist once: from them come its loss, their slope, and what that means for the
hidden states and for the output matrix, before the next chunk's are made. So nothing is computed
twice, and no more logits are in memory than one chunk's, forward and backward. It takes a loss that
is a sum over positions.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from grpo_jax import models
from grpo_jax.score import cut_columns, join_columns
from grpo_jax.types import Batch


class Head(NamedTuple):
    """What becomes of hidden states."""

    config: models.ModelConfig
    # Loss f32[] and outputs {name: [b, g, c]} from logits f32[b, g, c, V] and the c columns of the
    # batch's arrays that they belong to.
    of_logits: Callable[[jax.Array, Batch], tuple[jax.Array, dict[str, jax.Array]]]
    chunk: int  # positions of each row
    frozen: bool  # the output matrix is not trained


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def by_chunks(head: Head, matrix: jax.Array, hidden: jax.Array, part: Batch):
    """The sum of the chunks' losses, and their outputs.

    Args:
      head: what to compute.
      matrix: [D, V] of `Transformer.output_matrix`.
      hidden: [b, g, w, D], the states that predict the tokens of
      part: a batch whose arrays are [b, g, w], without its prompts. It has no gradient.

    Returns:
      f32[], and {name: [b, g, w]}, through which no gradient flows.
    """
    return _forward(head, matrix, hidden, part)[0]


def _forward(head: Head, matrix: jax.Array, hidden: jax.Array, part: Batch):
    length, chunk = hidden.shape[2], head.chunk
    if length <= chunk:
        found, slopes = _one(head, matrix, hidden, part)
        return found, jax.lax.optimization_barrier(slopes)

    def add(total, xs):
        (loss, out), (to_matrix, to_states) = _one(head, matrix, *xs)
        return jax.tree.map(jnp.add, total, (loss, to_matrix)), (out, to_states)

    zero = jnp.float32(0), None if head.frozen else jnp.zeros(matrix.shape, jnp.float32)
    total, rest = jax.lax.scan(
        add, zero, jax.tree.map(lambda x: cut_columns(x, chunk), (hidden, part))
    )
    out, to_hidden = jax.tree.map(lambda x: join_columns(x, length), rest)
    return (total[0], out), (total[1], to_hidden)


def _one(head: Head, matrix: jax.Array, states: jax.Array, part: Batch):
    """((loss, outputs), (slope by the matrix, or None, and by the states)) of one chunk."""
    c = head.config
    rows = states.reshape(-1, states.shape[-1])
    product = functools.partial(jnp.matmul, preferred_element_type=jnp.float32)

    def loss(raw):
        logits = models.capped(c, raw).reshape(*states.shape[:-1], -1)
        return head.of_logits(logits, part)

    found, slope = jax.value_and_grad(loss, has_aux=True)(product(rows, matrix))
    slope = slope.astype(c.dtype)
    to_states = product(slope, matrix.T).astype(states.dtype).reshape(states.shape)
    # [D, V], not [V, D]: compilers for CPUs are faster at products with the longer axis last.
    return found, (None if head.frozen else product(rows.T, slope), to_states)


def _backward(head: Head, slopes: Any, cotangents: Any):
    times, _ = cotangents
    to_matrix, to_hidden = jax.tree.map(lambda x: x * times.astype(x.dtype), slopes)
    if not head.frozen:
        to_matrix = to_matrix.astype(head.config.dtype)
    return to_matrix, to_hidden, None


by_chunks.defvjp(_forward, _backward)
