"""Compacting the decode batch: finished completions are removed from it.

A completion that is being decoded occupies a slot. Each device has its own slots, and no completion
moves to another device. There are only a few shapes to compact to, since each is compiled. A column
is one token position of all completions.
"""

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int, Key, Shaped, UInt, UInt32

from grpo_jax import sharding
from grpo_jax.engine import shares
from grpo_jax.models import KeyValues
from grpo_jax.sharding import anchor_rows, data_devices, slices_of
from grpo_jax.types import Params, Prompts, Sampling

FEWEST = 4  # slots per device; fewer would take as long, since reading the weights dominates
NEVER_COMPACT = (0, 0)  # `compaction_thresholds` that no batch reaches before it has ended


class DecodeInputs(NamedTuple):
    """What is constant while completions are decoded."""

    params: Params
    prompts: Prompts
    cache: KeyValues  # of the prompts, [L, B, K, P, h]
    sampling: Sampling
    eos_ids: Int[Array, ' E']
    stops: Int[Array, 'states V'] | None


class Slots(NamedTuple):
    """The completions that are decoded: R of each of B groups (R = 1 if `SlotShape.apart`).

    Where the mesh splits groups, a group is here a slice of a group, see `sharding.split_groups`.
    """

    place: Int[Array, 'B R']  # the completion's number on its device, counted group by group
    key: Key[Array, 'B R']
    token: Int[Array, 'B R']  # the last one drawn
    done: Bool[Array, 'B R']
    stop_state: Int[Array, 'B R']  # state in the table of stop strings
    cache: KeyValues  # of the completions, [L, B, R, K, columns, h]


class Drawn(NamedTuple):
    """The tokens drawn so far, of n columns."""

    tokens: Int[Array, 'B R n']
    mask: Bool[Array, 'B R n']
    logprobs: Float[Array, 'B R n']
    # If they are recorded, see `types.Rollout`.
    support: UInt32[Array, 'B R n words'] | None
    routing: UInt[Array, 'B R n L k'] | None
    trained: Bool[Array, 'B R n'] | None = None  # with an environment, see `types.Rollout`


class DecodeState(NamedTuple):
    """The state between two blocks of columns."""

    # Columns so far: of all completions, or with an environment of each.
    t: Int[Array, ''] | Int[Array, 'B G']
    drawn: Drawn  # of all completions, [B, G, T]
    ended: Bool[Array, 'B G']  # with an environment: whether the last turn has ended
    live: Int[Array, '2']  # see `count_live`


class SlotShape(NamedTuple):
    """How many completions are decoded at a time."""

    groups: int  # on each device
    rows: int  # of each group
    apart: bool = False  # every slot is a group of one, with its own copy of its prompt's cache


