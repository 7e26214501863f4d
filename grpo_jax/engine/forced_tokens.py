"""Reading an environment's replies: their tokens are forced, in one pass over all of them.

A decode step would read them one at a time. Here the replies of several completions are processed
at once, over the caches of their prompts and of their earlier tokens, and decoding goes on after
them. The last token of a turn has not been read when the turn ends, so it is read first.
"""

import functools

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array, Int, Shaped

from grpo_jax import sharding
from grpo_jax.engine import columns
from grpo_jax.engine.compaction import (
    DecodeInputs,
    DecodeState,
    Slots,
    count_live,
    put_slots,
    take_slots,
)
from grpo_jax.engine.decode import in_place, run_recording
from grpo_jax.engine.token_sampling import RECORDS
from grpo_jax.models import KeyValues, Transformer
from grpo_jax.types import Params


@functools.partial(jax.jit, static_argnames=('model', 'rows', 'mesh'), donate_argnames='slots')
def force(
    model: Transformer, params: Params, inputs: DecodeInputs, slots: Slots, state: DecodeState,
    replies: tuple[Int[Array, 'devices n F'], Int[Array, 'devices n']], *, rows: int,
    mesh: Mesh | None,
) -> tuple[Slots, DecodeState]:  # fmt: skip
    """Appends replies to completions whose turns have ended, which then draw tokens again.

    Args:
      model: the decoder.
      params: its parameters.
      inputs: what is constant while completions are decoded.
      slots: of completions with a column each, and room for their replies in the caches.
      state: of the same.
      replies: tokens, and their numbers, of the n completions of each device; 0: no reply.
      rows: how many completions of a device are processed; at most so many may have a reply.
      mesh: the devices.

    Returns:
      Slots and state after the replies.
    """
    devices, per_group = len(replies[1]), slots.done.shape[1]
    place = slots.place.reshape(devices, -1)
    with sharding.use(mesh):
        has_reply = take_slots(replies[1], place).reshape(devices, -1) > 0
        # The slots with replies, then others, whose replies have no tokens: all are different.
        index = jnp.argsort(~has_reply, axis=1, stable=True)[:, :rows]
        numbers = jnp.take_along_axis(place, index, axis=1)  # of the completions
        tokens, count = (take_slots(x, numbers) for x in replies)
        t, group = take_slots(state.t, numbers), index // per_group

        def of_prompt(x: jax.Array) -> jax.Array:
            return take_slots(x[:, None], group)

        def of_slot(x: jax.Array) -> jax.Array:
            return take_slots(x, index)

        prompt = jax.tree.map(jax.vmap(of_prompt), inputs.cache)
        own = jax.tree.map(lambda x: jax.vmap(of_slot)(x)[:, :, None], slots.cache)
        read = jnp.concatenate([of_slot(slots.token)[:, None], tokens[:, :-1]], axis=1)
        new, routing = run_recording(
            tuple(name for name in RECORDS if getattr(state.drawn, name) is not None), model,
            params, read, t - 1, prompt, of_prompt(inputs.prompts.length), own,
            method='extend_cached',
        )  # fmt: skip
        cache = jax.tree.map(lambda x, y: _merge(x, y, t - 1, count, axis=4), own, new)

        def put(whole: jax.Array, values: jax.Array) -> jax.Array:
            return put_slots(whole, index, values)

        replied = count > 0
        last = jnp.take_along_axis(tokens, jnp.maximum(count - 1, 0)[:, None], axis=1)[:, 0]
        slots = slots._replace(
            token=put(slots.token, jnp.where(replied, last, of_slot(slots.token))),
            done=put(slots.done, of_slot(slots.done) & ~replied),
            stop_state=put(slots.stop_state, jnp.where(replied, 0, of_slot(slots.stop_state))),
            cache=jax.tree.map(
                jax.vmap(lambda whole, x: put(whole, x[:, 0])), slots.cache, KeyValues(*cache)
            ),
        )
        state = _recorded(state, numbers, (tokens, count), routing)
        t = take_slots(state.t, place).reshape(slots.done.shape)
        live = columns.live(slots.done, t, state.drawn.tokens.shape[2])
        return slots, in_place(state._replace(live=count_live(live, mesh)), mesh)


def _recorded(
    state: DecodeState,
    numbers: Int[Array, 'devices rows'],
    replies: tuple[Int[Array, 'n F'], Int[Array, ' n']],
    routing: Shaped[Array, 'm L k'] | None,
) -> DecodeState:
    """The state with the replies to some completions after their tokens."""
    tokens, count = replies
    t, drawn = take_slots(state.t, numbers), state.drawn

    def write(whole: jax.Array, new: jax.Array) -> jax.Array:
        merged = _merge(take_slots(whole, numbers), new, t, count, axis=1)
        return put_slots(whole, numbers, merged)

    drawn = drawn._replace(
        tokens=write(drawn.tokens, tokens),
        mask=write(drawn.mask, jnp.ones(tokens.shape, bool)),
    )
    if routing is not None and drawn.routing is not None:
        routing = routing.reshape(*tokens.shape, *routing.shape[1:])
        drawn = drawn._replace(routing=write(drawn.routing, routing))
    ended = take_slots(state.ended, numbers) & (count == 0)
    return state._replace(
        t=put_slots(state.t, numbers, t + count),
        drawn=drawn,
        ended=put_slots(state.ended, numbers, ended),
    )


def _merge(
    old: jax.Array, new: jax.Array, start: Int[Array, ' n'], count: Int[Array, ' n'], *, axis: int
) -> jax.Array:
    """Rows of `old` with the first `count` entries of the rows of `new` from `start` on.

    Args:
      old: n rows, on the axis 0, or on 1 where `axis` is a later one.
      new: like old, with F entries on `axis`.
      start: of each row.
      count: of each row.
      axis: of the entries.
    """
    rows = 0 if axis == 1 else 1
    shape = [1] * old.ndim
    shape[rows], shape[axis] = len(start), old.shape[axis]
    offset = jnp.arange(old.shape[axis]) - start[:, None]
    in_reply = (offset >= 0) & (offset < count[:, None])
    offset = jnp.clip(offset, 0, new.shape[axis] - 1).reshape(shape)
    return jnp.where(in_reply.reshape(shape), jnp.take_along_axis(new, offset, axis=axis), old)
