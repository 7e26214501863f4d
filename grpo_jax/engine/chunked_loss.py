"""A loss of logits and its gradient, computed in one pass over chunks of positions.

The logits of a chunk are computed once, and with them its loss and the gradients by the logits, the
hidden states and the output matrix. Nothing is recomputed, memory holds the logits of one chunk,
and all chunks of all microbatches add to one gradient of the output matrix. The loss has to be a
sum over positions.
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
      matrix: the output matrix [D, V] from the trained parameters.
      loss: f32[] and outputs {name: [b, g, c]} from logits f32[b, g, c, V] and the part of the
        batch, of c columns, that they belong to.
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
          The new total, the loss's gradient by the hidden states, and outputs {name: [b, g, w]}.
        """
        part = part.per_token()
        length = hidden.shape[2]
        if length <= self.chunk:
            total, (outputs, by_states) = self._one_chunk(params, total, (hidden, part))
            return total, by_states, outputs
        pieces = jax.tree.map(lambda x: cut_columns(x, self.chunk), (hidden, part))
        total, stacked = jax.lax.scan(functools.partial(self._one_chunk, params), total, pieces)
        outputs, by_states = jax.tree.map(lambda x: join_columns(x, length), stacked)
        return total, by_states, outputs

    def _one_chunk(
        self, params: Params, total: Params, piece: tuple[jax.Array, Batch]
    ) -> tuple[Params, tuple[Outputs, jax.Array]]:
        """The new total, and (outputs, gradient by the states)."""
        c, (states, part) = self.config, piece
        rows = states.reshape(-1, states.shape[-1])
        # Inside the loop, which would otherwise keep a transposed copy.
        matrix = self.matrix(params).astype(c.dtype)

        def loss(products: jax.Array) -> tuple[jax.Array, Outputs]:
            logits = models.softcap_logits(c, products).reshape(*states.shape[:-1], -1)
            return self.loss(logits, part)

        by_logits, outputs = jax.grad(loss, has_aux=True)(_product(rows, matrix))
        by_logits = by_logits.astype(c.dtype)
        by_states = _product(by_logits, matrix.T).astype(states.dtype).reshape(states.shape)
        if c.output_parameter is not None:
            name, axis = c.output_parameter
            total = total | {name: _add_product(total[name], rows, by_logits, axis)}
        return total, (outputs, by_states)


def _add_product(total: jax.Array, rows: jax.Array, slope: jax.Array, axis: int) -> jax.Array:
    """Adds rows^T slope [D, V] to a total whose vocabulary is along `axis`.

    GPUs have products that add to an existing array. Elsewhere a few columns are computed at a
    time, so that the product needs no memory of the matrix's size, except where columns are spread
    over devices.
    """
    if jax.default_backend() == 'gpu':
        return total + (_product(rows.T, slope) if axis else _product(slope.T, rows))
    pieces = _pieces(slope.shape[-1]) if jax.sharding.get_abstract_mesh().empty else 1
    width = slope.shape[-1] // pieces
    # On CPUs, XLA is faster at a product with a matrix that is transposed beforehand, and with the
    # longer axis last, than at transposing inside the product. It does neither by itself.
    transposed = cpu.materialize(rows.T)

    def add(i: jax.Array, total: jax.Array) -> jax.Array:
        columns = jax.lax.dynamic_slice_in_dim(slope, i * width, width, 1)
        product = cpu.materialize(_product(transposed, columns))
        product = product if axis else product.T
        old = jax.lax.dynamic_slice_in_dim(total, i * width, width, axis)
        return jax.lax.dynamic_update_slice_in_dim(total, old + product, i * width, axis)

    return jax.lax.fori_loop(0, pieces, add, total)


def _pieces(size: int) -> int:
    """Into how many equal pieces the columns of the output matrix are cut."""
    counts = range(1, _PIECES + 1)
    return max(n for n in counts if size % n == 0 and (n == 1 or size // n >= _COLUMNS))
