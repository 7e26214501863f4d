"""Completions of several turns: an environment replies to some while the others are decoded.

A turn ends as a completion does, by a token or a stop string. Between two blocks of columns the
caller's `exchange` is told which turns have ended, and tells which replies have come in and which
episodes are over. Replies become tokens of the completion (see `forced_tokens`); a completion
without a reply waits in its slot and draws nothing. A token's random key depends on its completion
and its number in it, so tokens do not depend on when a reply comes.
"""

import functools
import itertools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Bool, Int

from grpo_jax import sharding
from grpo_jax.engine import decode
from grpo_jax.engine.compaction import (
    FEWEST,
    NEVER_COMPACT,
    DecodeInputs,
    DecodeState,
    Slots,
    SlotShape,
    shape_of,
    smallest_shape,
)
from grpo_jax.engine.sampler_calls import SamplerCalls
from grpo_jax.sharding import data_devices, slices_of
from grpo_jax.types import Array, Params, Prompts, Rollout

PAUSE = 16  # columns of a block while replies are awaited
TOKENS = 1024  # of the replies that a device reads at a time, if they are shorter


class Turns(NamedTuple):
    """B * G completions between two blocks."""

    tokens: Array  # i32[B, G, T] on the devices
    length: Int[np.ndarray, 'B G']  # their tokens so far
    ended: Bool[np.ndarray, 'B G']  # their last turn has ended


class Replies(NamedTuple):
    """What an environment has replied since the last block."""

    tokens: Int[np.ndarray, 'B G F']
    length: Int[np.ndarray, 'B G']  # 0: there is no reply, or not yet
    over: Bool[np.ndarray, 'B G']  # these episodes are over: there will be none


# (turns, idle) -> replies. `idle`: nothing is being decoded, so it should wait for a reply. Of
# several processes all get the same turns and have to return the same replies.
Exchange = Callable[[Turns, bool], Replies]


def decode_episodes(
    calls: SamplerCalls, exchange: Exchange, params: Params, prompts: Prompts,
    first: tuple[DecodeInputs, Slots, DecodeState],
) -> Iterator[Rollout]:  # fmt: skip
    """Continues after the first block, until all episodes are over.

    Args:
      calls: of the sampler's programs.
      exchange: called after each block.
      params: that the programs use.
      prompts: with their routing if it is recorded.
      first: the results of the first block.

    Yields:
      The rollout after each block is dispatched; completions have ended in it where their episodes
      were over before. The last one is complete.
    """
    inputs, slots, state = first
    layout = _Layout.of(prompts, calls.group_size, calls.mesh)
    width, over = slots.cache.k.shape[-2], np.zeros(layout.shape, bool)
    while True:
        rollout = _rollout(prompts, state, calls, layout.put(over))
        yield rollout
        if over.all():
            return
        length, ended = layout.read(state)
        live = ~ended & (length < calls.max_tokens)
        replies = exchange(Turns(rollout.tokens, length, ended), not live.any())
        over = replies.over | (length == calls.max_tokens)
        _check_room(length + replies.length, over, calls.max_tokens)
        if over.all():
            continue
        length = length + replies.length
        live |= replies.length > 0
        while width < min(length[~over].max() + 1, calls.max_tokens):
            width = calls.next_width(width)
        now = shape_of(slots, calls.mesh)
        smaller = smallest_shape(*layout.most(~over), now, inputs.cache.k.shape[-2], width)
        if smaller != now:
            inputs, slots = calls.compacted(inputs, slots, smaller, layout.put(over))
        if slots.cache.k.shape[-2] < width:
            slots = calls.grown(slots, width)
        for part, rows in layout.parts(replies, shape_of(slots, calls.mesh)):
            slots, state = calls.replies(params, inputs, slots, state, part, rows).run()
        if live.any():
            thresholds = calls.thresholds(inputs, slots, width)
            if any(n <= least for n, least in zip(layout.most(live), thresholds, strict=True)):
                thresholds = NEVER_COMPACT  # slots of those that wait
            waits = (~live & ~over).any()
            pause = thresholds, np.int32(PAUSE if waits else decode.BLOCK)
            slots, state = calls.block_to(params, inputs, slots, state, width, pause=pause).run()


def reply_widths() -> Iterator[int]:
    """The numbers of tokens to which replies are padded."""
    return (PAUSE * 4**n for n in itertools.count())


