"""Attention on NVIDIA GPUs, by the kernel of cuDNN (after Dao, arXiv 2307.08691).

Its only mask is causal, for queries and keys that both begin at position 0. So the prompt is
repeated for each of its completions while a layer runs. Attending to both separately and merging by
log-sum-exp would not repeat it, but `jax.nn.dot_product_attention` drops the gradient through its
log-sum-exp (and rounds it to the queries' dtype: in bfloat16 by up to 3% of a weight).
"""

import functools
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Shaped

from grpo_jax.models.kernels.layout import KeyValuePair, pad_positions, repeat_prompt


def attend(
    q: Float[Array, 'B G S H h'],
    own: KeyValuePair,
    prompt: KeyValuePair,
    start: Int[Array, ' B'],
    *,
    scale: float,
    softcap: float = 0.0,
    implementation: Literal['xla', 'cudnn'] = 'cudnn',
) -> Float[Array, 'B G S H h']:
    """Attention of completions to their prompt and to themselves; see `layout.Kernel`.

    Keys and queries are shifted to the columns of their positions: a completion's keys replace its
    prompt's padding, and its queries follow zeros, whose outputs are dropped. These zeros cost
    P^2 / 2 products of a query and a key in addition to P T + T^2 / 2. A mask for the padding would
    cost more: it is a bias [B, 1, T, P + T], and with it nothing is skipped.

    Args:
      q: rotated queries.
      own: keys and values [B, G, K, S, h] of the completions.
      prompt: those of the prompts, [B, K, P, h].
      start: real tokens of the prompts.
      scale: of the scores.
      softcap: must be 0.
      implementation: that of `jax.nn.dot_product_attention`; 'xla' runs on any platform.

    Raises:
      ValueError: a soft cap.
    """
    if softcap:
        raise ValueError(f"cudnn attention has no softcap={softcap}: use attention='einsum'")
    rows, length = q.shape[1:3]
    columns = prompt[0].shape[2] + length
    q = _shift(q, start, columns)
    in_prompt = jnp.arange(columns)[:, None, None] < start[:, None, None, None, None]
    k, v = (
        jnp.where(
            in_prompt,
            repeat_prompt(pad_positions(p, columns), rows).swapaxes(2, 3),
            _shift(o.swapaxes(2, 3), start, columns),
        )
        for p, o in zip(prompt, own, strict=True)
    )
    of_rows = [x.reshape(-1, *x.shape[2:]) for x in (q, k, v)]
    out = jax.nn.dot_product_attention(
        of_rows[0],
        of_rows[1],
        of_rows[2],
        scale=scale,
        is_causal=True,
        implementation=implementation,
    )
    return _shift(out.reshape(*q.shape[:2], *out.shape[1:]), -start, length)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _shift(
    x: Shaped[Array, 'B G S *axes'], start: Int[Array, ' B'], size: int
) -> Shaped[Array, 'B G size *axes']:
    """Shifts columns to the right: column p of the result is that of x at p - start, else 0.

    Both it and its gradient are gathers: a scatter would first write zeros and then copy them.
    """
    source = jnp.arange(size) - start[:, None]
    column = jnp.clip(source, 0, x.shape[2] - 1)
    columns = jax.vmap(lambda x, i: x.at[:, i].get(mode='promise_in_bounds'))(x, column)
    in_range = (source == column).reshape(len(x), 1, size, *(1,) * (x.ndim - 3))
    return jnp.where(in_range, columns, jnp.zeros((), x.dtype))


def _shift_forward(x: Array, start: Array, size: int) -> tuple[Array, tuple[Array, int]]:
    return _shift(x, start, size), (start, x.shape[2])


def _shift_backward(size: int, residuals: tuple[Array, int], grad: Array) -> tuple[Array, None]:
    start, columns = residuals
    return _shift(grad, -start, columns), None


_shift.defvjp(_shift_forward, _shift_backward)
