"""Attention of one new token of each row, by a kernel for NVIDIA GPUs that reads caches in place.

`attention.attend` multiplies a token with a prompt, with its row's earlier tokens and with itself,
and merges the three: some twenty GPU kernels, which take longer to launch than to run, and a copy
of each layer's keys and values out of their stacks. This module launches two kernels. The first
reads every prompt once from memory, with all queries of its group (later blocks of them hit the
cache), and at the same time each row's own columns, only those that are filled. The second merges
the partial sums, as in Flash-Decoding (Dao et al., 2023) and Hydragen (Juravsky et al., arXiv
2402.05099).

A decode step takes 2.80 ms instead of 6.56 ms on an H100 (1.5B shapes, bfloat16), with unrolled
layers. Soft caps and windows are tested by interpretation and by lowering, and have not been run on
a GPU.

Only `dispatch` imports this module, when it is needed: Pallas takes part of a second to load. Its
Triton back end, which JAX 0.12 still has, is to be removed from JAX.
"""

import functools
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton
from jaxtyping import Array, Float, Int

from grpo_jax.models.attention import DecodeCache
from grpo_jax.models.kernels.blocked import cap_scores

_KEYS = 64  # columns that a program multiplies at a time
_PROGRAMS = 128  # about as many run in parallel on a GPU
_MAX_PARTS = 8  # most parts to split prompts or rows into, to have that many programs
_WARPS, _STAGES = 4, 3  # of a program that reads keys: threads / 32, and loads in flight
_QUERIES = 16  # rows of a product: the fewest that a tensor core takes
_EMPTY = -1e30  # logarithm of an empty sum; finite, so that two of them differ by 0

TokenKeyValue = tuple[Float[Array, 'B G K h'], Float[Array, 'B G K h']]
Ref = Any  # to an array in the GPU's memory


class _Sums(NamedTuple):
    """Sums of n queries over some keys, all scaled by exp(-maximum)."""

    values: Float[Array, 'n h']
    weights: Float[Array, ' n']
    maximum: Float[Array, ' n']


class _Split(NamedTuple):
    """How the columns of prompts or of rows are split into parts."""

    size: int  # columns of a part
    parts: int


class _Part(NamedTuple):
    """The queries and keys of one program."""

    slot: Array  # of the part in the output
    first_query: Array
    queries: Array | int  # how many of them are real
    keys_values: Callable[[Any], Iterable[Ref]]  # references to a slice of columns
    start: Array  # first column to read
    stop: Array


