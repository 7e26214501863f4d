"""Matrices as integers of one byte each, for sampling alone.

Symmetric absmax quantisation with a scale for each output channel (Dettmers et al., LLM.int8(),
arXiv 2208.07339, section 2.1), of the weights and not of what they are multiplied with: for channel
j, scale_j = max_i |W_ij| / 127 and values_ij = round(W_ij / scale_j). A channel's scale is taken
out of the product, x W ~ (x values) * scale, so it costs nothing per weight. A weight is off by at
most scale / 2. What that does to log-probs is for `losses.importance_weights` to correct, as Yao et
al. (2025) do.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from grpo_jax.types import Params

# Matrix -> the axes that its product sums over, from the end. Of the embedding it is those of a
# row, which is a token's output channel as well where the head is tied.
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
    """A matrix in the place of its array among the parameters: values * scale."""

    values: jax.Array  # i8, within +-127
    scale: jax.Array  # f32, of the same axes, those that are summed over of size 1


def quantized(params: Params) -> Params:
    """The parameters with a `Quantized` for each matrix of `SUMMED`.

    Norm scales, biases, routers and adapters stay, and so do scores. An output channel that holds a
    NaN or an infinity gives NaNs.
    """

    def one(path, x):
        axes = SUMMED.get(path[-1].key)
        if axes is None:
            return x
        x = x.astype(jnp.float32)
        # 0 of a channel of zeros, whose values then do not matter.
        scale = jnp.abs(x).max(axes, keepdims=True) / 127
        return Quantized(jnp.round(x / scale).astype(jnp.int8), scale)

    return jax.tree_util.tree_map_with_path(one, params)


def unpacked(matrix: jax.Array | Quantized) -> tuple[jax.Array, jax.Array | None]:
    """What to multiply with, and the scale of the product if there is one."""
    return matrix if isinstance(matrix, Quantized) else (matrix, None)


def lookup(table: jax.Array | Quantized, tokens: jax.Array, dtype: str) -> jax.Array:
    """[..., D] rows of a table [V, D]."""
    if isinstance(table, Quantized):  # of the rows alone
        return (table.values[tokens] * table.scale[tokens]).astype(dtype)
    return table.astype(dtype)[tokens]
