"""The compiled programs of the sampler: prefill, and blocks of decoded columns."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Int, Shaped, UInt

from grpo_jax import sharding
from grpo_jax.engine import columns
from grpo_jax.engine.compaction import (
    DecodeInputs,
    DecodeState,
    Drawn,
    Slots,
    count_live,
    put_slots,
    slot_numbers,
    take_slots,
)
from grpo_jax.engine.support import pack
from grpo_jax.engine.token_sampling import (
    RECORDS,
    check_record,
    check_sampling,
    completion_keys,
    draw,
)
from grpo_jax.models import KeyValues, ModelConfig, Transformer, apply
from grpo_jax.models.routing import apply_recording, at_last_token
from grpo_jax.sharding import data_devices
from grpo_jax.types import Params, Prompts, Rollout, Sampling

BLOCK, BLOCKS = 64, 8  # fewest columns of a block, and most blocks
WEIGHTS = ('model', 'int8')

Thresholds = tuple[Int[Array, ''], Int[Array, '']]  # see `compaction.compaction_thresholds`


def check_options(
    config: ModelConfig,
    mesh: Mesh | None,
    sampling: Sampling,
    weights: str,
    record: tuple[str, ...],
    **sizes: int,
) -> None:
    """Checks the options of `algorithm.sample`.

    Raises:
      ValueError: unknown weights or record, a size or sampling option out of range, or heads that
        the mesh does not divide. Traced sampling options are not checked.
    """
    sharding.check_heads(config.heads, config.kv_heads, mesh)
    if weights not in WEIGHTS:
        raise ValueError(f'weights={weights!r} is unknown: use one of {", ".join(WEIGHTS)}')
    for name, value in sizes.items():
        least = 0 if name == 'block' else 1
        if value < least:
            raise ValueError(f'{name}={value} is out of range: make it at least {least}')
    if all(isinstance(value, int | float | None) for value in sampling):
        check_sampling(sampling, greedy=True)
        check_record(record, sampling, config.experts)


def block_size(max_tokens: int, *, in_place: bool) -> int:
    """Columns of a block: at least `BLOCK`, and so many that there are at most `BLOCKS` blocks.

    There are at most two where attention skips the empty columns of the cache (`in_place`), since
    growing the cache saves nothing there.
    """
    return max(BLOCK, -(-max_tokens // (2 if in_place else BLOCKS)))


@functools.partial(jax.jit, static_argnames=(
    'model', 'group_size', 'max_tokens', 'width', 'record', 'mesh', 'turns'))  # fmt: skip
def first_block(
    model: Transformer, inputs: DecodeInputs, seed: Int[Array, ''], step: Int[Array, ''],
    thresholds: Thresholds, *, group_size: int, max_tokens: int, width: int,
    record: tuple[str, ...], mesh: Mesh | None, turns: bool = False,
) -> tuple[DecodeInputs, UInt[Array, 'B P L k'] | None, Slots, DecodeState]:  # fmt: skip
    """Prefills the prompts and decodes columns up to `width`.

    Args:
      model: the decoder.
      inputs: without the prompts' cache.
      seed: i32[], the seed of the run.
      step: i32[], the training step.
      thresholds: see `_decode_columns`.
      group_size: G.
      max_tokens: T.
      width: columns to decode, at most T.
      record: which of `RECORDS` the rollout holds.
      mesh: the devices.
      turns: each completion has a column of its own, since an environment replies to its turns.

    Returns:
      The inputs with the prompts' cache and without parameters, the routing of the prompts if it is
      recorded, the slots, and the state. Where the mesh splits groups, inputs, slots and state are
      those of slices of groups, see `sharding.split_groups`.
    """
    prompts = inputs.prompts
    slices = sharding.slices_of(len(prompts.index), group_size, mesh)
    with sharding.use(mesh):
        keys = completion_keys(seed, step, prompts.index, group_size)
        keys, prompts = sharding.split_groups((keys, prompts), slices, mesh)
        (cache, last), routing = run_recording(
            record, model, inputs.params, prompts.tokens, prompts.length, method='prefill'
        )
        if routing is not None:
            routing = routing.reshape(*prompts.tokens.shape, *routing.shape[1:])
            prompts = prompts._replace(routing=routing)
            routing = jnp.repeat(at_last_token(routing, prompts.length), keys.shape[1], axis=0)
        inputs = inputs._replace(cache=cache, prompts=prompts)
        slots = Slots(
            place=slot_numbers(keys.shape, mesh),
            key=keys,
            token=jnp.zeros(keys.shape, jnp.int32),
            done=jnp.zeros(keys.shape, bool),
            stop_state=jnp.zeros(keys.shape, jnp.int32),
            cache=_empty_cache(model, keys.shape, width),
        )
        hidden = jnp.broadcast_to(last[:, None], (*keys.shape, last.shape[-1]))
        t = jnp.zeros(keys.shape, jnp.int32) if turns else jnp.int32(0)
        slots, column = _draw_column(model, inputs, hidden, t, slots, ~slots.done)
        column = _recorded(column, record, routing)
        drawn = jax.tree.map(lambda x: _padded(x, max_tokens), column)
        state = DecodeState(t + 1, drawn, slots.done, count_live(~slots.done, mesh))
        slots, state = _decode_columns(
            model, inputs, slots, state, thresholds, width=width, mesh=mesh
        )
        routing = sharding.join_groups(inputs.prompts, slices, mesh).routing
        prompts = inputs.prompts._replace(routing=None)
        return inputs._replace(params=None, prompts=prompts), routing, slots, state


@functools.partial(jax.jit, static_argnames=('model', 'width', 'mesh'), donate_argnames='slots')
def next_block(
    model: Transformer, params: Params, inputs: DecodeInputs, slots: Slots, state: DecodeState,
    thresholds: Thresholds, *, width: int, mesh: Mesh | None, steps: Int[Array, ''] | None = None,
) -> tuple[Slots, DecodeState]:  # fmt: skip
    """Continues decoding up to column `width`, and `steps` tokens of each completion at most."""
    with sharding.use(mesh):
        inputs = inputs._replace(params=params)
        return _decode_columns(
            model, inputs, slots, state, thresholds, width=width, mesh=mesh, steps=steps
        )


def rollout_so_far(
    prompts: Prompts, state: DecodeState, group_size: int, mesh: Mesh | None
) -> Rollout:
    """The rollout [B, G, T] between two blocks."""
    slices = group_size // state.ended.shape[1]
    drawn, ended = state.drawn, state.ended
    if slices > 1:
        drawn, ended = _join_groups((drawn, ended), slices, mesh)
    return Rollout(prompts, ended=ended, **drawn._asdict())


_join_groups = jax.jit(sharding.join_groups, static_argnames=('slices', 'mesh'))


@functools.partial(jax.jit, static_argnames='width')
def grow_cache(cache: Shaped[Array, 'L B R K n h'], width: int) -> Shaped[Array, 'L B R K width h']:
    """Pads one array of the completions' caches to `width` columns."""
    return _padded(cache, width, axis=-2)


