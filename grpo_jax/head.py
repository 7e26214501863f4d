"""A loss of logits, computed for a chunk of positions at a time with its gradient in the same pass.

A chunk's logits exist once: from them come its loss, their slope, and what that means for the
hidden states and for the output matrix, before the next chunk's are made. So nothing is computed
twice, no more logits are in memory than one chunk's, and the matrix has one gradient that all
chunks of all microbatches are added to. It takes a loss that is a sum over positions.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from grpo_jax import models
from grpo_jax.microbatch import Outputs
from grpo_jax.score import cut_columns, join_columns
from grpo_jax.types import Batch, Params

# Of the output matrix, whose gradient is computed in pieces: at least so many columns, most pieces.
_COLUMNS, _PIECES = 4096, 32


class Head(NamedTuple):
    """What becomes of hidden states."""

    config: models.ModelConfig
    matrix: Callable[[Params], jax.Array]  # `Transformer.output_matrix` of what is trained
    # Loss f32[] and outputs {name: [b, g, c]} from logits f32[b, g, c, V] and the c columns of the
    # batch's arrays that they belong to.
    of_logits: Callable[[jax.Array, Batch], tuple[jax.Array, Outputs]]
    chunk: int  # positions of each row


def add_gradient(
    head: Head, params: Params, hidden: jax.Array, part: Batch, total: Params
) -> tuple[Params, jax.Array, Outputs]:
    """Adds the gradient of the chunks' losses to a running total.

    Args:
      head: what to compute.
      params: what is trained.
      hidden: [b, g, w, D], the states that predict the tokens of
      part: a batch whose arrays are [b, g, w], without its prompts.
      total: f32, like `params`.

    Returns:
      The new total, the loss's slope by the hidden states, and outputs {name: [b, g, w]}.
    """
    length, chunk = hidden.shape[2], head.chunk
    if length <= chunk:
        total, (out, slope) = _one(head, params, total, (hidden, part))
        return total, slope, out
    pieces = jax.tree.map(lambda x: cut_columns(x, chunk), (hidden, part))
    total, found = jax.lax.scan(functools.partial(_one, head, params), total, pieces)
    out, slope = jax.tree.map(lambda x: join_columns(x, length), found)
    return total, slope, out


def _one(head: Head, params: Params, total: Params, piece: tuple[jax.Array, Batch]):
    """The new total, and (outputs, slope by the states) of one chunk."""
    c, (states, part) = head.config, piece
    rows = states.reshape(-1, states.shape[-1])
    matrix = head.matrix(params).astype(c.dtype)  # here, so that no loop keeps a transposed copy

    def loss(raw):
        logits = models.capped(c, raw).reshape(*states.shape[:-1], -1)
        return head.of_logits(logits, part)

    slope, out = jax.grad(loss, has_aux=True)(_product(rows, matrix))
    slope = slope.astype(c.dtype)
    to_states = _product(slope, matrix.T).astype(states.dtype).reshape(states.shape)
    if c.output_parameter is not None:
        name, axis = c.output_parameter
        total = total | {name: _add_product(total[name], rows, slope, axis)}
    return total, (out, to_states)


_product = functools.partial(jnp.matmul, preferred_element_type=jnp.float32)


def _add_product(total: jax.Array, rows: jax.Array, slope: jax.Array, axis: int) -> jax.Array:
    """Adds rows^T slope [D, V] to a total whose vocabulary is along `axis`.

    GPUs have products that add to what there is. Elsewhere it is a few columns at a time, so that
    the product does not need the memory of another matrix; but columns that lie on several devices
    all together.
    """
    if jax.default_backend() == 'gpu':
        return total + (_product(rows.T, slope) if axis else _product(slope.T, rows))
    pieces = _pieces(slope.shape[-1]) if jax.sharding.get_abstract_mesh().empty else 1
    width = slope.shape[-1] // pieces
    # Compilers for CPUs are faster at products of a matrix that was turned before, and whose longer
    # axis is last; they would do neither.
    turned = jax.lax.optimization_barrier(rows.T)

    def add(i, total):
        some = jax.lax.dynamic_slice_in_dim(slope, i * width, width, 1)
        found = jax.lax.optimization_barrier(_product(turned, some))
        found = found if axis else found.T
        old = jax.lax.dynamic_slice_in_dim(total, i * width, width, axis)
        return jax.lax.dynamic_update_slice_in_dim(total, old + found, i * width, axis)

    return jax.lax.fori_loop(0, pieces, add, total)


def _pieces(size: int) -> int:
    """How many equal ones the columns of the output matrix are cut into: few that are not small."""
    counts = range(1, _PIECES + 1)
    return max(n for n in counts if size % n == 0 and (n == 1 or size // n >= _COLUMNS))
