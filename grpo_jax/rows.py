"""Rows that are decoded, and leaving out those that have ended.

Each device has rows of its own, and none moves to another.
"""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from grpo_jax import sharding
from grpo_jax.models import KeyValues
from grpo_jax.types import Array, Params, Prompts, Sampling

FEWEST = 4  # rows of a device; fewer take as long, as weights are what is read then
NOBODY = (0, 0)  # as `enough`: all are waited for


class Given(NamedTuple):
    """What stays the same while completions are decoded."""

    params: Params
    prompts: Prompts
    prompt: KeyValues  # [L, B, K, P, h]
    sampling: Sampling
    eos_ids: Array
    stops: Array | None


class Rows(NamedTuple):
    """The rows that are still decoded, R of each of B groups or of parts of them."""

    place: jax.Array  # i32[B, R], which of its device's completions a row is, group by group
    key: jax.Array  # [B, R]
    token: jax.Array  # i32[B, R], the last one drawn
    done: jax.Array  # bool[B, R]
    matched: jax.Array  # i32[B, R], state in the table of stop strings
    own: KeyValues  # [L, B, R, K, columns, h]


class Columns(NamedTuple):
    """What was drawn."""

    tokens: jax.Array  # i32[B, R, n]
    mask: jax.Array  # bool[B, R, n]
    logprobs: jax.Array  # f32[B, R, n]


class State(NamedTuple):
    """Between two blocks."""

    t: jax.Array  # i32[], columns drawn so far
    drawn: Columns  # [B, G, T]
    ended: jax.Array  # bool[B, G]
    live: jax.Array  # i32[2], see `live`


class Shape(NamedTuple):
    """How many rows are decoded."""

    groups: int  # on each device
    rows: int  # of each of them
    apart: bool = False  # in place of groups there are rows, which bring their prompts


def shape_of(rows: Rows, mesh: Mesh | None) -> Shape:
    """The present one, as if of groups."""
    groups, size = rows.done.shape
    return Shape(groups // devices(mesh), size)


def live(rows: Rows, mesh: Mesh | None) -> jax.Array:
    """i32[2], rows that have not ended: the most of a group, and of a device."""
    groups = ~rows.done
    return jnp.stack([x.sum(1).max() for x in (groups, groups.reshape(devices(mesh), -1))])


def devices(mesh: Mesh | None) -> int:
    """That groups are spread over."""
    return 1 if mesh is None else mesh.shape['fsdp']


def fewest(most: int, total: int, now: Shape, prompt: int, columns: int) -> Shape:
    """The shape with the fewest rows that holds those that go on, without having more keys.

    It is one of few, as each is a program: half of the rows, or half of these, and so on, but not
    below `FEWEST`.

    Args:
      most: rows of a group that go on.
      total: rows of a device that go on.
      now: the present shape.
      prompt: columns of a group's keys.
      columns: of each row's, in the next block.
    """
    rows = _halved(now.rows, max(most, -(-FEWEST // now.groups)))
    apart = _halved(now.groups * now.rows, max(total, FEWEST))
    keys = now.groups * (prompt + now.rows * columns)
    if apart < now.groups * rows and apart * (prompt + columns) <= keys:
        return Shape(apart, 1, apart=True)
    return Shape(now.groups, rows)


def enough(now: Shape, prompt: int, columns: int) -> tuple[int, int]:
    """Rows of a group, and of a device: `fewest` finds a smaller shape if no more of either go on.

    Arguments are those of `fewest`.
    """
    rows, size = -(-now.rows // 2), now.groups * now.rows
    if rows == now.rows or rows * now.groups < FEWEST:
        rows = 0
    apart = -(-size // 2)
    while apart >= FEWEST and fewest(now.rows, apart, now, prompt, columns) == now:
        apart = -(-apart // 2)
    return rows, apart if FEWEST <= apart < size else 0


def _halved(size: int, least: int) -> int:
    """The smallest of size, size / 2, size / 4, ... (rounded up) that is not below `least`."""
    while size > 1 and -(-size // 2) >= least:
        size = -(-size // 2)
    return size


@functools.partial(jax.jit, static_argnames=('shape', 'mesh'))
def leave_out(given: Given, rows: Rows, shape: Shape, mesh: Mesh | None) -> tuple[Given, Rows]:
    """Keeps the rows of a shape, those that go on among them."""
    (groups, size, _), done = shape_of(rows, mesh), rows.done
    if shape.apart:
        kept = jnp.argsort(done.reshape(-1, groups * size), axis=1, stable=True)[:, : shape.groups]
    else:
        first = size * (jnp.arange(len(done)) % groups)  # row of each group
        kept = jnp.argsort(done, axis=1, stable=True)[:, : shape.rows] + first[:, None]
    kept = kept.reshape(devices(mesh), -1)

    def take(x):
        return take_rows(x, kept).reshape(-1, shape.rows, *x.shape[2:])

    nothing: Any = None
    with sharding.use(mesh):
        own = jax.tree.map(jax.vmap(take), rows.own)
        rows = jax.tree.map(take, rows._replace(own=nothing))._replace(own=own)
        if not shape.apart:
            return given, rows

        def bring(x):
            return take_rows(x[:, None], kept // size)

        prompt = jax.tree.map(jax.vmap(bring), given.prompt)
        return given._replace(prompts=jax.tree.map(bring, given.prompts), prompt=prompt), rows


def numbers(shape: tuple[int, ...], mesh: Mesh | None) -> jax.Array:
    """i32[B, G], each device's completions from 0."""
    rows = math.prod(shape)
    return (jnp.arange(rows) % (rows // devices(mesh))).reshape(shape)


def take_rows(x: jax.Array, which: jax.Array) -> jax.Array:
    """Rows [devices * n, ...] of x [B, R, ...], those i32[devices, n] of each device's share."""
    shares = x.reshape(len(which), -1, *x.shape[2:])
    taken = jax.vmap(lambda share, i: share[i])(shares, which)
    return sharding.anchor(taken.reshape(-1, *x.shape[2:]))


def put_rows(whole: jax.Array, which: jax.Array, rows: jax.Array) -> jax.Array:
    """Writes rows [B, R, ...] over those i32[devices, n] of each device's share of `whole`."""
    shares, rows = (x.reshape(len(which), -1, *x.shape[2:]) for x in (whole, rows))
    written = jax.vmap(lambda x, i, y: x.at[i].set(y))(shares, which, rows)
    return sharding.anchor(written.reshape(whole.shape))