def reply_rows(width: int, slots: SlotShape) -> int:
    """How many replies of `width` tokens a device reads at a time."""
    return min(max(TOKENS // width, FEWEST), slots.groups * slots.rows)


def _check_room(length: Int[np.ndarray, 'B G'], over: Bool[np.ndarray, 'B G'], last: int) -> None:
    if (wrong := (length >= last) & ~over).any():
        raise ValueError(
            f'a reply makes completion {tuple(map(int, np.argwhere(wrong)[0]))} '
            f'{length[wrong][0]} tokens long, where max_tokens={last} leaves none to the policy '
            'after it: cut the reply, or end the episode'
        )


def _rollout(prompts: Prompts, state: DecodeState, calls: SamplerCalls, over: jax.Array) -> Rollout:
    """The rollout so far, in which completions have ended whose episodes are over."""
    state = state._replace(ended=_both(state.ended, over))
    return decode.rollout_so_far(prompts, state, calls.group_size, calls.mesh)


@jax.jit
def _both(ended: jax.Array, over: jax.Array) -> jax.Array:
    return ended & over.reshape(ended.shape)


class _Layout(NamedTuple):
    """Where completions are: each device has n of them, group by group or slice by slice."""

    completions: Int[np.ndarray, 'devices n']  # numbers in [B, G]
    entries: int  # groups, or slices of groups, of all devices
    shape: tuple[int, int]  # B, G
    mesh: Mesh | None

    @classmethod
    def of(cls, prompts: Prompts, group_size: int, mesh: Mesh | None) -> '_Layout':
        shape = len(prompts.index), group_size
        slices = slices_of(*shape, mesh)
        numbers: Any = np.arange(shape[0] * shape[1])
        groups = mesh.shape['groups'] if mesh is not None and slices > 1 else 1
        numbers = numbers.reshape(groups, -1, slices, group_size // slices).swapaxes(1, 2)
        return cls(numbers.reshape(data_devices(mesh), -1), shape[0] * slices, shape, mesh)

    def read(self, state: DecodeState) -> tuple[np.ndarray, np.ndarray]:
        """The lengths [B, G] of completions, and whether their last turns have ended."""
        values = jax.device_get(_replicated((state.t, state.ended), self.mesh))
        length, ended = (self._joined(x) for x in values)
        return length, ended

    def put(self, x: Any) -> jax.Array:
        """[B, G, ...] -> [devices, n, ...], on the devices."""
        x = x.reshape(-1, *x.shape[2:])[self.completions]
        if self.mesh is None:
            return jax.numpy.asarray(x)
        placed: jax.Array = sharding.put(x, sharding.groups(self.mesh))
        return placed

    def most(self, which: Bool[np.ndarray, 'B G']) -> tuple[int, int]:
        """How many of these completions: the most in any group, and the most on any device."""
        by_device = which.reshape(-1)[self.completions]
        by_group = by_device.reshape(self.entries, -1)
        return int(by_group.sum(1).max()), int(by_device.sum(1).max())

    def parts(
        self, replies: Replies, slots: SlotShape
    ) -> Iterator[tuple[tuple[jax.Array, jax.Array], int]]:
        """Replies in parts that a device reads at a time, and how many there may be in each."""
        longest = int(replies.length.max())
        if not longest:
            return
        width = next(width for width in reply_widths() if width >= longest)
        tokens = np.zeros((*replies.length.shape, width), np.int32)
        tokens[..., :longest] = replies.tokens[..., :longest]
        rows = reply_rows(width, slots)
        number = (replies.length.reshape(-1)[self.completions] > 0).cumsum(1)  # from 1
        for start in range(0, int(number.max()), rows):
            chosen = self._joined((number > start) & (number <= start + rows))
            length = np.where(chosen, replies.length, 0).astype(np.int32)
            yield (self.put(tokens), self.put(length)), rows

    def _joined(self, x: Any) -> np.ndarray:
        """[devices, n] or the shape of the slots -> [B, G]."""
        joined = np.empty(self.shape, x.dtype)
        joined.reshape(-1)[self.completions.reshape(-1)] = x.reshape(-1)
        return joined


@functools.partial(jax.jit, static_argnames='mesh')
def _replicated(tree: Any, mesh: Mesh | None) -> Any:
    if mesh is None:
        return tree
    return jax.lax.with_sharding_constraint(tree, sharding.replicated(mesh))
