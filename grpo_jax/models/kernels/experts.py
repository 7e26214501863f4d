"""Products of rows with the matrices of their experts, on TPUs.

`jax.lax.ragged_dot` is a kernel there. Its derivative in the matrices is not: XLA multiplies all
rows by all experts (libtpu 0.0.42: 1,649 GFLOP in the place of 13 for 128 experts and 4,096 rows of
width 2,048). Megablox (Gale et al., arXiv 2211.15841, as JAX implements it) has a kernel for it.

Only `layers` imports this module, when it is needed: Pallas takes part of a second to load.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.megablox.gmm import tgmm
from jaxtyping import Float, Int

from grpo_jax.types import Array

_LANES = 128  # tiles are multiples of it
_ROWS, _WIDTH = 512, 1024  # of a tile, at most


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def multiply(
    x: Float[Array, 'N I'],
    matrices: Float[Array, 'E I O'],
    sizes: Int[Array, ' E'],
    interpret: bool = False,
) -> Float[Array, 'N O']:
    """`jax.lax.ragged_dot` with that derivative. It cannot be differentiated again.

    Args:
      x: rows, those of each expert next to each other.
      matrices: of the experts.
      sizes: how many rows each expert has.
      interpret: run the kernel without a TPU.
    """
    return jax.lax.ragged_dot(x, matrices, sizes)


_Residuals = tuple[Array, Array, Array]


def _forward(x: Array, matrices: Array, sizes: Array, interpret: bool) -> tuple[Array, _Residuals]:
    return multiply(x, matrices, sizes, interpret), (x, matrices, sizes)


def _backward(interpret: bool, residuals: _Residuals, grad: Array) -> tuple[Array, Array, None]:
    x, matrices, sizes = residuals
    grad_x = jax.lax.ragged_dot(grad, jnp.swapaxes(matrices, 1, 2), sizes)
    tile = _tile(len(x), _ROWS)
    rows = [(0, -len(x) % tile), (0, 0)]  # those that are added have no expert
    tiles = tile, _tile(x.shape[1], _WIDTH), _tile(grad.shape[1], _WIDTH)
    grad_matrices = tgmm(
        jnp.pad(x, rows).T, jnp.pad(grad, rows), sizes, matrices.dtype, tiles, interpret=interpret
    )
    return grad_x, grad_matrices, None


def _tile(size: int, most: int) -> int:
    return min(most, size + -size % _LANES)


multiply.defvjp(_forward, _backward)
