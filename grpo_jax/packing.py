"""Completions behind each other in sequences of T columns, whichever prompts they belong to.

Where lengths differ, rows of a microbatch hold mostly padding even when they are ordered by length;
sequences that are filled up with whole completions hold almost none, and there are only as many of
them as the tokens need. A token reads its own completion and its own prompt, by the owners of
`attention.Piece`. A completion of n tokens takes n columns: the last token of its prompt, from
which the first one is predicted, and all of its own but the last.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from grpo_jax.models import KeyValues, Owner, Transformer, apply
from grpo_jax.models.attention import NOWHERE
from grpo_jax.sharding import anchor
from grpo_jax.types import Batch, Params, Prompts

NOBODY = -1  # owner of the columns that nothing stands in


class Packing(NamedTuple):
    """Which completion token of its shard a column predicts; one behind the last: none.

    Tokens of a shard are numbered row by row, all T columns of each.
    """

    source: jax.Array  # i32[bundles, shards, sequences, T]
    used: jax.Array  # i32[], bundles that hold any token


class Sequences(NamedTuple):
    """One bundle of sequences, N over all shards."""

    part: Batch  # arrays [N, 1, T]; without prompts and what belongs to whole rows
    tokens: jax.Array  # i32[N, T], what is read
    positions: jax.Array  # i32[N, T]
    row: jax.Array  # i32[N, T], row of the shard or NOBODY
    group: jax.Array  # i32[N, T], group of the shard or NOBODY
    prompts: Prompts  # of the whole microbatch
    shards: int


def pack(mask: jax.Array, shards: int, sequences: int) -> Packing:
    """Puts the completions into sequences, the longest first, each where it first fits.

    Each shard packs its own.

    Args:
      mask: bool[m, G, T], true up to a row's end.
      shards: the microbatch is spread over.
      sequences: of a bundle, per shard.
    """
    columns = mask.shape[-1]
    rows = mask.shape[0] * mask.shape[1] // shards
    most = -(-rows // sequences) * sequences

    def one(lengths):
        order = jnp.argsort(-lengths, stable=True)

        def place(filled, row):
            sequence = jnp.argmax(filled + lengths[row] <= columns)
            return filled.at[sequence].add(lengths[row]), (sequence, filled[sequence])

        filled, (sequence, start) = jax.lax.scan(place, jnp.zeros(most, jnp.int32), order)
        t = jnp.arange(columns)
        to = (sequence * columns + start)[:, None] + t
        to = jnp.where(t < lengths[order][:, None], to, most * columns)
        source = jnp.full(most * columns, rows * columns)
        source = source.at[to].set(order[:, None] * columns + t, mode='drop')
        return source.reshape(-1, sequences, columns), (filled > 0).sum()

    source, used = jax.vmap(one)(mask.sum(-1).reshape(shards, rows))
    return Packing(source.swapaxes(0, 1), -(-used.max() // sequences))


def take(part: Batch, source: jax.Array) -> Sequences:
    """What the sequences of one bundle hold.

    Args:
      part: a microbatch.
      source: i32[shards, sequences, T], see `Packing`.
    """
    rollout = part.rollout
    prompts, (_, group_size, columns) = rollout.prompts, rollout.mask.shape
    shards = len(source)
    total = rollout.mask.size // shards
    index = jnp.minimum(source, total - 1)
    there = source < total
    row = index // columns
    group = row // group_size

    def from_shares(x, i):
        """Entries i32[shards, sequences, T] of each share of x [shards * n, ...]."""
        x = x.reshape(shards, -1, *x.shape[1:])
        return anchor(jax.vmap(lambda share, i: share[i])(x, i).reshape(-1, columns))

    def of_tokens(x):
        return from_shares(x.reshape(-1), index)[:, None]

    def of_group(x):
        return from_shares(x, group)

    nothing: Any = None
    held = part.per_token()
    held = held._replace(rollout=held.rollout._replace(mask=nothing))
    held = jax.tree.map(of_tokens, held)
    here = anchor(there.reshape(-1, 1, columns))
    held = held._replace(rollout=held.rollout._replace(mask=here))
    t = (index % columns).reshape(-1, columns)
    last = jnp.take_along_axis(prompts.tokens, prompts.length[:, None] - 1, 1)[:, 0]
    before = from_shares(rollout.tokens.reshape(-1), jnp.maximum(index - 1, 0))
    owner = [jnp.where(here[:, 0], x.reshape(-1, columns), NOBODY) for x in (row, group)]
    return Sequences(
        held,
        tokens=jnp.where(t > 0, before, of_group(last)),
        positions=of_group(prompts.length) - 1 + t,
        row=owner[0],
        group=owner[1],
        prompts=prompts,
        shards=shards,
    )


def hidden(model: Transformer, params: Params, prompt: KeyValues, some: Sequences) -> jax.Array:
    """States [N, 1, T, D] that predict the columns' tokens.

    Args:
      model: the decoder.
      params: its parameters.
      prompt: [L, m, K, P, h] of the microbatch.
      some: of `take`.
    """
    groups, width = some.prompts.tokens.shape
    each = groups // some.shards  # prompts of a shard, one behind the other
    sequences = len(some.tokens) // some.shards

    def spread(x):
        """[shards, ...] for each sequence: [N, ...]."""
        return anchor(jnp.repeat(x, sequences, axis=0))

    def all_prompts(x):
        x = x.reshape(len(x), some.shards, each, *x.shape[2:]).swapaxes(2, 3)
        x = x.reshape(*x.shape[:3], each * width, -1)
        return jax.vmap(spread)(x)

    columns = jnp.arange(width)
    # The last token of a prompt is read once more in front of each completion.
    positions = jnp.where(columns < some.prompts.length[:, None] - 1, columns, NOWHERE)
    owner = jnp.repeat(jnp.arange(each), width)
    owners = (
        Owner(jnp.broadcast_to(owner, (len(some.tokens), each * width)), some.group),
        Owner(some.row, some.row),
    )
    read = apply(
        model, params, some.tokens, some.positions, KeyValues(*map(all_prompts, prompt)),
        spread(positions.reshape(some.shards, -1)), owners, method='extend_packed',
    )  # fmt: skip
    return read[:, None]


def put_back(whole: jax.Array, new: jax.Array, source: jax.Array) -> jax.Array:
    """Writes what was found for the columns of a bundle, [N, 1, T], to their rows: [m, G, T]."""
    shards = len(source)
    flat = whole.reshape(shards, -1)
    new, source = new.reshape(shards, -1), source.reshape(shards, -1)
    write = jax.vmap(lambda x, i, y: x.at[i].set(y, mode='drop'))
    return anchor(write(flat, source, new).reshape(whole.shape))
