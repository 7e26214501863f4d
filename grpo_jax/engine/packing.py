"""Completions of different prompts packed one after another into sequences of T columns.

Where lengths differ, a microbatch is mostly padding even when its completions are sorted by length;
packed sequences hold almost none, and there are only as many as the tokens need. A token attends to
its own completion and its own prompt, as `models.Owners` describes. A completion of n tokens
takes n columns: the last token of its prompt, which predicts the first one, and all of its own but
the last.

A sequence holds completions of at most two prompts: every token is multiplied with all keys of its
sequence, so a third prompt would cost more than the columns that stay empty without it.
"""

import functools
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int, Shaped, UInt

from grpo_jax.engine import shares
from grpo_jax.engine.bundles import Carry, Outputs
from grpo_jax.models import (
    MASKED_POSITION,
    KeyValues,
    Owners,
    Transformer,
    apply_routed,
    last_tokens,
)
from grpo_jax.sharding import anchor
from grpo_jax.types import Array as AnyArray
from grpo_jax.types import Batch, Params, Prompts

if TYPE_CHECKING:
    from grpo_jax.engine.accumulate import BundleStep

_EMPTY_COLUMN = -1  # owner of a column without a token
_UNUSED_PROMPT = -2  # owner of the second prompt of a sequence that needs only one


class Packing(NamedTuple):
    """For each column the index of the token that it predicts; past the last index: none.

    The completion tokens of a shard are numbered completion by completion, T for each.
    """

    source: Int[Array, 'shards sequences T']
    used: Int[Array, '']  # sequences that hold a token on any shard


class Sequences(NamedTuple):
    """N packed sequences, over all shards."""

    part: Batch  # arrays [N, 1, T]; without prompts and what belongs to whole completions
    tokens: Int[Array, 'N T']  # the inputs
    positions: Int[Array, 'N T']
    visible: Int[Array, 'N T 2']  # owners that a token attends to: its completion and its prompt
    groups: Int[Array, 'shards sequences 2']  # of a sequence's prompts; the same twice if only one
    prompts: Prompts  # of the whole microbatch
    routing: UInt[Array, 'N T L k'] | None  # of the inputs, see `types.Rollout`


def over_sequences(
    step: 'BundleStep', carry: Carry, part: Batch, shards: int, size: int
) -> tuple[Carry, Outputs]:
    """Threads a carry through packed sequences: full bundles of `size`, then one by one.

    Args:
      step: `accumulate.BundleStep`.
      carry: its first value.
      part: a microbatch.
      shards: devices over which it is spread.
      size: sequences of a bundle, over all shards.

    Returns:
      The last carry, and outputs [m, G, T].
    """
    mask, size = part.rollout.mask, size // shards
    packing = pack(mask, shards)

    def bundle(carry: Carry, source: jax.Array) -> tuple[Carry, Outputs]:
        sequences = take(part, source)

        def hidden(model: Transformer, params: Params, prompts: KeyValues) -> jax.Array:
            return hidden_states(model, params, prompts, sequences)

        return step(carry, sequences.part, hidden)

    def add(count: int, i: jax.Array, state: tuple[Carry, Outputs]) -> tuple[Carry, Outputs]:
        carry, outputs = state
        source = jax.lax.dynamic_slice_in_dim(packing.source, i * count, count, axis=1)
        carry, new = bundle(carry, source)
        return carry, jax.tree.map(lambda x, y: put_back(x, y, source), outputs, new)

    _, shapes = jax.eval_shape(bundle, carry, packing.source[:, :size])
    empty = jax.tree.map(lambda x: jnp.zeros(mask.shape, x.dtype), shapes)
    full = packing.used // size
    state = jax.lax.fori_loop(0, full, functools.partial(add, size), (carry, empty))
    if size == 1:
        return state
    return jax.lax.fori_loop(full * size, packing.used, functools.partial(add, 1), state)


# i32[rows] each, of the sequences: filled columns, first group and last group.
_Filling = tuple[jax.Array, jax.Array, jax.Array]


def pack(mask: Bool[Array, 'm G T'], shards: int) -> Packing:
    """Packs the completions of each shard into sequences by first fit.

    Completions are placed group by group, each group's longest first, so that a sequence holds few
    groups. It never holds more than two.

    Args:
      mask: bool[m, G, T], true up to a completion's end.
      shards: devices over which the microbatch is spread.
    """
    _, group_size, columns = mask.shape
    rows = mask.shape[0] * group_size // shards

    def pack_shard(lengths: jax.Array) -> tuple[jax.Array, jax.Array]:
        groups = jnp.arange(rows) // group_size
        order = jnp.lexsort((-lengths, groups))

        def place(carry: _Filling, row: jax.Array) -> tuple[_Filling, tuple[jax.Array, jax.Array]]:
            filled, first, last = carry
            length, group = lengths[row], groups[row]
            accepts = (filled == 0) | (last == group) | (last == first)
            sequence = jnp.argmax(accepts & (filled + length <= columns))
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
        source = jnp.full(rows * columns, rows * columns, jnp.int32)
        source = source.at[to].set(order[:, None] * columns + t, mode='drop')
        return source.reshape(rows, columns), (filled > 0).sum()

    source, used = jax.vmap(pack_shard)(mask.sum(-1).reshape(shards, rows))
    return Packing(source, used.max())


