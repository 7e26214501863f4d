"""The column t of each decode slot: the same for all slots, or with an environment one for each.

A completion that waits for a reply does not advance, so slots come to different columns. Functions
take t as i32[] or as i32[B, R]; with the former they compile to what one turn needs.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int, Key, Shaped


def live(done: Bool[Array, 'B R'], t: Int[Array, '*rows'], last: int) -> Bool[Array, 'B R']:
    """Slots that draw a token: those that are not done and have fewer than `last` columns."""
    return ~done & (t < last) if t.ndim else ~done


def furthest(t: Int[Array, '*rows'], live: Bool[Array, 'B R']) -> Int[Array, '']:
    """The largest column that a live slot draws next."""
    return jnp.where(live, t, 0).max() if t.ndim else t


def token_keys(keys: Key[Array, ' n'], t: Int[Array, '*rows']) -> Key[Array, ' n']:
    """The random key of token t of each completion."""
    if t.ndim:
        return jax.vmap(jax.random.fold_in)(keys, t.reshape(-1))
    return jax.vmap(lambda key: jax.random.fold_in(key, t))(keys)


def write_cache(
    cache: Shaped[Array, 'L B R K n h'], new: Shaped[Array, 'L B R K 1 h'], t: Int[Array, '*rows']
) -> Shaped[Array, 'L B R K n h']:
    """The cache with `new` in column t."""
    if not t.ndim:
        return jax.lax.dynamic_update_slice_in_dim(cache, new, t, axis=4)
    # One column of each slot: with the slots as batch axes no device needs those of another one,
    # and no axis is moved.
    axes = jax.lax.ScatterDimensionNumbers(
        update_window_dims=(0, 3, 4), inserted_window_dims=(4,), scatter_dims_to_operand_dims=(4,),
        operand_batching_dims=(1, 2), scatter_indices_batching_dims=(0, 1),
    )  # fmt: skip
    return jax.lax.scatter(
        cache, t[..., None], new[..., 0, :], axes, unique_indices=True, mode='promise_in_bounds'
    )


def write_tokens(
    drawn: Shaped[Array, 'B R n ...'],
    new: Shaped[Array, 'B R 1 ...'],
    t: Int[Array, '*rows'],
    live: Bool[Array, 'B R'],
) -> Shaped[Array, 'B R n ...']:
    """What is recorded of tokens with `new` in column t, where t differs of live slots only."""
    if not t.ndim:
        return jax.lax.dynamic_update_slice_in_dim(drawn, new, t, axis=2)
    column = jnp.where(live, t, drawn.shape[2])[..., None]  # the last: nothing is written
    axes = jax.lax.ScatterDimensionNumbers(
        update_window_dims=tuple(range(2, drawn.ndim - 1)), inserted_window_dims=(2,),
        scatter_dims_to_operand_dims=(2,), operand_batching_dims=(0, 1),
        scatter_indices_batching_dims=(0, 1),
    )  # fmt: skip
    return jax.lax.scatter(drawn, column, new[:, :, 0], axes, unique_indices=True, mode='drop')
