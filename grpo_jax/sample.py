"""Sampling a group of completions for each prompt: prefill once per prompt, decode [B, G] rows.

Rows are decoded in blocks of columns, before each of which the keys and values grow: no step reads
columns that are still empty. As soon as so many rows have ended that a smaller program holds the
others, decoding stops and goes on with that: rows that nobody waits for cost next to nothing. Few
rows of many groups are decoded one by one, each with its own copy of the prompt's keys, once these
are no more than what was left out.
"""

import collections
import functools
from collections.abc import Callable, Iterable, Iterator
from typing import Any, ParamSpec

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from grpo_jax import models, sharding
from grpo_jax.distribution import check_sampling, draw, row_keys
from grpo_jax.models import KeyValues, Quantized, Transformer, apply, quantized, unstacked
from grpo_jax.rows import (
    NOBODY,
    Columns,
    Given,
    Rows,
    Shape,
    State,
    devices,
    enough,
    fewest,
    leave_out,
    live,
    numbers,
    put_rows,
    shape_of,
    take_rows,
)
from grpo_jax.types import Array, Params, Prompts, Rollout, Sampling

BLOCK, BLOCKS = 64, 8  # least columns of a block, and most blocks
WEIGHTS = ('model', 'int8')
_P = ParamSpec('_P')


