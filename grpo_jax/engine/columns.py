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

    def write(cache: jax.Array, new: jax.Array, t: jax.Array) -> jax.Array:
        return jax.lax.dynamic_update_slice_in_dim(cache, new, t, axis=cache.ndim - 2)

    if not t.ndim:
        return write(cache, new, t)
    for_rows = jax.vmap(write, in_axes=(1, 1, 0), out_axes=1)
    return jax.vmap(for_rows, in_axes=(1, 1, 0), out_axes=1)(cache, new, t)


def write_tokens(
    drawn: Shaped[Array, 'B R n ...'],
    new: Shaped[Array, 'B R 1 ...'],
    t: Int[Array, '*rows'],
    live: Bool[Array, 'B R'],
) -> Shaped[Array, 'B R n ...']:
    """What is recorded of tokens with `new` in column t, where t differs of live slots only."""
    if not t.ndim:
        return jax.lax.dynamic_update_slice_in_dim(drawn, new, t, axis=2)
    groups, rows, columns = drawn.shape[:3]
    where = jnp.arange(groups)[:, None], jnp.arange(rows), jnp.where(live, t, columns)
    return drawn.at[where].set(new[:, :, 0], mode='drop')
