"""A loss of logits and its gradient, computed in one pass over chunks of positions.

The logits of a chunk are computed once, and with them its loss and the gradients with respect to
logits, hidden states and output matrix. Nothing is recomputed, memory holds the logits of one
chunk, and all chunks of all microbatches add to one gradient of the output matrix. The loss has to
be a sum over positions.
"""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

from grpo_jax import models
from grpo_jax.engine.bundles import Outputs
from grpo_jax.engine.chunks import cut_columns, join_columns
from grpo_jax.models.kernels import cpu
from grpo_jax.sharding import by_axes
from grpo_jax.types import Batch, Params

# The gradient of the output matrix is computed a few columns at a time: the fewest columns, and the
# most pieces.
_COLUMNS, _PIECES = 4096, 32

_product = functools.partial(jnp.matmul, preferred_element_type=jnp.float32)


@dataclasses.dataclass(frozen=True)
class ChunkedLoss:
    """An output projection with the loss of its logits.

    Attributes:
      config: of the decoder.
      matrix: function from the trained parameters to the output matrix [D, V].
      loss: function from logits f32[b, g, c, V], and the c columns of the batch that they belong
        to, to the loss f32[] and outputs {name: [b, g, c]}.
      chunk: c, columns whose logits exist at a time.
    """

    config: models.ModelConfig
    matrix: Callable[[Params], jax.Array]
    loss: Callable[[jax.Array, Batch], tuple[jax.Array, Outputs]]
    chunk: int

    def add_gradient(
        self, params: Params, hidden: jax.Array, part: Batch, total: Params
    ) -> tuple[Params, jax.Array, Outputs]:
        """Adds the gradient of the chunks' losses to a running total.

        Args:
          params: what is trained.
          hidden: [b, g, w, D], the states that predict the tokens of `part`.
          part: a batch whose arrays are [b, g, w].
          total: f32, like `params`.

        Returns:
          The new total, the gradient with respect to `hidden`, and outputs {name: [b, g, w]}.
        """
        part = part.per_token()
        length = hidden.shape[2]
        if length <= self.chunk:
            total, (outputs, grad_states) = self._one_chunk(params, total, (hidden, part))
            return total, grad_states, outputs
        pieces = jax.tree.map(lambda x: cut_columns(x, self.chunk), (hidden, part))
        total, stacked = jax.lax.scan(functools.partial(self._one_chunk, params), total, pieces)
        outputs, grad_states = jax.tree.map(lambda x: join_columns(x, length), stacked)
        return total, grad_states, outputs

    def _one_chunk(
        self, params: Params, total: Params, piece: tuple[jax.Array, Batch]
    ) -> tuple[Params, tuple[Outputs, jax.Array]]:
        """The new total, and (outputs, gradient with respect to the hidden states)."""
        c, (states, part) = self.config, piece
        rows = states.reshape(-1, states.shape[-1])
        # Computed inside the loop, which would otherwise keep a transposed copy.
        matrix = by_axes(self.matrix(params).astype(c.dtype), 'head')

        def loss(products: jax.Array) -> tuple[jax.Array, Outputs]:
            logits = models.finish_logits(c, products).reshape(*states.shape[:-1], -1)
            return self.loss(logits, part)

        grad_logits, outputs = jax.grad(loss, has_aux=True)(_product(rows, matrix))
        grad_logits = grad_logits.astype(c.dtype)
        grad_states = _product(grad_logits, matrix.T).astype(states.dtype).reshape(states.shape)
        if c.output_parameter is not None:
            name, axis = c.output_parameter
            total = total | {name: _add_product(name, axis, total[name], rows, grad_logits)}
        return total, (outputs, grad_states)


def _add_product(
    name: str, axis: int, total: jax.Array, rows: jax.Array, grad_logits: jax.Array
) -> jax.Array:
    """Adds rows^T @ grad_logits [D, V] to a parameter's total, whose vocabulary is along `axis`.

    On GPUs a matrix product can add to an existing array. Elsewhere a few columns are computed at a
    time, so that the product needs no second array of the matrix's size, unless columns are spread
    over devices.
    """
    if jax.default_backend() == 'gpu':
        return total + (_product(rows.T, grad_logits) if axis else _product(grad_logits.T, rows))
    if not jax.sharding.get_abstract_mesh().empty:
        product = _product(rows.T, grad_logits)
        return total + by_axes(product if axis else product.T, name)
    pieces = _pieces(grad_logits.shape[-1])
    width = grad_logits.shape[-1] // pieces
    # On CPUs a product is faster if its matrix is transposed beforehand, and if the longer axis is
    # last, than if XLA transposes inside the product. XLA does neither by itself.
    transposed = cpu.materialize(rows.T)

    def add(i: jax.Array, total: jax.Array) -> jax.Array:
        columns = jax.lax.dynamic_slice_in_dim(grad_logits, i * width, width, 1)
        product = cpu.materialize(_product(transposed, columns))
        product = product if axis else product.T
        old = jax.lax.dynamic_slice_in_dim(total, i * width, width, axis)
        return jax.lax.dynamic_update_slice_in_dim(total, old + product, i * width, axis)

    return jax.lax.fori_loop(0, pieces, add, total)


def _pieces(size: int) -> int:
    """The number of equal pieces that the columns of the output matrix are cut into."""
    counts = range(1, _PIECES + 1)
    return max(n for n in counts if size % n == 0 and (n == 1 or size // n >= _COLUMNS))
