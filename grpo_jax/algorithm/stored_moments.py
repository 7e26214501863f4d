"""Moments of an optimizer that are stored in another dtype than they are computed in.

bfloat16: one number for another. float8: one byte per number, and a scale for each row (the last
axis), as blocks have in Dettmers et al., 8-bit Optimizers via Block-wise Quantization (arXiv
2110.02861), section 2. Their levels are denser near 0, as those of floating-point numbers are.
Rows instead of blocks of a fixed size keep an array's shape, so that it is sharded like its
parameter. First moments are float8_e4m3fn (steps of 6 to 12 %); second moments, whose square roots
divide, are float8_e5m2, which has fewer digits (12 to 25 %) and 9.5 instead of 5.4 decades.

All rounding is stochastic, with the number as its expectation. Rounded to the nearest, a second
moment with b2 = 0.999 would never fall: an update lowers it by 0.1 % at most.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, BFloat16, Float, Int, Key, Shaped

from grpo_jax.types import Params

DTYPES = ('float32', 'bfloat16', 'float8')
SMALL = 4096  # arrays of fewer numbers stay in float32 with 'float8', as in bitsandbytes
_FIRST, _SECOND = jnp.dtype('float8_e4m3fn'), jnp.dtype('float8_e5m2')
_SECOND_MOMENTS = 'nu'  # as the states of optax name them


class Float8(NamedTuple):
    """An array in one byte per number: values * scale.

    Attributes:
      values: float8, of the array's shape.
      scale: a power of 2 for each row.
    """

    values: Shaped[Array, '*rows n']
    scale: BFloat16[Array, '*rows 1']


class StoredMoments(NamedTuple):
    """The state of `with_moments`.

    Attributes:
      updates: how many were made, from which the random bits of rounding come.
      inner: the optimizer's state, its floats in the stored dtype.
    """

    updates: Int[Array, '']
    inner: Any


def with_moments(
    optimizer: optax.GradientTransformation, dtype: str
) -> optax.GradientTransformation:
    """The optimizer with all floats of its state stored in a dtype, and computed in float32.

    The random bits of rounding depend on the number of updates alone, so a run is repeated exactly.

    Args:
      optimizer: any optax transformation.
      dtype: 'float32', 'bfloat16' or 'float8'; empty: the optimizer as it is, whose moments usually
        have the dtype of the parameters.

    Raises:
      ValueError: an unknown dtype.
    """
    if not dtype:
        return optimizer
    if dtype not in DTYPES:
        raise ValueError(
            f"moments={dtype!r} is unknown: use one of {', '.join(DTYPES)}, or '' for the dtype of "
            'the parameters'
        )

    def init(params: Params) -> StoredMoments:
        inner = optimizer.init(_cast(params, 'float32'))
        return StoredMoments(jnp.int32(0), _stored(inner, dtype, jnp.int32(0)))

    def update(
        gradient: Params, state: StoredMoments, params: Params | None = None
    ) -> tuple[Params, StoredMoments]:
        inner = jax.tree.map(_float32, state.inner, is_leaf=_is_float8)
        change, inner = optimizer.update(_cast(gradient, 'float32'), inner, params)
        return change, StoredMoments(state.updates + 1, _stored(inner, dtype, state.updates))

    return optax.GradientTransformation(init, update)


def _is_float(x: Any) -> bool:
    return jnp.issubdtype(x.dtype, jnp.floating)


def _cast(tree: Any, dtype: str) -> Any:
    return jax.tree.map(lambda x: x.astype(dtype) if _is_float(x) else x, tree)


def _is_float8(x: Any) -> bool:
    return isinstance(x, Float8)


def _float32(x: Any) -> Any:
    if _is_float8(x):
        return x.values.astype(jnp.float32) * x.scale.astype(jnp.float32)
    return x.astype(jnp.float32) if _is_float(x) else x


def _stored(tree: Any, dtype: str, updates: Int[Array, '']) -> Any:
    """Rounds all float32 numbers of a state, each array by bits of its own."""
    key = jax.random.fold_in(jax.random.key(0), updates)
    leaves, structure = jax.tree_util.tree_flatten_with_path(tree)

    def rounded(number: int, path: Any, x: Any) -> Any:
        if dtype == 'float32' or not _is_float(x):
            return x
        own = jax.random.fold_in(key, number)
        if dtype == 'bfloat16':
            return round_stochastically(x, own)
        names = [getattr(part, 'name', None) for part in path]
        return x if x.size < SMALL else to_float8(x, own, second=_SECOND_MOMENTS in names)

    return jax.tree.unflatten(structure, [rounded(i, *leaf) for i, leaf in enumerate(leaves)])


def to_float8(x: Float[Array, '*rows n'], key: Key[Array, ''], *, second: bool) -> Float8:
    """Rounds float32 numbers stochastically, with a scale for each row.

    Scales are powers of 2, so that a row whose largest number changes keeps its levels, and what
    does not change stays as it is.

    Args:
      x: the numbers.
      key: of the random bits.
      second: they are second moments, which are not rounded to 0: a division by 0 would make a
        large update of a small first moment.
    """
    dtype = _SECOND if second else _FIRST
    info = jnp.finfo(dtype)
    _, exponent = jnp.frexp(jnp.abs(x).max(-1, keepdims=True))
    scale = jnp.ldexp(jnp.float32(1), jnp.maximum(exponent - (info.maxexp - 1), -120))
    relative = x / scale  # at most 2^(maxexp - 1)
    _, exponent = jnp.frexp(relative)
    step = jnp.ldexp(jnp.float32(1), jnp.maximum(exponent - 1, info.minexp) - info.nmant)
    noise = (jax.random.bits(key, x.shape, jnp.uint16).astype(jnp.float32) + 0.5) * 2.0**-16
    rounded = jnp.floor(relative / step + noise) * step
    if second:
        least = jnp.float32(info.smallest_subnormal)
        rounded = jnp.where(relative > 0, jnp.maximum(rounded, least), rounded)
    return Float8(rounded.astype(dtype), scale.astype(jnp.bfloat16))


def round_stochastically(
    x: Float[Array, '*shape'], key: Key[Array, '']
) -> BFloat16[Array, '*shape']:
    """One of the two nearest bfloat16 values of each float32, with x as their expectation.

    The 16 bits that bfloat16 lacks are added to 16 random ones; a carry rounds away from 0.
    """
    bits = jax.lax.bitcast_convert_type(x.astype(jnp.float32), jnp.uint32)
    noise = jax.random.bits(key, x.shape, jnp.uint16).astype(jnp.uint32)
    kept = (bits + noise) & jnp.uint32(0xFFFF0000)
    rounded = jax.lax.bitcast_convert_type(kept, jnp.float32)
    return jnp.where(jnp.isfinite(x), rounded, x).astype(jnp.bfloat16)