# Columns so far, the slots and their tokens, and how many columns may follow.
_Decoding = tuple[Int[Array, '*rows'], Slots, Drawn, Int[Array, ''] | None]


def _decode_columns(
    model: Transformer, inputs: DecodeInputs, slots: Slots, state: DecodeState,
    thresholds: Thresholds, *, width: int, mesh: Mesh | None, steps: Int[Array, ''] | None = None,
) -> tuple[Slots, DecodeState]:  # fmt: skip
    """Decodes columns from state.t up to `width`, or until few slots are live.

    `thresholds` are those of `compaction.compaction_thresholds`: decoding stops once no group has
    more live slots than the first, or no device has more than the second. It also stops when any
    live slot needs column `width`, or after `steps` columns.
    """
    place = slots.place.reshape(data_devices(mesh), -1)
    record = tuple(name for name in RECORDS if getattr(state.drawn, name) is not None)
    last = state.drawn.tokens.shape[2]

    def of_slots(x: jax.Array) -> jax.Array:
        return take_slots(x, place).reshape(*slots.done.shape, *x.shape[2:])

    def advance(carry: _Decoding) -> _Decoding:
        t, slots, drawn, steps = carry
        (hidden, new), routing = run_recording(
            record, model, inputs.params, slots.token, t - 1, inputs.cache,
            inputs.prompts.length, slots.cache, method='decode',
        )  # fmt: skip
        cache = jax.tree.map(lambda x, y: columns.write_cache(x, y, t - 1), slots.cache, new)
        live = columns.live(slots.done, t, last)
        slots, column = _draw_column(model, inputs, hidden, t, slots._replace(cache=cache), live)
        column = _recorded(column, record, routing)
        drawn = jax.tree.map(lambda x, y: columns.write_tokens(x, y, t, live), drawn, column)
        t = t + live if t.ndim else t + 1
        return t, slots, drawn, None if steps is None else steps - 1

    def enough_live(carry: _Decoding) -> Bool[Array, '']:
        t, slots, _, steps = carry
        live = columns.live(slots.done, t, last)
        go_on = columns.furthest(t, live) < width
        go_on &= (count_live(live, mesh) > jnp.asarray(thresholds)).all()
        return go_on if steps is None else go_on & (steps > 0)

    drawn = jax.tree.map(lambda x: of_slots(x[:, :, :width]), state.drawn)
    t = of_slots(state.t) if state.t.ndim else state.t
    t, slots, drawn, _ = jax.lax.while_loop(enough_live, advance, (t, slots, drawn, steps))

    def write(whole: jax.Array, new: jax.Array) -> jax.Array:
        return whole.at[:, :, :width].set(put_slots(whole[:, :, :width], place, new))

    drawn = jax.tree.map(write, state.drawn, drawn)
    ended = put_slots(state.ended, place, slots.done)
    live = count_live(columns.live(slots.done, t, last), mesh)
    t = put_slots(state.t, place, t) if t.ndim else t
    return slots, in_place(DecodeState(t, drawn, ended, live), mesh)


