"""Array layouts that several attention kernels share."""

from collections.abc import Callable

import jax.numpy as jnp
from jaxtyping import Array, Float, Shaped

# (q [B, G, S, H, h], own keys and values [B, G, K, S, h], those of the prompt [B, K, P, h], start
# i32[B], *, scale, softcap) -> [B, G, S, H, h]. Query s is at position start + s, and the prompt's
# keys at 0, 1, ..., start - 1.
Kernel = Callable[..., Array]
KeyValuePair = tuple[Float[Array, '... _ h'], Float[Array, '... _ h']]


def pad_positions(x: Shaped[Array, '*axes N h'], size: int) -> Shaped[Array, '*axes size h']:
    """Pads the axis of N positions to `size` with zeros."""
    return jnp.pad(x, [(0, 0)] * (x.ndim - 2) + [(0, size - x.shape[-2]), (0, 0)])


def repeat_prompt(x: Shaped[Array, ' B *axes'], completions: int) -> Shaped[Array, 'B G *axes']:
    """Repeats the arrays of prompts for each of their G completions."""
    return jnp.broadcast_to(x[:, None], (x.shape[0], completions, *x.shape[1:]))