def attend_token(
    q: Float[Array, 'B G H h'],
    new: TokenKeyValue,
    cache: DecodeCache,
    layer: Int[Array, ''],
    window: Int[Array, ''],
    *,
    scale: float,
    softcap: float = 0.0,
    interpret: bool = False,
) -> tuple[Float[Array, 'B G H h'], TokenKeyValue]:
    """Causal softmax attention of each row's newest token, scores and sums in float32.

    Args:
      q: rotated queries.
      new: the token's own keys and values.
      cache: keys and values of all layers before the token.
      layer: which layer of them.
      window: how many positions the token sees, including its own; where rows have different
        numbers of earlier tokens, all.
      scale: of the scores.
      softcap: see `attention.attend`.
      interpret: runs on any platform, slowly.

    Returns:
      The output in the dtype of q, and `new` as the kernel read it: callers that store it need not
      compute it once more.
    """
    groups, rows, heads, width = q.shape
    kv_heads = new[0].shape[2]
    share = heads // kv_heads  # queries of a row that read the same head
    group_blocks = -(-rows * share // _QUERIES)  # blocks of queries that read a prompt
    row_blocks = rows * -(-share // _QUERIES)
    prompt, own = (
        _split(pair[0].shape[-2], blocks * kv_heads * groups)
        for pair, blocks in zip(cache.layers, (group_blocks, row_blocks), strict=True)
    )
    token = _combine_token(q * jnp.asarray(scale, q.dtype), new)
    call = functools.partial(pl.pallas_call, interpret=interpret)
    parts = pl.next_power_of_2(prompt.parts + own.parts)  # what one program loads
    like = jax.ShapeDtypeStruct((groups, kv_heads, parts, rows * share), jnp.float32)
    own_programs = row_blocks * own.parts
    sums = call(
        functools.partial(
            _parts_kernel,
            prompt=prompt,
            own=own,
            share=share,
            own_programs=own_programs,
            softcap=softcap,
        ),
        grid=(own_programs + group_blocks * prompt.parts, kv_heads, groups),
        out_shape=(jax.ShapeDtypeStruct((*like.shape, width), jnp.float32), like, like),
        compiler_params=triton.CompilerParams(num_warps=_WARPS, num_stages=_STAGES),
        name='decode_parts',
    )(layer, cache.length, cache.t, window, token, *cache.layers.prompt, *cache.layers.own)
    out = call(
        functools.partial(
            _merge_kernel, share=share, parts=prompt.parts + own.parts, softcap=softcap
        ),
        grid=(rows, kv_heads, groups),
        out_shape=jax.ShapeDtypeStruct((groups, rows * heads, width), q.dtype),
        compiler_params=triton.CompilerParams(num_warps=4, num_stages=1),
        name='decode_merge',
    )(token, *sums)
    _, k, v = jnp.split(token, [rows * share, rows * (share + 1)], axis=2)
    return out.reshape(groups, rows, heads, width), (k.swapaxes(1, 2), v.swapaxes(1, 2))


def _combine_token(q: Float[Array, 'B G H h'], new: TokenKeyValue) -> Float[Array, 'B K n h']:
    """Queries, keys and values of the token in one array, so that one GPU kernel computes it."""
    groups, rows, heads, width = q.shape
    kv_heads = new[0].shape[2]
    q = q.reshape(groups, rows, kv_heads, heads // kv_heads, width)
    q = q.swapaxes(1, 2).reshape(groups, kv_heads, -1, width)
    token = jnp.concatenate([q, *(x.swapaxes(1, 2) for x in new)], axis=2)
    return jax.lax.optimization_barrier(token)


def _split(columns: int, programs: int) -> _Split:
    """Splits columns into several parts if there are fewer programs than a GPU runs in parallel."""
    parts = min(_MAX_PARTS, -(-_PROGRAMS // programs))
    size = -(-columns // (parts * _KEYS)) * _KEYS
    return _Split(size, -(-columns // size))


def _parts_kernel(
    layer: Ref, length: Ref, t: Ref, window: Ref, token: Ref,
    prompt_k: Ref, prompt_v: Ref, own_k: Ref, own_v: Ref,
    values: Ref, weights: Ref, maximum: Ref, *,
    prompt: _Split, own: _Split, share: int, own_programs: int, softcap: float,
) -> None:  # fmt: skip
    """One part of a row's columns with its queries, or of a prompt with some of its group's.

    The outputs are [B, K, parts, n, ...] of the queries, the first n of the token's
    [B, K, n + G + G, h]; parts of prompts come first.
    """
    program, head, group = (pl.program_id(axis) for axis in range(3))
    at = layer[()]  # read here: loads in the loop that depended on it could not be prefetched

    def first_visible(t: Array) -> Array:  # own column; the prompt's columns come before column 0
        return t - window[()] + 1

    def row_part() -> _Part:
        tiles = -(-share // _QUERIES)  # of a row's queries
        i, row = program % own.parts, program // (own.parts * tiles)
        tile = program // own.parts % tiles
        first = row * share + tile * _QUERIES
        real = jnp.minimum(share - tile * _QUERIES, _QUERIES)
        filled = t[group, row] if t.shape else t[()]
        start, stop = i * own.size, jnp.minimum((i + 1) * own.size, filled)

        def keys_values(columns: Any) -> Iterable[Ref]:
            return (x.at[at, group, row, head, columns, :] for x in (own_k, own_v))

        start = jnp.maximum(start, first_visible(filled))
        return _Part(prompt.parts + i, first, real, keys_values, start, stop)

    def prompt_part() -> _Part:
        i, tile = (program - own_programs) % prompt.parts, (program - own_programs) // prompt.parts
        first = tile * _QUERIES
        real = jnp.minimum(values.shape[3] - first, _QUERIES)
        start, stop = i * prompt.size, jnp.minimum((i + 1) * prompt.size, length[group])

        def keys_values(columns: Any) -> Iterable[Ref]:
            return (x.at[at, group, head, columns, :] for x in (prompt_k, prompt_v))

        if not t.shape:  # where rows differ there is no window
            start = jnp.maximum(start, length[group] + first_visible(t[()]))
        return _Part(i, first, real, keys_values, start, stop)

    def run(part: _Part) -> None:
        rows, real = pl.ds(part.first_query, _QUERIES), jnp.arange(_QUERIES) < part.queries
        q = triton.load(token.at[group, head, rows, :], mask=real[:, None], other=0.0)
        sums = _sum_columns(part, q, softcap)
        slot = part.slot
        triton.store(values.at[group, head, slot, rows, :], sums.values, mask=real[:, None])
        triton.store(weights.at[group, head, slot, rows], sums.weights, mask=real)
        triton.store(maximum.at[group, head, slot, rows], sums.maximum, mask=real)

    @pl.when(program < own_programs)
    def _() -> None:
        run(row_part())

    @pl.when(program >= own_programs)
    def _() -> None:
        run(prompt_part())


def _merge_kernel(
    token: Ref, values: Ref, weights: Ref, maximum: Ref, out: Ref, *,
    share: int, parts: int, softcap: float,
) -> None:  # fmt: skip
    """Merges the token itself and the sums of all parts, for one head of a row."""
    row, head, group = (pl.program_id(axis) for axis in range(3))
    size = pl.next_power_of_2(share)
    real = jnp.arange(size) < share
    rows = pl.ds(row * share, size)
    q = triton.load(token.at[group, head, rows, :], mask=real[:, None], other=0.0)
    queries, heads = values.shape[3], values.shape[1] * share  # of the group; of a row
    key, value = (
        token[group, head, at, :].astype(jnp.float32)[None, :]
        for at in (queries + row, queries + out.shape[1] // heads + row)
    )
    score = cap_scores((q.astype(jnp.float32) * key).sum(1), softcap)
    every = pl.ds(0, values.shape[2])
    in_use = (jnp.arange(values.shape[2]) < parts)[:, None] & real
    maxima = triton.load(maximum.at[group, head, every, rows], mask=in_use, other=_EMPTY)
    highest = jnp.maximum(score, maxima.max(0))
    factor = jnp.exp(maxima - highest)  # [parts, n]
    total = triton.load(weights.at[group, head, every, rows], mask=in_use, other=0.0) * factor
    sums = triton.load(values.at[group, head, every, rows, :], mask=in_use[:, :, None], other=0.0)
    sums = (sums * factor[:, :, None]).sum(0)
    own_weight = jnp.exp(score - highest)
    total = total.sum(0) + own_weight
    result = ((sums + own_weight[:, None] * value) / total[:, None]).astype(out.dtype)
    heads_of_row = pl.ds(row * heads + head * share, size)
    triton.store(out.at[group, heads_of_row, :], result, mask=real[:, None])


def _sum_columns(part: _Part, q: Float[Array, 'n h'], softcap: float) -> _Sums:
    """Sums of the queries over the columns of a part."""

    def add(i: Array, sums: _Sums) -> _Sums:
        first = part.start + i * _KEYS
        in_range = first + jnp.arange(_KEYS) < part.stop
        k, v = (
            triton.load(x, mask=in_range[:, None], other=0.0)
            for x in part.keys_values(pl.ds(first, _KEYS))
        )
        scores = cap_scores(triton.dot(q, k.T), softcap)
        scores = jnp.where(in_range[None, :], scores, _EMPTY)
        maximum = jnp.maximum(sums.maximum, scores.max(1))
        # 0 outside of the part: at least one column of a block is in it.
        weights = jnp.exp(scores - maximum[:, None])
        factor = jnp.exp(sums.maximum - maximum)
        values = sums.values * factor[:, None] + triton.dot(weights.astype(v.dtype), v)
        return _Sums(values, sums.weights * factor + weights.sum(1), maximum)

    zeros = jnp.zeros(len(q), jnp.float32)
    empty = _Sums(jnp.zeros(q.shape, jnp.float32), zeros, zeros + _EMPTY)
    blocks = jnp.maximum(part.stop - part.start + _KEYS - 1, 0) // _KEYS
    return jax.lax.fori_loop(0, blocks, add, empty)
