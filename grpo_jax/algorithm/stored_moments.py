"""Moments of an optimizer that are stored in another dtype than they are computed in."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, BFloat16, Float, Int, Key

from grpo_jax.types import Params

DTYPES = ('float32', 'bfloat16')


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

    To bfloat16 moments are rounded stochastically, up or down with probabilities that make the
    expectation exact. Rounded to the nearest, a second moment with b2 = 0.999 would never fall: an
    update lowers it by 0.1 % at most, and bfloat16 has steps of 0.4 to 0.8 %. The random bits
    depend on the number of updates alone, so a run is repeated exactly.

    Args:
      optimizer: any optax transformation.
      dtype: 'float32' or 'bfloat16'; empty: the optimizer as it is, whose moments usually have the
        dtype of the parameters.

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
        return StoredMoments(jnp.int32(0), _cast(optimizer.init(_cast(params, 'float32')), dtype))

    def update(
        gradient: Params, state: StoredMoments, params: Params | None = None
    ) -> tuple[Params, StoredMoments]:
        inner = _cast(state.inner, 'float32')
        change, inner = optimizer.update(_cast(gradient, 'float32'), inner, params)
        if dtype == 'bfloat16':
            inner = _round(inner, jax.random.fold_in(jax.random.key(0), state.updates))
        return change, StoredMoments(state.updates + 1, inner)

    return optax.GradientTransformation(init, update)


def _is_float(x: Any) -> bool:
    return jnp.issubdtype(x.dtype, jnp.floating)


def _cast(tree: Any, dtype: str) -> Any:
    return jax.tree.map(lambda x: x.astype(dtype) if _is_float(x) else x, tree)


def _round(tree: Any, key: Key[Array, '']) -> Any:
    """Rounds all floats to bfloat16, each array by bits of its own."""
    leaves, structure = jax.tree.flatten(tree)
    rounded = [
        round_stochastically(x, jax.random.fold_in(key, i)) if _is_float(x) else x
        for i, x in enumerate(leaves)
    ]
    return jax.tree.unflatten(structure, rounded)


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