def in_place(state: DecodeState, mesh: Mesh | None) -> DecodeState:
    """The state with a device's completions on that device, and the counts on all devices."""
    if mesh is None:
        return state
    split, everywhere = sharding.groups(mesh), sharding.replicated(mesh)
    drawn: Any = jax.tree.map(lambda _: split, state.drawn)
    t = split if state.t.ndim else everywhere
    where = DecodeState(t, drawn, split, everywhere)  # type: ignore[arg-type]
    return jax.lax.with_sharding_constraint(state, where)


def _draw_column(
    model: Transformer, inputs: DecodeInputs, hidden: Shaped[Array, 'B R D'],
    t: Int[Array, '*rows'], slots: Slots, live: Bool[Array, 'B R'],
) -> tuple[Slots, Drawn]:  # fmt: skip
    """Draws column t of the live slots from the hidden states that predict it."""
    shape = slots.done.shape
    logits = apply(model, inputs.params, hidden, method='logits')
    keys = columns.token_keys(slots.key.reshape(-1), t)
    token, logprob, kept = draw(keys, logits.reshape(len(keys), -1), inputs.sampling)
    token = jnp.where(live, token.reshape(shape), 0)
    logprob = jnp.where(live, logprob.reshape(shape), 0.0)
    ends = (token[..., None] == inputs.eos_ids).any(-1)
    stop_state = slots.stop_state
    if inputs.stops is not None:
        stop_state = inputs.stops[stop_state, token].astype(jnp.int32)
        ends |= stop_state == len(inputs.stops) - 1
    column = Drawn(
        token[..., None], live[..., None], logprob[..., None], pack(kept).reshape(*shape, 1, -1),
        routing=None,
    )  # fmt: skip
    if t.ndim:  # the reply to a turn is read after its last token
        column = column._replace(trained=live[..., None])
        token = jnp.where(live, token, slots.token)
        stop_state = jnp.where(live, stop_state, slots.stop_state)
    slots = slots._replace(token=token, done=slots.done | (live & ends), stop_state=stop_state)
    return slots, column


def run_recording(
    record: tuple[str, ...], model: Transformer, params: Params, *args: Any, method: str
) -> tuple[Any, UInt[Array, 'N L k'] | None]:
    """Calls a method, and returns the routing of the tokens that it processes, if recorded."""
    if 'routing' not in record:
        return apply(model, params, *args, method=method), None
    return apply_recording(model, params, *args, method=method)


def _recorded(
    column: Drawn, record: tuple[str, ...], routing: UInt[Array, 'N L k'] | None
) -> Drawn:
    """A column with what is recorded of it."""
    if routing is not None:
        routing = routing.reshape(*column.tokens.shape, *routing.shape[1:])
    return column._replace(support=column.support if 'support' in record else None, routing=routing)


def _padded(x: jax.Array, size: int, axis: int = 2) -> jax.Array:
    """Pads the end of an axis with zeros."""
    widths = [(0, 0)] * x.ndim
    widths[axis] = (0, size - x.shape[axis])
    return jnp.pad(x, widths)


def _empty_cache(model: Transformer, shape: tuple[int, ...], columns: int) -> KeyValues:
    """Zeros for the keys and values of `shape` [B, G] completions."""
    c = model.config
    empty = jnp.zeros((c.layers, *shape, c.kv_heads, columns, c.head_dim), c.dtype)
    return KeyValues(empty, empty)