def blocks(
    model: Transformer,
    params: Params,
    prompts: Prompts,
    *,
    seed: Array,
    step: Array,
    sampling: Sampling,
    eos_ids: Array,
    group_size: int,
    max_tokens: int,
    stops: Array | None = None,
    mesh: Mesh | None = None,
    block: int = 0,
    weights: str = 'model',
    unroll: bool | None = None,
) -> Iterator[Rollout]:
    """Samples `group_size` completions of each prompt, a block of columns at a time.

    Each prompt is prefilled once, whatever the group size. Decoding ends when every row has ended.
    A block is left early when so few rows go on that `rows.fewest` has a smaller shape for them,
    half of each group at first, and the rest of the block is decoded in that. Up to `block` columns
    the whole is one program with all rows, which can be traced.

    Args:
      model: the decoder.
      params: its parameters.
      prompts: tokens [B, P], lengths and data-set rows.
      seed: i32[], the run's seed.
      step: i32[], the training step (see `distribution.row_keys`).
      sampling: the distribution of the next token; all its values are traced.
      eos_ids: i32[E], tokens that end a completion.
      group_size: G.
      max_tokens: T.
      stops: [states, V] from `tokens.stop_table`, where strings end a completion as well.
      mesh: the devices; with one, prompts lie as `sharding.groups` says.
      block: columns of a block, 0: 64, or an eighth of T if that is more, or half of T where
        attention reads no columns but those that hold tokens. It changes no completion.
      weights: 'model', or 'int8': matrices are quantised first (`models.quantized`), and tokens and
        log-probs are those of the model that this makes.
      unroll: take each layer's matrices out of their stack first, a copy, and compile all layers;
        None: where attention is `flash.attend_token`, so on NVIDIA GPUs, which would otherwise take
        them out for every token. CPUs would copy keys and values.

    Yields:
      What there is after each block, or part of one, once that is dispatched: a Rollout of
      [B, G, T] arrays, of which the last is whole. By then what came before has been decoded, so
      whoever reads those completions keeps no device waiting. Tokens after the end are 0 and
      masked; the one that ends is not.

    Raises:
      ValueError: unknown weights, or a number that is out of its range; values of `sampling` that
        are arrays are not looked at.
    """
    if weights not in WEIGHTS:
        raise ValueError(f'weights={weights!r} is unknown: use one of {", ".join(WEIGHTS)}')
    for name, value, least in (
        ('group_size', group_size, 1),
        ('max_tokens', max_tokens, 1),
        ('block', block, 0),
    ):
        if value < least:
            raise ValueError(f'{name}={value}: make it at least {least}')
    if all(isinstance(value, int | float) for value in sampling):
        check_sampling(sampling, greedy=True)
    in_place = models.from_stacks(model.config)
    block = block or _block(max_tokens, most=2 if in_place else BLOCKS)
    unroll = in_place if unroll is None else unroll
    params = _compute_copy(params, model.config.dtype, weights, unroll)
    model = model.clone(unrolled=unroll)
    width, columns = min(block, max_tokens), prompts.tokens.shape[1]
    now = Shape(len(prompts.index) // devices(mesh), group_size)
    given, rows, state = _first_block(
        model, params, prompts, seed, step, sampling, eos_ids, stops,
        enough(now, columns, width) if width < max_tokens else NOBODY,
        group_size=group_size, max_tokens=max_tokens, width=width, mesh=mesh,
    )  # fmt: skip
    yield _rollout(prompts, state)
    if width == max_tokens:
        return  # what is traced has no numbers to look at
    while True:
        t, (most, total) = jax.device_get((state.t, state.live))
        if not most or t == max_tokens:
            return
        if t == width:
            width = min(width + block, max_tokens)
        now = shape_of(rows, mesh)
        fewer = fewest(most, total, now, columns, width)
        if fewer != now:
            given, rows = leave_out(given, rows, fewer, mesh)
        if rows.own.k.shape[-2] < width:
            rows = _grown(rows, width)
        rows, state = _next_block(
            model, params, given, rows, state, enough(fewer, columns, width), width=width, mesh=mesh
        )
        yield _rollout(prompts, state)


def _to_the_end(blocks: Callable[_P, Iterator[Rollout]]) -> Callable[_P, Rollout]:
    """All blocks at once."""

    @functools.wraps(blocks)
    def sample(*args: _P.args, **options: _P.kwargs) -> Rollout:
        return last(blocks(*args, **options))

    return sample


def last(blocks: Iterable[Rollout]) -> Rollout:
    """The whole rollout, the last of its `blocks`."""
    return collections.deque(blocks, maxlen=1).pop()


sample = _to_the_end(blocks)  # has the same arguments, and returns the whole rollout


def _rollout(prompts: Prompts, state: State) -> Rollout:
    drawn = state.drawn
    return Rollout(prompts, drawn.tokens, drawn.mask, drawn.logprobs, state.ended)


def _block(max_tokens: int, most: int) -> int:
    return max(BLOCK, -(-max_tokens // most))


def _compute_copy(params: Params, dtype: str, weights: str, unroll: bool) -> Params:
    """What is read in every decode step, converted once."""
    convert = functools.partial(_converted, dtype=dtype, weights=weights, unroll=unroll)
    before, after = jax.tree.leaves(params), jax.tree.leaves(jax.eval_shape(convert, params))
    same = [x.dtype for x in before] == [x.dtype for x in after]
    return params if same and not unroll else convert(params)


@functools.partial(jax.jit, static_argnames=('dtype', 'weights', 'unroll'))
def _converted(params: Params, dtype: str, weights: str, unroll: bool) -> Params:
    """Matrices in the computation's dtype or quantised, with `unroll` each layer's by themselves.

    Norm scales stay as they are, since they are used in float32.
    """

    def cast(path, x):
        return x if isinstance(x, Quantized) or path[-1].key == 'scale' else x.astype(dtype)

    params = quantized(params) if weights == 'int8' else params
    params = jax.tree_util.tree_map_with_path(
        cast, params, is_leaf=lambda x: isinstance(x, Quantized)
    )
    return unstacked(params) if unroll else params


@functools.partial(jax.jit, static_argnames=('model', 'group_size', 'max_tokens', 'width', 'mesh'))
def _first_block(
    model, params, prompts, seed, step, sampling, eos_ids, stops, until, *, group_size: int,
    max_tokens: int, width: int, mesh: Mesh | None,
) -> tuple[Any, Rows, State]:  # fmt: skip
    """Reads the prompts and decodes columns up to `width`."""
    with sharding.use(mesh):
        keys = row_keys(seed, step, prompts.index, group_size)
        prompt, last = apply(model, params, prompts.tokens, prompts.length, method='prefill')
        given = Given(params, prompts, prompt, sampling, eos_ids, stops)
        rows = Rows(
            place=numbers(keys.shape, mesh),
            key=keys,
            token=jnp.zeros(keys.shape, jnp.int32),
            done=jnp.zeros(keys.shape, bool),
            matched=jnp.zeros(keys.shape, jnp.int32),
            own=_empty_cache(model, keys.shape, width),
        )
        hidden = jnp.broadcast_to(last[:, None], (*keys.shape, last.shape[-1]))
        rows, column = _pick(model, given, hidden, jnp.int32(0), rows)
        drawn = jax.tree.map(lambda x: _padded(x, max_tokens), column)
        state = State(jnp.int32(1), drawn, rows.done, live(rows, mesh))
        rows, state = _decode(model, given, rows, state, until, width, mesh)
        return given._replace(params=None), rows, state


@functools.partial(jax.jit, static_argnames=('model', 'width', 'mesh'), donate_argnames='rows')
def _next_block(
    model, params, given, rows, state, until, *, width: int, mesh: Mesh | None
) -> tuple[Rows, State]:
    """Decodes on to column `width`."""
    with sharding.use(mesh):
        given = given._replace(params=params)
        return _decode(model, given, rows, state, until, width, mesh)


@functools.partial(jax.jit, static_argnames='width')
def _grown(rows: Rows, width: int) -> Rows:
    """With keys and values of so many columns."""
    return rows._replace(own=jax.tree.map(lambda x: _padded(x, width, axis=-2), rows.own))


def _decode(
    model, given: Given, rows: Rows, state: State, until, width: int, mesh: Mesh | None
) -> tuple[Rows, State]:
    """Columns from state.t on, up to `width` or until few rows go on, `until` of `enough`."""
    place = rows.place.reshape(devices(mesh), -1)
    drawn = jax.tree.map(
        lambda x: take_rows(x[..., :width], place).reshape(*rows.done.shape, -1), state.drawn
    )

    def advance(carry):
        t, rows, drawn = carry
        hidden, new = apply(
            model, given.params, rows.token, t - 1, given.prompt, given.prompts.length, rows.own,
            method='decode',
        )  # fmt: skip
        own = jax.tree.map(
            lambda cache, x: jax.lax.dynamic_update_slice_in_dim(cache, x, t - 1, axis=4),
            rows.own,
            new,
        )
        rows, column = _pick(model, given, hidden, t, rows._replace(own=own))
        drawn = jax.tree.map(
            lambda x, y: jax.lax.dynamic_update_slice_in_dim(x, y, t, axis=2),
            drawn,
            column,
        )
        return t + 1, rows, drawn

    t, rows, drawn = jax.lax.while_loop(
        lambda carry: (carry[0] < width) & (live(carry[1], mesh) > jnp.asarray(until)).all(),
        advance,
        (state.t, rows, drawn),
    )

    def columns(whole, new):
        return whole.at[..., :width].set(put_rows(whole[..., :width], place, new))

    drawn = jax.tree.map(columns, state.drawn, drawn)
    return rows, State(t, drawn, put_rows(state.ended, place, rows.done), live(rows, mesh))


def _pick(model, given: Given, hidden, t, rows: Rows) -> tuple[Rows, Columns]:
    """Draws column t from hidden states [B, R, D]."""
    shape = rows.done.shape
    logits = apply(model, given.params, hidden, method='logits')
    folded = jax.vmap(lambda key: jax.random.fold_in(key, t))(rows.key.reshape(-1))
    token, logprob = draw(folded, logits.reshape(len(folded), -1), given.sampling)
    live = ~rows.done
    token = jnp.where(live, token.reshape(shape), 0)
    logprob = jnp.where(live, logprob.reshape(shape), 0.0)
    ends = (token[..., None] == given.eos_ids).any(-1)
    matched = rows.matched
    if given.stops is not None:
        matched = given.stops[matched, token].astype(jnp.int32)
        ends |= matched == len(given.stops) - 1
    rows = rows._replace(token=token, done=rows.done | (live & ends), matched=matched)
    return rows, Columns(token[..., None], live[..., None], logprob[..., None])


def _padded(x: jax.Array, size: int, axis: int = 2) -> jax.Array:
    """Zeros behind the end of an axis."""
    widths = [(0, 0)] * x.ndim
    widths[axis] = (0, size - x.shape[axis])
    return jnp.pad(x, widths)


def _empty_cache(model: Transformer, shape: tuple[int, ...], columns: int) -> KeyValues:
    """Zeros for keys and values of `shape` [B, G] rows."""
    c = model.config
    empty = jnp.zeros((c.layers, *shape, c.kv_heads, columns, c.head_dim), c.dtype)
    return KeyValues(empty, empty)
