"""The least FLOPs and bytes of a step, and the FLOP/s and bytes/s that the machine reaches."""

import functools
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.workloads import Shape, Workload


def layer_parameters(shape: Shape) -> int:
    """Elements of the matrices of all layers."""
    c = shape
    attention = c.width * c.head_dim * (2 * c.heads + 2 * c.kv_heads)
    return c.layers * (attention + 3 * c.width * c.mlp_width)


def forward_flops(workload: Workload, lengths: np.ndarray) -> int:
    """Model FLOPs of reading B prompts once each, and their completions.

    Matrix products and causal attention of real tokens only, a product of [m, k] and [k, n] as
    2 m k n. Sampling and scoring both come to this; with a backward pass it is three times as much.
    Recomputed, padded and masked work is not counted, so a rate computed from it is a utilization.

    Args:
      workload: sizes.
      lengths: i32[B, G], completion tokens of each row.
    """
    c, b, p = workload.shape, workload.groups, workload.prompt
    n = lengths.astype(np.int64)
    read = b * p + (n - 1).sum()  # the last token of a completion is predicted and is not an input
    keys = b * p * (p + 1) // 2 + ((n - 1) * p + (n - 1) * n // 2).sum()
    products = layer_parameters(c) * read + c.width * c.vocab_size * n.sum()
    return int(2 * products + 4 * c.layers * c.heads * c.head_dim * keys)


def decode_bytes(workload: Workload, lengths: np.ndarray) -> int:
    """Bytes that decoding reads at least, in the computation's dtype.

    At every position of the longest row all matrices and, once for its group, each prompt's keys
    and values; of every row its own keys and values.
    """
    c, n = workload.shape, lengths.astype(np.int64)
    trips = int(n.max()) - 1
    token = 2 * c.layers * c.kv_heads * c.head_dim
    matrices = layer_parameters(c) + c.width * c.vocab_size
    cache = token * (trips * workload.groups * workload.prompt + int((n * (n - 1) // 2).sum()))
    return (trips * matrices + cache) * jnp.dtype(c.dtype).itemsize


def matmul_ceiling(dtype: str) -> float:
    """FLOP/s of a square matrix product, the best of several."""
    size = 1024 if jax.default_backend() == 'cpu' else 8192
    a = jax.random.normal(jax.random.key(0), (size, size), dtype)
    return 2 * size**3 / _fastest(jax.jit(jnp.matmul), a, a)


def bandwidth_ceiling() -> float:
    """Bytes per second of a + s * b on arrays that no cache holds, the best of several."""
    size = 2**25 if jax.default_backend() == 'cpu' else 2**28
    a, b = jax.random.normal(jax.random.key(0), (2, size), jnp.float32)
    return 3 * a.nbytes / _fastest(jax.jit(lambda a, b: a + 0.5 * b), a, b)


def _fastest(function: Callable[..., Any], *arrays: jax.Array, repeats: int = 10) -> float:
    """Seconds of a call; several are waited for together, as starting one takes time, too."""
    together = 1 if jax.default_backend() == 'cpu' else 5
    call = functools.partial(function, *arrays)
    jax.block_until_ready(call())
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        jax.block_until_ready([call() for _ in range(together)])
        times.append((time.perf_counter() - start) / together)
    return min(times)
