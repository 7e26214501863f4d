"""Quantized matrices: one byte or half a byte for each weight. Activations are not quantized.

int8: symmetric absmax quantization with a scale for each output channel (Dettmers et al.,
LLM.int8(), arXiv 2208.07339, section 2.1). For channel j, scale_j = max_i |W_ij| / 127 and
values_ij = round(W_ij / scale_j). The scale multiplies the product, x W ~ (x values) * scale, so it
costs nothing per weight. The error of a weight is at most scale / 2.

nf4: 4-bit NormalFloat (Dettmers et al., QLoRA, arXiv 2305.14314, section 3 and appendix E). Each
block of 64 weights along the axis that the product sums over has the scale max |W|, and a weight is
the nearest of 16 levels, which are quantiles of a normal distribution, times the scale. Scales are
rounded to bfloat16, so a weight takes 4.25 bits: 4.5 with float32 scales, 4.13 with the paper's
double quantization.

The sampler may use int8 for all matrices (`quantize`); its effect on log-probs is corrected by
importance weights, as in Yao et al. (2025), see `off_policy.importance_weights`. The frozen base of
adapters may use either in all that is computed (`quantize_base`), and then policy, reference and
sampler are the same model: nothing has to be corrected.
"""

import functools
from itertools import pairwise
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Float, Int, Int8, Shaped, UInt8

from grpo_jax.types import Array, Params

# Matrix -> the axes that its product sums over, from the end. For the embedding it is D: a row is a
# token's vector, and also an output channel where the head is tied.
SUMMED = {
    'embedding': (-1,),  # [V, D]
    'head': (-2,),  # [D, V]
    'query': (-3,),  # [D, H, h]
    'key': (-3,),  # [D, K, h]
    'value': (-3,),
    'out': (-3, -2),  # [H, h, D]
    'gate': (-2,),  # [D, M], or [E, D, M] of experts
    'up': (-2,),
    'down': (-2,),  # [M, D]
}
_OUTSIDE_LAYERS = ('embedding', 'head')

BLOCK = 64  # weights that share a scale in nf4, at most
LEVELS = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
    -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
    0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941,
    0.7229568362236023, 1.0,
)  # fmt: skip


class Quantized(NamedTuple):
    """A matrix that replaces its array among the parameters.

    Attributes:
      values: int8 within +-127, of the matrix's shape; or uint8, two levels of nf4 in each byte,
        the first in the upper half, so that the last axis that is summed over has half its size.
      scale: f32 for int8, and axes that are summed over have size 1; bf16 for nf4, and the last of
        them has an entry for each block.
    """

    values: Int8[Array, '...'] | UInt8[Array, '...']
    scale: Float[Array, '...']


def is_quantized(x: Any) -> bool:
    """Whether x is a `Quantized`, for `jax.tree.map(..., is_leaf=is_quantized)`."""
    return isinstance(x, Quantized)


def quantize(params: Params) -> Params:
    """The parameters with a `Quantized` of int8 for each matrix of `SUMMED`.

    Norm scales, biases, routers, adapters and scores are unchanged, and so are matrices that are
    quantized already. An output channel that holds a NaN or an infinity gives NaNs.
    """
    return _quantize_named(params, SUMMED.keys(), 'int8')


def quantize_base(params: Params, kind: str) -> Params:
    """The parameters with a `Quantized` for each matrix of a layer, also of its experts.

    As in QLoRA, embedding and output matrix are unchanged, and so are norm scales, biases and
    routers: they are a small part of a large model, and errors of the output matrix are errors of
    logits.

    Args:
      params: without adapters.
      kind: 'int8' or 'nf4'; 'model' returns the parameters as they are.
    """
    if kind == 'model':
        return params
    return _quantize_named(params, SUMMED.keys() - {*_OUTSIDE_LAYERS}, kind)


def _quantize_named(params: Params, names: Any, kind: str) -> Params:
    def quantize_leaf(path: Any, x: Any) -> Any:
        name = path[-1].key
        return x if name not in names or is_quantized(x) else quantize_matrix(x, name, kind)

    return jax.tree_util.tree_map_with_path(quantize_leaf, params, is_leaf=is_quantized)


