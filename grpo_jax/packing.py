"""Completions behind each other in sequences of T columns, whichever prompts they belong to.

Where lengths differ, rows of a microbatch hold mostly padding even when they are ordered by length;
sequences that are filled up with whole completions hold almost none, and there are only as many of
them as the tokens need. A token reads its own completion and its own prompt, by the owners of
`attention.Piece`. A completion of n tokens takes n columns: the last token of its prompt, from
which the first one is predicted, and all of its own but the last.

A sequence holds completions of at most two prompts: every token of it is multiplied with all keys
that are there, so a third prompt would cost more than the columns that stay empty without it.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from grpo_jax.models import KeyValues, Owners, Transformer, apply, last_tokens
from grpo_jax.models.attention import NOWHERE
from grpo_jax.sharding import anchor
from grpo_jax.types import Batch, Params, Prompts

NOBODY = -1  # owner of the columns that nothing stands in
UNREAD = -2  # owner of the prompt that a sequence does not read


class Packing(NamedTuple):
    """Which completion token of its shard a column predicts; one behind the last: none.

    Tokens of a shard are numbered row by row, all T columns of each.
    """

    source: jax.Array  # i32[shards, sequences, T]
    used: jax.Array  # i32[], how many sequences hold any token on some shard


class Sequences(NamedTuple):
    """N of them over all shards."""

    part: Batch  # arrays [N, 1, T]; without prompts and what belongs to whole rows
    tokens: jax.Array  # i32[N, T], what is read
    positions: jax.Array  # i32[N, T]
    reads: jax.Array  # i32[N, T, 2], its own completion and its prompt as owners, or NOBODY
    read: jax.Array  # i32[shards, sequences, 2], the groups of a sequence; one twice if alone
    prompts: Prompts  # of the whole microbatch


def pack(mask: jax.Array, shards: int) -> Packing:
    """Puts the completions into sequences, each where it first fits.

    Group by group, the longest of each first, so that a sequence holds few groups. It takes no
    third one. Each shard packs its own.

    Args:
      mask: bool[m, G, T], true up to a row's end.
      shards: the microbatch is spread over.
    """
    _, group_size, columns = mask.shape
    rows = mask.shape[0] * group_size // shards

    def one(lengths):
        groups = jnp.arange(rows) // group_size
        order = jnp.lexsort((-lengths, groups))

        def place(carry, row):
            filled, first, last = carry
            length, group = lengths[row], groups[row]
            takes = (filled == 0) | (last == group) | (last == first)
            sequence = jnp.argmax(takes & (filled + length <= columns))
            start = filled[sequence]
            filled = filled.at[sequence].add(length)
            first = first.at[sequence].set(jnp.where(start > 0, first[sequence], group))
            last = last.at[sequence].set(jnp.where(length > 0, group, last[sequence]))
            return (filled, first, last), (sequence, start)

        empty = jnp.zeros(rows, jnp.int32)
        (filled, *_), (sequence, start) = jax.lax.scan(place, (empty, empty, empty), order)
        t = jnp.arange(columns)
        to = (sequence * columns + start)[:, None] + t
        to = jnp.where(t < lengths[order][:, None], to, rows * columns)
        source = jnp.full(rows * columns, rows * columns)
        source = source.at[to].set(order[:, None] * columns + t, mode='drop')
        return source.reshape(rows, columns), (filled > 0).sum()

    source, used = jax.vmap(one)(mask.sum(-1).reshape(shards, rows))
    return Packing(source, used.max())


def take(part: Batch, source: jax.Array) -> Sequences:
    """What some sequences hold.

    Args:
      part: a microbatch.
      source: i32[shards, some, T] of `Packing`.
    """
    rollout = part.rollout
    prompts, (_, group_size, columns) = rollout.prompts, rollout.mask.shape
    shards = len(source)
    total = rollout.mask.size // shards
    index = jnp.minimum(source, total - 1)
    there = source < total
    row = index // columns
    group = row // group_size

    def of_columns(x, i):
        return _from_shares(x, i).reshape(-1, columns)

    def of_tokens(x):
        return of_columns(x.reshape(-1), index)[:, None]

    nothing: Any = None
    held = part.per_token()
    held = held._replace(rollout=held.rollout._replace(mask=nothing))
    held = jax.tree.map(of_tokens, held)
    here = anchor(there.reshape(-1, 1, columns))
    held = held._replace(rollout=held.rollout._replace(mask=here))
    t = (index % columns).reshape(-1, columns)
    last = last_tokens(prompts.tokens, prompts.length)
    before = of_columns(rollout.tokens.reshape(-1), jnp.maximum(index - 1, 0))
    reads = jnp.stack([_completion(row), _prompt(group)], -1).reshape(-1, columns, 2)
    groups = len(rollout.mask) // shards
    ends = jnp.where(there, group, groups - 1).min(-1), jnp.where(there, group, 0).max(-1)
    return Sequences(
        held,
        tokens=jnp.where(t > 0, before, of_columns(last, group)),
        positions=of_columns(prompts.length, group) - 1 + t,
        reads=jnp.where(here[:, 0, :, None], reads, NOBODY),
        read=jnp.stack(ends, -1),
        prompts=prompts,
    )


def hidden(model: Transformer, params: Params, prompt: KeyValues, some: Sequences) -> jax.Array:
    """States [N, 1, T, D] that predict the columns' tokens.

    Args:
      model: the decoder.
      params: its parameters.
      prompt: [L, m, K, P, h] of the microbatch.
      some: of `take`.
    """
    width = some.prompts.tokens.shape[1]

    def both(x):
        """[N, K, 2 P, h] of x [m, K, P, h]."""
        x = _from_shares(x, some.read).swapaxes(-4, -3)
        return x.reshape(-1, x.shape[-4], 2 * width, x.shape[-1])

    # The last token of a prompt is read in front of each completion, see `continuation_hidden`.
    columns = jnp.arange(width)
    positions = jnp.where(columns < some.prompts.length[:, None] - 1, columns, NOWHERE)
    positions = _from_shares(positions, some.read)
    alone = some.read[..., :1] == some.read[..., 1:]  # whose prompt is there once
    first, second = _prompt(some.read[..., :1]), _prompt(some.read[..., 1:])
    owner = jnp.concatenate([first, jnp.where(alone, UNREAD, second)], -1)
    owner = jnp.repeat(owner, width, axis=-1).reshape(-1, 2 * width)
    owners = Owners(jnp.concatenate([owner, some.reads[..., 0]], -1), some.reads)
    read = apply(
        model, params, some.tokens, some.positions, KeyValues(*map(jax.vmap(both), prompt)),
        positions.reshape(-1, 2 * width), owners, method='extend_packed',
    )  # fmt: skip
    return read[:, None]


def _prompt(group: jax.Array) -> jax.Array:
    """The owner that a group's prompt is."""
    return 2 * group


def _completion(row: jax.Array) -> jax.Array:
    """The owner that a row is, which no prompt is."""
    return 2 * row + 1


def _from_shares(x: jax.Array, index: jax.Array) -> jax.Array:
    """[shards, ...] entries of each share of x [shards * n, ...], which is i32[shards, ...]."""
    shares = x.reshape(len(index), -1, *x.shape[1:])
    return anchor(jax.vmap(lambda share, i: share[i])(shares, index))


def put_back(whole: jax.Array, new: jax.Array, source: jax.Array) -> jax.Array:
    """Writes what was found for the columns of a bundle, [N, 1, T], to their rows: [m, G, T]."""
    shards = len(source)
    flat = whole.reshape(shards, -1)
    new, source = new.reshape(shards, -1), source.reshape(shards, -1)
    write = jax.vmap(lambda x, i, y: x.at[i].set(y, mode='drop'))
    return anchor(write(flat, source, new).reshape(whole.shape))