def take(part: Batch, source: Int[Array, 'shards n T']) -> Sequences:
    """The sequences whose columns predict the tokens `source`."""
    rollout = part.rollout
    prompts, (_, group_size, columns) = rollout.prompts, rollout.mask.shape
    shards = len(source)
    total = rollout.mask.size // shards
    index = jnp.minimum(source, total - 1)
    present = source < total
    row = index // columns
    group = row // group_size

    def columns_of(x: AnyArray, i: jax.Array) -> jax.Array:
        return shares.take(x, i).reshape(-1, columns, *x.shape[1:])

    def of_tokens(x: AnyArray) -> jax.Array:
        return columns_of(x.reshape(-1, *x.shape[3:]), index)

    absent: Any = None
    packed = part.per_token()
    packed = packed._replace(rollout=packed.rollout._replace(mask=absent))
    packed = jax.tree.map(lambda x: of_tokens(x)[:, None], packed)
    mask = anchor(present.reshape(-1, 1, columns))
    packed = packed._replace(rollout=packed.rollout._replace(mask=mask))
    t = (index % columns).reshape(-1, columns)
    last = last_tokens(prompts.tokens, prompts.length)
    before = columns_of(rollout.tokens.reshape(-1), jnp.maximum(index - 1, 0))
    owners = jnp.stack([_completion_owner(row), _prompt_owner(group)], -1).reshape(-1, columns, 2)
    groups = len(rollout.mask) // shards
    ends = jnp.where(present, group, groups - 1).min(-1), jnp.where(present, group, 0).max(-1)
    return Sequences(
        packed,
        tokens=jnp.where(t > 0, before, columns_of(last, group)),
        positions=columns_of(prompts.length, group) - 1 + t,
        visible=jnp.where(mask[:, 0, :, None], owners, _EMPTY_COLUMN),
        groups=jnp.stack(ends, -1),
        prompts=prompts,
        routing=None if rollout.routing is None else of_tokens(rollout.routing),
    )


def hidden_states(
    model: Transformer, params: Params, prompt: KeyValues, sequences: Sequences
) -> Shaped[Array, 'N 1 T D']:
    """Hidden states that predict each column's token, from the prompts' cache [L, m, K, P, h]."""
    width = sequences.prompts.tokens.shape[1]

    def both(x: Shaped[Array, 'm K P h']) -> Shaped[Array, 'N K 2*P h']:
        """The keys or values of each sequence's two prompts."""
        x = shares.take(x, sequences.groups).swapaxes(-4, -3)
        return x.reshape(-1, x.shape[-4], 2 * width, x.shape[-1])

    # The last token of a prompt is not read from the cache, but is an input before each completion;
    # see `hidden_after_prompt`.
    columns = jnp.arange(width)
    length = sequences.prompts.length[:, None]
    positions = jnp.where(columns < length - 1, columns, MASKED_POSITION)
    positions = shares.take(positions, sequences.groups)
    only_one = sequences.groups[..., :1] == sequences.groups[..., 1:]
    first, second = (_prompt_owner(sequences.groups[..., i : i + 1]) for i in range(2))
    owner = jnp.concatenate([first, jnp.where(only_one, _UNUSED_PROMPT, second)], -1)
    owner = jnp.repeat(owner, width, axis=-1).reshape(-1, 2 * width)
    owners = Owners(
        jnp.concatenate([owner, sequences.visible[..., 0]], -1), sequences.visible
    )  # fmt: skip
    caches = KeyValues(*map(jax.vmap(both), prompt))
    hidden = apply_routed(
        model, params, sequences.routing, sequences.tokens, sequences.positions, caches,
        positions.reshape(-1, 2 * width), owners, method='extend_packed',
    )  # fmt: skip
    return hidden[:, None]


def put_back(
    whole: Shaped[Array, 'm G T'],
    new: Shaped[Array, 'N 1 T'],
    source: Int[Array, 'shards n T'],
) -> Shaped[Array, 'm G T']:
    """Writes outputs of a bundle's columns to the completions that they belong to."""
    index = source.reshape(len(source), -1)
    return shares.put(whole.reshape(-1), index, new.reshape(-1)).reshape(whole.shape)


def _prompt_owner(group: jax.Array) -> jax.Array:
    return 2 * group


def _completion_owner(row: jax.Array) -> jax.Array:
    """An odd number, so no prompt has it."""
    return 2 * row + 1