def quantize_matrix(x: Float[Array, '...'], name: str, kind: str) -> Quantized:
    """Quantizes one matrix, or a stack of them.

    Args:
      x: [..., *in, *out].
      name: a key of `SUMMED`.
      kind: 'int8' or 'nf4'.
    """
    x, axes = x.astype(jnp.float32), SUMMED[name]
    if kind == 'int8':
        # 0 for a channel of zeros, whose int8 values then do not matter.
        scale = jnp.abs(x).max(axes, keepdims=True) / 127
        return Quantized(jnp.round(x / scale).astype(jnp.int8), scale)
    x = jnp.moveaxis(x, axes[-1], -1)
    blocks = x.reshape(*x.shape[:-1], -1, block_size(x.shape[-1]))
    scale = jnp.abs(blocks).max(-1).astype(jnp.bfloat16)
    relative = blocks / scale[..., None].astype(jnp.float32)  # NaN where all are 0: level 0 of 0
    above = [(relative > (a + b) / 2).astype(jnp.uint8) for a, b in pairwise(LEVELS)]
    codes = functools.reduce(jnp.add, above)
    pairs = codes.reshape(*x.shape[:-1], -1, 2)
    values = pairs[..., 0] << 4 | pairs[..., 1]
    return Quantized(jnp.moveaxis(values, -1, axes[-1]), jnp.moveaxis(scale, -1, axes[-1]))


def stored_like(
    stored: Shaped[Array, '...'] | Quantized, x: Shaped[Array, '...'], name: str
) -> Shaped[Array, '...'] | Quantized:
    """A part x of the matrix `name`, cast or quantized as the matrix is stored."""
    if not isinstance(stored, Quantized):
        return x.astype(stored.dtype)
    return quantize_matrix(x, name, 'nf4' if stored.values.dtype == jnp.uint8 else 'int8')


def matrix_shape(stored: Any, name: str) -> tuple[int, ...]:
    """The shape of the matrix that an array, or a `Quantized`, stands for."""
    if not isinstance(stored, Quantized):
        return stored.shape
    shape = list(stored.values.shape)
    shape[SUMMED[name][-1]] *= 2 if stored.values.dtype == jnp.uint8 else 1
    return tuple(shape)


def block_size(size: int) -> int:
    """Weights that share a scale along an axis: the largest even divisor of its size up to 64.

    Raises:
      ValueError: the size is odd.
    """
    if size % 2:
        raise ValueError(f'nf4 stores two weights in a byte, and {size} is odd: use int8')
    return max(n for n in range(2, BLOCK + 1, 2) if size % n == 0)


def dequantize(params: Params, dtype: str) -> Params:
    """The parameters with an array for each `Quantized`, computed in float32 and then rounded."""

    def dequantize_leaf(path: Any, x: Any) -> Any:
        if not is_quantized(x):
            return x
        axis = SUMMED[path[-1].key][-1]
        values, scale = (jnp.moveaxis(y, axis, -2) for y in x)
        return jnp.moveaxis(_weights(values, scale), -2, axis).astype(dtype)

    return jax.tree_util.tree_map_with_path(dequantize_leaf, params, is_leaf=is_quantized)


def _weights(
    values: Shaped[Array, '*lead rows O'], scale: Float[Array, '*lead_or_1 blocks O']
) -> Float[Array, '*lead I O']:
    """The f32 weights of matrices whose inputs are their next to last axis."""
    scale = scale.astype(jnp.float32)
    if values.dtype != jnp.uint8:
        return values * scale
    *lead, rows, width = values.shape
    codes = jnp.stack([values >> 4, values & 15], axis=-2)
    levels = _levels(codes.reshape(*lead, scale.shape[-2], -1, width))
    return (levels * scale[..., None, :]).reshape(*lead, 2 * rows, width)


