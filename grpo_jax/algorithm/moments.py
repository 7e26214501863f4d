"""Standard deviations of float32 values whose squares float32 cannot hold."""

import jax
import jax.numpy as jnp
from jaxtyping import Bool, Float, Shaped

from grpo_jax.types import Array

_EXPONENT = 0x7F800000  # the bits of a float32's exponent
_SMALLEST, _LARGEST = 2.0**-126, 2.0**126  # powers of two whose reciprocals are normal, too


def unit_of(values: Float[Array, '*S']) -> Float[Array, '']:
    """The largest power of two that is not above the largest magnitude.

    Values divided by it lie between -4 and 4, so that sums of their squares are finite. The
    division is exact, and so is the multiplication afterwards: results that were finite without it
    stay the same. It lies between 2^-126 and 2^126.
    """
    bits = jax.lax.bitcast_convert_type(jnp.abs(jnp.asarray(values, jnp.float32)).max(), jnp.int32)
    unit = jax.lax.bitcast_convert_type(bits & _EXPONENT, jnp.float32)
    return jnp.clip(unit, _SMALLEST, _LARGEST)


def standard_deviation(
    values: Float[Array, '*S'], counted: Bool[Array, '*S'] | None = None, *, ddof: int = 0
) -> Shaped[Array, '']:
    """The standard deviation of the values where `counted`; 0 for at most `ddof` of them.

    Exactly 0 for equal values, whose mean may be rounded.

    Args:
      values: of any shape and magnitude; ignored outside of `counted`.
      counted: of the same shape; None: all.
      ddof: subtracted from the number of values in the divisor; 1: the sample's deviation.
    """
    counted = jnp.ones(values.shape, bool) if counted is None else counted
    values = jnp.where(counted, values, 0.0)
    unit, count = unit_of(values), counted.sum()
    scaled = values / unit
    centered = jnp.where(counted, scaled - scaled.sum() / jnp.maximum(count, 1), 0.0)
    std = jnp.sqrt(jnp.square(centered).sum() / jnp.maximum(count - ddof, 1)) * unit
    most = jnp.where(counted, values, -jnp.inf).max()
    least = jnp.where(counted, values, jnp.inf).min()
    return jnp.where(most <= least, 0.0, std)
