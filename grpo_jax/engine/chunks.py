"""Cutting completions into chunks of positions, so that only one chunk's logits exist at a time."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Shaped

from grpo_jax.types import Array


def map_chunks(
    piece: Callable[..., Any], arrays: tuple[Shaped[Array, 'B G T ...'] | None, ...], chunk: int
) -> Any:
    """`piece(*arrays)` for `chunk` positions at a time, recomputed in the backward pass.

    Args:
      piece: function from arrays [B, G, chunk, ...] to a tree of [B, G, chunk].
      arrays: [B, G, T, ...] each; None is passed on.
      chunk: positions per piece; the last one is padded with zeros.

    Returns:
      A tree of [B, G, T].
    """
    length = jax.tree.leaves(arrays)[0].shape[2]
    if length <= chunk:  # one chunk: recomputing it would save no memory
        return piece(*arrays)

    @functools.partial(jax.checkpoint, prevent_cse=False)
    def body(_: None, xs: tuple[jax.Array | None, ...]) -> tuple[None, Any]:
        return None, piece(*xs)

    _, out = jax.lax.scan(body, None, jax.tree.map(lambda x: cut_columns(x, chunk), arrays))
    return jax.tree.map(lambda x: join_columns(x, length), out)


def cut_columns(x: Array, chunk: int) -> jax.Array:
    """[B, G, T, ...] -> [pieces, B, G, chunk, ...], padded with zeros."""
    pieces = -(-x.shape[2] // chunk)
    padding = [(0, 0)] * 2 + [(0, pieces * chunk - x.shape[2])] + [(0, 0)] * (x.ndim - 3)
    x = jnp.pad(x, padding)
    return jnp.moveaxis(x.reshape(*x.shape[:2], pieces, chunk, *x.shape[3:]), 2, 0)


def join_columns(x: jax.Array, length: int) -> jax.Array:
    """[pieces, B, G, chunk, ...] -> [B, G, length, ...], undoing `cut_columns`."""
    return jnp.moveaxis(x, 0, 2).reshape(*x.shape[1:3], -1, *x.shape[4:])[:, :, :length]