def first_shape(groups: int, group_size: int, mesh: Mesh | None) -> SlotShape:
    """The shape with a slot for every completion of B groups of G."""
    slices = slices_of(groups, group_size, mesh)
    return SlotShape(groups * slices // data_devices(mesh), group_size // slices)


def shape_of(slots: Slots, mesh: Mesh | None) -> SlotShape:
    """The shape of these slots."""
    groups, size = slots.done.shape
    return SlotShape(groups // data_devices(mesh), size)


def count_live(by_group: Bool[Array, 'B R'], mesh: Mesh | None) -> Int[Array, '2']:
    """Slots that draw tokens: the most in any group, and the most on any device."""
    by_device = by_group.reshape(data_devices(mesh), -1)
    return jnp.stack([x.sum(1).max() for x in (by_group, by_device)])


def smallest_shape(most: int, total: int, now: SlotShape, prompt: int, columns: int) -> SlotShape:
    """The shape with the fewest slots that holds all live ones and caches no more keys than now.

    The slots per group are halved repeatedly; or each slot becomes a group of one (`apart`), and
    the number of slots is halved. There are never fewer than `FEWEST`.

    Args:
      most: live slots of the group that has the most.
      total: live slots of the device that has the most.
      now: the current shape.
      prompt: columns of a prompt's cache.
      columns: columns of a completion's cache in the next block.
    """
    rows = _halved(now.rows, max(most, -(-FEWEST // now.groups)))
    apart = _halved(now.groups * now.rows, max(total, FEWEST))
    keys = now.groups * (prompt + now.rows * columns)
    if apart < now.groups * rows and apart * (prompt + columns) <= keys:
        return SlotShape(apart, 1, apart=True)
    return SlotShape(now.groups, rows)


def compaction_thresholds(now: SlotShape, prompt: int, columns: int) -> tuple[int, int]:
    """Most live slots (per group, per device) for which `smallest_shape` returns a smaller shape.

    Arguments as in `smallest_shape`.
    """
    rows, size = -(-now.rows // 2), now.groups * now.rows
    if rows == now.rows or rows * now.groups < FEWEST:
        rows = 0
    apart = -(-size // 2)
    while apart >= FEWEST and smallest_shape(now.rows, apart, now, prompt, columns) == now:
        apart = -(-apart // 2)
    return rows, apart if FEWEST <= apart < size else 0


def _halved(size: int, least: int) -> int:
    """The smallest of size, size / 2, size / 4, ... (rounded up) that is not below `least`."""
    while size > 1 and -(-size // 2) >= least:
        size = -(-size // 2)
    return size


@functools.partial(jax.jit, static_argnames=('shape', 'mesh'))
def choose_slots(
    prompts: Prompts, slots: Slots, shape: SlotShape, mesh: Mesh | None,
    over: Bool[Array, 'devices n'] | None = None,
) -> tuple[Int[Array, 'devices m'], Prompts, Slots]:  # fmt: skip
    """Reduces the slots to `shape`, keeping all that are not done; with `over`, not over.

    Their caches are left to `keep_slots` and `copy_prompts`.

    Args:
      prompts: of the groups.
      slots: before, without their caches.
      shape: after.
      mesh: the devices.
      over: whether the episode of each completion of a device is over.

    Returns:
      The kept slots of each device, numbered within its share, their prompts, and the slots.
    """
    (groups, size, _), done = shape_of(slots, mesh), slots.done
    if over is not None:
        done = take_slots(over, slots.place.reshape(len(over), -1)).reshape(done.shape)
    if shape.apart:
        kept = jnp.argsort(done.reshape(-1, groups * size), axis=1, stable=True)[:, : shape.groups]
    else:
        first = size * (jnp.arange(len(done)) % groups)  # slot of each group
        kept = jnp.argsort(done, axis=1, stable=True)[:, : shape.rows] + first[:, None]
    kept = kept.reshape(data_devices(mesh), -1)
    with sharding.use(mesh):
        slots = jax.tree.map(lambda x: _grouped(x, kept, shape.rows), slots)
        if shape.apart:
            prompts = jax.tree.map(lambda x: take_slots(x[:, None], kept // size), prompts)
        return anchor_rows(kept), prompts, slots


@functools.partial(jax.jit, static_argnames=('rows', 'mesh'))
def keep_slots(
    cache: Shaped[Array, 'L B R K n h'], kept: Int[Array, 'devices m'], *, rows: int,
    mesh: Mesh | None,
) -> Shaped[Array, 'L b rows K n h']:  # fmt: skip
    """One array of the completions' caches with only the kept slots, `rows` of a group."""
    with sharding.use(mesh):
        return _by_layer(lambda x: _grouped(x, kept, rows), cache)


@functools.partial(jax.jit, static_argnames=('size', 'mesh'))
def copy_prompts(
    cache: Shaped[Array, 'L B K P h'], kept: Int[Array, 'devices m'], *, size: int,
    mesh: Mesh | None,
) -> Shaped[Array, 'L b K P h']:  # fmt: skip
    """One array of the prompts' caches, copied for each kept slot out of groups of `size`."""
    with sharding.use(mesh):
        return _by_layer(lambda x: take_slots(x[:, None], kept // size), cache)


def _by_layer(function: Callable[[jax.Array], jax.Array], cache: jax.Array) -> jax.Array:
    """Maps over layers, one at a time: all at once, TPUs need two to three times the results."""
    results: jax.Array = jax.lax.map(function, cache)
    return results


def _grouped(x: jax.Array, kept: Int[Array, 'devices m'], rows: int) -> jax.Array:
    """The kept slots of x [B, R, ...], in groups of `rows`."""
    return take_slots(x, kept).reshape(-1, rows, *x.shape[2:])


def slot_numbers(shape: tuple[int, ...], mesh: Mesh | None) -> Int[Array, 'B G']:
    """Numbers of each device's completions, from 0."""
    total = math.prod(shape)
    return (jnp.arange(total) % (total // data_devices(mesh))).reshape(shape)


def take_slots(x: jax.Array, index: Int[Array, 'devices n']) -> jax.Array:
    """Slots [devices * n, ...] of x [B, R, ...], numbered within each device's share."""
    return shares.take(x.reshape(-1, *x.shape[2:]), index).reshape(-1, *x.shape[2:])


def put_slots(whole: jax.Array, index: Int[Array, 'devices n'], slots: jax.Array) -> jax.Array:
    """Writes slots [B, R, ...] over those numbered `index` in `whole` [B, G, ...]."""
    flat, slots = (x.reshape(-1, *x.shape[2:]) for x in (whole, slots))
    return shares.put(flat, index, slots).reshape(whole.shape)
