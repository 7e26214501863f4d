"""Attention of one new token of each row, by a kernel for NVIDIA GPUs that reads caches in place.

`attention.attend` multiplies a token with a prompt, with its row's earlier tokens and with itself,
and puts the three together: some twenty programs for a GPU, which take longer to start than to run,
after each layer's keys and values were copied out of their stacks. Here it is two. The first reads
every prompt once from memory, with all queries of its group (later blocks of them find it in the
cache), and beside it each row's own columns, no more of them than there are. The second puts the
sums of all parts together. As in Flash-Decoding (Dao et al., 2023) and Hydragen (Juravsky et al.,
arXiv 2402.05099).

Apart from `flash`, which imports it when it runs: Pallas takes part of a second to load. Its Triton
back end, which JAX 0.12 still has, is to be removed from JAX one day.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

from grpo_jax.models.attention import Stacks

_KEYS = 64  # columns that a program multiplies at a time
_PROGRAMS = 128  # that run side by side on a GPU, about
_PARTS = 8  # most that prompts or rows are cut into for there to be as many
_WARPS, _STAGES = 4, 3  # of a program that reads keys: threads / 32, and loads under way
_QUERIES = 16  # rows of a product: the least that a matrix unit takes
_NOTHING = -1e30  # logarithm of an empty sum; finite, so that two of them differ by 0


class _Sums(NamedTuple):
    """Of n queries over some keys, all scaled by exp(-peak)."""

    values: jax.Array  # f32[n, h]
    weights: jax.Array  # f32[n]
    peak: jax.Array  # f32[n]


class _Cut(NamedTuple):
    """How the columns of prompts or of rows are read."""

    size: int  # columns of a part
    parts: int


def attend_token(
    q: jax.Array,
    new: tuple[jax.Array, jax.Array],
    stacks: Stacks,
    layer: jax.Array,
    length: jax.Array,
    t: jax.Array,
    *,
    scale: float,
    interpret: bool = False,
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    """Causal softmax attention of each row's newest token, scores and sums in float32.

    Args:
      q: [B, G, H, h] rotated queries.
      new: the token's own keys and values, [B, G, K, h] each.
      stacks: of all layers.
      layer: i32[], which of them.
      length: i32[B], real tokens of the prompts.
      t: i32[], columns of `stacks.own` that hold tokens.
      scale: of the scores.
      interpret: runs on any platform, slowly.

    Returns:
      [B, G, H, h] in the dtype of q, and `new` as the kernel read it: whoever keeps it need not
      compute it once more.
    """
    groups, rows, heads, width = q.shape
    kv_heads = new[0].shape[2]
    share = heads // kv_heads  # queries of a row that read the same head
    of_group = -(-rows * share // _QUERIES)  # blocks of queries that read a prompt
    of_rows = rows * -(-share // _QUERIES)
    prompt, own = (
        _cut(pair[0].shape[-2], programs * kv_heads * groups)
        for pair, programs in zip(stacks, (of_group, of_rows), strict=True)
    )
    q = (q * jnp.asarray(scale, q.dtype)).reshape(groups, rows, kv_heads, share, width)
    q = q.swapaxes(1, 2).reshape(groups, kv_heads, rows * share, width)
    # One array, so that one program makes it of the projections.
    token = jnp.concatenate([q, *(x.swapaxes(1, 2) for x in new)], axis=2)
    token = jax.lax.optimization_barrier(token)
    call = functools.partial(pl.pallas_call, interpret=interpret)
    parts = pl.next_power_of_2(prompt.parts + own.parts)  # what one program loads
    like = jax.ShapeDtypeStruct((groups, kv_heads, parts, rows * share), jnp.float32)
    of_own = of_rows * own.parts
    sums = call(
        functools.partial(_parts_kernel, prompt=prompt, own=own, share=share, of_own=of_own),
        grid=(of_own + of_group * prompt.parts, kv_heads, groups),
        out_shape=(jax.ShapeDtypeStruct((*like.shape, width), jnp.float32), like, like),
        compiler_params=triton.CompilerParams(num_warps=_WARPS, num_stages=_STAGES),
        name='decode_parts',
    )(layer, length, t, token, *stacks.prompt, *stacks.own)
    out = call(
        functools.partial(_whole_kernel, share=share, parts=prompt.parts + own.parts),
        grid=(rows, kv_heads, groups),
        out_shape=jax.ShapeDtypeStruct((groups, rows * heads, width), q.dtype),
        compiler_params=triton.CompilerParams(num_warps=4, num_stages=1),
        name='decode_whole',
    )(token, *sums)
    _, k, v = jnp.split(token, [rows * share, rows * (share + 1)], axis=2)
    return out.reshape(groups, rows, heads, width), (k.swapaxes(1, 2), v.swapaxes(1, 2))


def _cut(columns: int, programs: int) -> _Cut:
    """Into more than one part where there are fewer programs than a GPU runs side by side."""
    parts = min(_PARTS, -(-_PROGRAMS // programs))
    size = -(-columns // (parts * _KEYS)) * _KEYS
    return _Cut(size, -(-columns // size))


def _parts_kernel(
    layer, length, t, token, prompt_k, prompt_v, own_k, own_v, values, weights, peak, *,
    prompt: _Cut, own: _Cut, share: int, of_own: int,
):  # fmt: skip
    """One part of a row's columns with its queries, or of a prompt with some of its group's.

    What is written is [B, K, parts, n, ...] of the queries, the first n of the token's
    [B, K, n + G + G, h]: parts of prompts first.
    """
    which, head, group = (pl.program_id(axis) for axis in range(3))
    at = layer[()]  # here: a load that waits for another in the loop could not run ahead
    tiles = -(-share // _QUERIES)  # of a row's queries

    def of_row():
        i, row = which % own.parts, which // (own.parts * tiles)
        tile = which // own.parts % tiles
        start = i * own.size
        queries = row * share + tile * _QUERIES, jnp.minimum(share - tile * _QUERIES, _QUERIES)

        def keys_values(columns):
            return (x.at[at, group, row, head, columns, :] for x in (own_k, own_v))

        return prompt.parts + i, *queries, keys_values, start, jnp.minimum(start + own.size, t[()])

    def of_prompt():
        i, tile = (which - of_own) % prompt.parts, (which - of_own) // prompt.parts
        first, start = tile * _QUERIES, i * prompt.size

        def keys_values(columns):
            return (x.at[at, group, head, columns, :] for x in (prompt_k, prompt_v))

        stop = jnp.minimum(start + prompt.size, length[group])
        return i, first, jnp.minimum(values.shape[3] - first, _QUERIES), keys_values, start, stop

    def read(slot, first, count, keys_values, start, stop):
        rows, real = pl.ds(first, _QUERIES), jnp.arange(_QUERIES) < count
        mine = triton.load(token.at[group, head, rows, :], mask=real[:, None], other=0.0)
        sums = _over(keys_values, mine, start, stop)
        triton.store(values.at[group, head, slot, rows, :], sums.values, mask=real[:, None])
        triton.store(weights.at[group, head, slot, rows], sums.weights, mask=real)
        triton.store(peak.at[group, head, slot, rows], sums.peak, mask=real)

    @pl.when(which < of_own)
    def _():
        read(*of_row())

    @pl.when(which >= of_own)
    def _():
        read(*of_prompt())


def _whole_kernel(token, values, weights, peak, out, *, share: int, parts: int):
    """One head of a row: its token, and the sums of all parts."""
    row, head, group = (pl.program_id(axis) for axis in range(3))
    size = pl.next_power_of_2(share)
    real = jnp.arange(size) < share
    rows = pl.ds(row * share, size)
    mine = triton.load(token.at[group, head, rows, :], mask=real[:, None], other=0.0)
    behind, heads = values.shape[3], values.shape[1] * share  # the queries; of a row
    key, value = (
        token[group, head, at, :].astype(jnp.float32)[None, :]
        for at in (behind + row, behind + out.shape[1] // heads + row)
    )
    score = (mine.astype(jnp.float32) * key).sum(1)
    every = pl.ds(0, values.shape[2])
    there = (jnp.arange(values.shape[2]) < parts)[:, None] & real
    peaks = triton.load(peak.at[group, head, every, rows], mask=there, other=_NOTHING)
    highest = jnp.maximum(score, peaks.max(0))
    share_of = jnp.exp(peaks - highest)  # [parts, n]
    total = triton.load(weights.at[group, head, every, rows], mask=there, other=0.0) * share_of
    read = triton.load(values.at[group, head, every, rows, :], mask=there[:, :, None], other=0.0)
    read = (read * share_of[:, :, None]).sum(0)
    itself = jnp.exp(score - highest)
    total = total.sum(0) + itself
    found = ((read + itself[:, None] * value) / total[:, None]).astype(out.dtype)
    to = pl.ds(row * heads + head * share, size)
    triton.store(out.at[group, to, :], found, mask=real[:, None])


def _over(keys_values, q, start, stop) -> _Sums:
    """Of columns start to stop, of references that `keys_values` picks."""

    def add(i, sums):
        first = start + i * _KEYS
        seen = first + jnp.arange(_KEYS) < stop
        k, v = (
            triton.load(x, mask=seen[:, None], other=0.0) for x in keys_values(pl.ds(first, _KEYS))
        )
        scores = jnp.where(seen[None, :], triton.dot(q, k.T), _NOTHING)
        peak = jnp.maximum(sums.peak, scores.max(1))
        weights = jnp.exp(scores - peak[:, None])  # 0 where nothing is seen: a block sees something
        shrunk = jnp.exp(sums.peak - peak)
        read = triton.dot(weights.astype(v.dtype), v)
        return _Sums(
            sums.values * shrunk[:, None] + read, sums.weights * shrunk + weights.sum(1), peak
        )

    zeros = jnp.zeros(len(q), jnp.float32)
    nothing = _Sums(jnp.zeros(q.shape, jnp.float32), zeros, zeros + _NOTHING)
    blocks = jnp.maximum(stop - start + _KEYS - 1, 0) // _KEYS
    return jax.lax.fori_loop(0, blocks, add, nothing)