def _levels(codes: UInt8[Array, '*axes']) -> Float[Array, '*axes']:
    """LEVELS[codes] by selections, bit after bit: vector units are slow at looking up a table."""
    found = [jnp.float32(level) for level in LEVELS]
    for bit in range(4):
        chosen = (codes >> bit) & 1 == 1
        found = [
            jnp.where(chosen, high, low) for low, high in zip(found[::2], found[1::2], strict=True)
        ]
    return found[0]


def unpack(
    matrix: Float[Array, '...'] | Quantized,
) -> tuple[Shaped[Array, '...'], Float[Array, '...'] | None]:
    """What to multiply with, and the scale if there is one."""
    return matrix if isinstance(matrix, Quantized) else (matrix, None)


def multiply(
    x: Float[Array, 'N I'],
    values: Shaped[Array, '*experts rows O'],
    scale: Float[Array, '*scales O'],
    sizes: Int[Array, ' E'] | None = None,
) -> Float[Array, 'N O']:
    """Multiplies x by a quantized matrix, or its rows by those of their experts.

    Products with int8 values are summed in float32, as they may overflow in float16, and then
    multiplied by the scale. With nf4 the matrix is dequantized into x's dtype first.

    Args:
      x: rows.
      values: of the matrix, or of each expert.
      scale: [O] for int8, or [N, O] with experts; [blocks, O] for nf4, [E, blocks, O] with experts.
      sizes: how many consecutive rows each expert has; None: one matrix for all.
    """
    if values.dtype == jnp.uint8:
        return _product(x, _weights(values, scale).astype(x.dtype), sizes)
    product = _product(x, values.astype(x.dtype), sizes, preferred_element_type=jnp.float32)
    return (product * scale).astype(x.dtype)


def _product(x: Array, matrix: Array, sizes: Array | None, **options: Any) -> Array:
    if sizes is None:
        return jnp.matmul(x, matrix, **options)
    return jax.lax.ragged_dot(x, matrix, sizes, **options)


@jax.custom_vjp
def multiply_frozen(
    x: Float[Array, 'N I'],
    values: Shaped[Array, '*experts rows O'],
    scale: Float[Array, '*scales O'],
    sizes: Int[Array, ' E'] | None = None,
) -> Float[Array, 'N O']:
    """`multiply` with a gradient in x alone, for which only the quantized matrix is stored.

    JAX's own derivative would store the dequantized matrices of all layers, and multiply by int8
    values in float32.
    """
    return multiply(x, values, scale, sizes)


_Residuals = tuple[Array, Array, Array | None]


def _forward(
    x: Array, values: Array, scale: Array, sizes: Array | None
) -> tuple[Array, _Residuals]:
    return multiply(x, values, scale, sizes), (values, scale, sizes)


def _backward(residuals: _Residuals, grad: Array) -> tuple[Array, None, None, None]:
    values, scale, sizes = residuals
    transposed = functools.partial(jnp.swapaxes, axis1=-1, axis2=-2)
    if values.dtype == jnp.uint8:
        matrix = _weights(values, scale).astype(grad.dtype)
        return _product(grad, transposed(matrix), sizes), None, None, None
    # Gradients times scales may underflow in float16: scales are relative to the largest of them.
    largest = jnp.maximum(scale.max(), jnp.finfo(jnp.float32).tiny)
    scaled = (grad.astype(jnp.float32) * (scale / largest)).astype(grad.dtype)
    matrix = transposed(values.astype(grad.dtype))
    product = _product(scaled, matrix, sizes, preferred_element_type=jnp.float32)
    return (product * largest).astype(grad.dtype), None, None, None


multiply_frozen.defvjp(_forward, _backward)


def lookup(
    table: Float[Array, 'V D'] | Quantized, tokens: Int[Array, '*axes'], dtype: str
) -> Float[Array, '*axes D']:
    """The rows of a table that the tokens select."""
    if isinstance(table, Quantized):  # only these rows are converted
        return (table.values[tokens] * table.scale[tokens]).astype(dtype)
    return table.astype(dtype)[tokens]
