"""Matrices as one-byte integers, for sampling only.

Symmetric absmax quantization of the weights (not of the activations), with a scale
for each output channel (Dettmers et al., LLM.int8(), arXiv 2208.07339, section 2.1): for channel j,
scale_j = max_i |W_ij| / 127 and values_ij = round(W_ij / scale_j). The scale multiplies the
product, x W ~ (x values) * scale, so it costs nothing per weight. The error of a weight is at most
scale / 2. Its effect on log-probs is corrected by importance weights, as in Yao et al. (2025); see
`off_policy.importance_weights`.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Float, Int, Int8, Shaped

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


class Quantized(NamedTuple):
    """A matrix that replaces its array among the parameters: values * scale."""

    values: Int8[Array, '...']  # within +-127
    scale: Float[Array, '...']  # f32, of the same axes; those that are summed over have size 1


def quantize(params: Params) -> Params:
    """The parameters with a `Quantized` for each matrix of `SUMMED`.

    Norm scales, biases, routers, adapters and scores are unchanged. An output channel that holds a
    NaN or an infinity gives NaNs.
    """

    def quantize_leaf(path: Any, x: Float[Array, '...']) -> Any:
        axes = SUMMED.get(path[-1].key)
        if axes is None:
            return x
        x = x.astype(jnp.float32)
        # 0 for a channel of zeros, whose int8 values then do not matter.
        scale = jnp.abs(x).max(axes, keepdims=True) / 127
        return Quantized(jnp.round(x / scale).astype(jnp.int8), scale)

    return jax.tree_util.tree_map_with_path(quantize_leaf, params)


def unpack(
    matrix: Float[Array, '...'] | Quantized,
) -> tuple[Shaped[Array, '...'], Float[Array, '...'] | None]:
    """What to multiply with, and the scale of the product if there is one."""
    return matrix if isinstance(matrix, Quantized) else (matrix, None)


def lookup(
    table: Float[Array, 'V D'] | Quantized, tokens: Int[Array, '*axes'], dtype: str
) -> Float[Array, '*axes D']:
    """The rows of a table that the tokens select."""
    if isinstance(table, Quantized):  # only these rows are converted
        return (table.values[tokens] * table.scale[tokens]).astype(dtype)
    return table.astype(dtype)[tokens]
