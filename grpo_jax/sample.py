"""Sampling a group of completions for each prompt: prefill once per prompt, decode [B, G] rows.

Rows are decoded in blocks of columns. Between two blocks the keys and values grow by one block, and
rows that have ended are left out: no step reads columns that are still empty, and the rows that
nobody waits for any more cost nothing.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from grpo_jax import sharding
from grpo_jax.distribution import draw, row_keys
from grpo_jax.models import KeyValues, Transformer, apply
from grpo_jax.types import Array, Params, Prompts, Rollout, Sampling

BLOCK, BLOCKS = 64, 8  # least columns of a block, and most blocks


class _Given(NamedTuple):
    """What stays the same while completions are decoded."""

    params: Params
    prompts: Prompts
    prompt: KeyValues  # [L, B, K, P, h]
    sampling: Sampling
    eos_ids: Array
    stops: Array | None


class _Rows(NamedTuple):
    """The R rows of each group that are still decoded."""

    place: jax.Array  # i32[B, R], which of its group's completions a row is
    key: jax.Array  # [B, R]
    token: jax.Array  # i32[B, R], the last one drawn
    done: jax.Array  # bool[B, R]
    matched: jax.Array  # i32[B, R], state in the table of stop strings
    own: KeyValues  # [L, B, R, K, columns, h]


class _Columns(NamedTuple):
    """What was drawn."""

    tokens: jax.Array  # i32[B, R, n]
    mask: jax.Array  # bool[B, R, n]
    logprobs: jax.Array  # f32[B, R, n]


class _State(NamedTuple):
    """Between two blocks."""

    t: jax.Array  # i32[], columns drawn so far
    rows: _Rows
    drawn: _Columns  # [B, G, T]
    ended: jax.Array  # bool[B, G]
    live: jax.Array  # i32[], the most rows of a group that have not ended


def sample(
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
) -> Rollout:
    """Samples `group_size` completions of each prompt.

    Each prompt is prefilled once, whatever the group size. Decoding ends when every row has ended.
    After each block of columns the host looks how many rows still go on, and halves the rows of a
    group as long as all of these remain; up to `block` columns the whole is one program that can be
    traced.

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
      block: columns of a block, 0: 64, or an eighth of T if that is more. It changes no
        completion.

    Returns:
      Rollout of [B, G, T] arrays. Tokens after the end are 0 and masked; the one that ends is not.
    """
    block = block or _block(max_tokens)
    params = _compute_copy(params, model.config.dtype)
    given, state = _first_block(
        model, params, prompts, seed, step, sampling, eos_ids, stops, group_size=group_size,
        max_tokens=max_tokens, width=min(block, max_tokens), mesh=mesh,
    )  # fmt: skip
    for width in range(2 * block, max_tokens + block, block):
        live = int(state.live)
        if not live:
            break
        size = state.rows.done.shape[1]
        fewer = _fewest(live, group_size)
        if fewer < size:
            state = _leave_out(state, fewer, mesh)
        state = _next_block(model, params, given, state, min(width, max_tokens), mesh)
    drawn = state.drawn
    return Rollout(prompts, drawn.tokens, drawn.mask, drawn.logprobs, state.ended)


def _block(max_tokens: int) -> int:
    return max(BLOCK, -(-max_tokens // BLOCKS))


def _fewest(live: int, group_size: int) -> int:
    """The smallest of G, G / 2, G / 4, ... (rounded up) that holds `live` rows."""
    size = group_size
    while -(-size // 2) >= live and size > 1:
        size = -(-size // 2)
    return size


def _compute_copy(params: Params, dtype: str) -> Params:
    """Matrices in the computation's dtype: cast once, not in every decode step.

    Norm scales stay as they are, since they are used in float32.
    """

    def cast(tree):
        return jax.tree_util.tree_map_with_path(
            lambda path, x: x if path[-1].key == 'scale' else x.astype(dtype), tree
        )

    same = jax.tree.map(lambda x, y: x.dtype == y.dtype, params, jax.eval_shape(cast, params))
    return params if all(jax.tree.leaves(same)) else jax.jit(cast)(params)


@functools.partial(jax.jit, static_argnames=('model', 'group_size', 'max_tokens', 'width', 'mesh'))
def _first_block(
    model, params, prompts, seed, step, sampling, eos_ids, stops, *, group_size: int,
    max_tokens: int, width: int, mesh: Mesh | None,
) -> tuple[Any, _State]:  # fmt: skip
    """Reads the prompts and decodes columns up to `width`."""
    with sharding.use(mesh):
        keys = row_keys(seed, step, prompts.index, group_size)
        prompt, last = apply(model, params, prompts.tokens, prompts.length, method='prefill')
        given = _Given(params, prompts, prompt, sampling, eos_ids, stops)
        rows = _Rows(
            place=jnp.broadcast_to(jnp.arange(group_size), keys.shape),
            key=keys,
            token=jnp.zeros(keys.shape, jnp.int32),
            done=jnp.zeros(keys.shape, bool),
            matched=jnp.zeros(keys.shape, jnp.int32),
            own=_no_cache(model, keys.shape),
        )
        hidden = jnp.broadcast_to(last[:, None], (*keys.shape, last.shape[-1]))
        rows, column = _pick(model, given, hidden, jnp.int32(0), rows)
        state = _State(
            t=jnp.int32(1),
            rows=rows,
            drawn=jax.tree.map(lambda x: _padded(x, max_tokens), column),
            ended=rows.done,
            live=jnp.int32(group_size),
        )
        return given._replace(params=None), _decode(model, given, state, 0, width)


@functools.partial(jax.jit, static_argnames=('model', 'width', 'mesh'))
def _next_block(model, params, given, state, width: int, mesh: Mesh | None) -> _State:
    """Decodes on to column `width`."""
    with sharding.use(mesh):
        start = state.rows.own.k.shape[-2]
        return _decode(model, given._replace(params=params), state, start, width)


@functools.partial(jax.jit, static_argnames=('size', 'mesh'))
def _leave_out(state: _State, size: int, mesh: Mesh | None) -> _State:
    """Keeps `size` rows of each group, those that go on among them."""
    kept = jnp.argsort(state.rows.done, axis=1, stable=True)[:, :size]

    def take(x):
        return jax.vmap(lambda x, i: x[i])(x, kept)

    nothing: Any = None
    with sharding.use(mesh):
        few = jax.tree.map(take, state.rows._replace(own=nothing))
        own = jax.tree.map(jax.vmap(take), state.rows.own)
        return state._replace(rows=few._replace(own=own))


def _decode(model, given: _Given, state: _State, start: int, width: int) -> _State:
    """Columns from state.t on, to the end of the block [start, width) or of all rows."""
    rows = state.rows
    rows = rows._replace(own=jax.tree.map(lambda x: _padded(x, width, axis=-2), rows.own))
    drawn = jax.tree.map(
        lambda x: jax.vmap(lambda x, i: x[i, start:width])(x, rows.place), state.drawn
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
            lambda x, y: jax.lax.dynamic_update_slice_in_dim(x, y, t - start, axis=2),
            drawn,
            column,
        )
        return t + 1, rows, drawn

    t, rows, drawn = jax.lax.while_loop(
        lambda carry: (carry[0] < width) & ~carry[1].done.all(), advance, (state.t, rows, drawn)
    )

    def write(whole, new, place):
        return whole.at[place, start:width].set(new)

    return _State(
        t=t,
        rows=rows,
        drawn=jax.tree.map(
            lambda whole, new: jax.vmap(write)(whole, new, rows.place), state.drawn, drawn
        ),
        ended=jax.vmap(lambda x, i, done: x.at[i].set(done))(state.ended, rows.place, rows.done),
        live=(~rows.done).sum(1).max(),
    )


def _pick(model, given: _Given, hidden, t, rows: _Rows) -> tuple[_Rows, _Columns]:
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
    return rows, _Columns(token[..., None], live[..., None], logprob[..., None])


def _padded(x: jax.Array, size: int, axis: int = 2) -> jax.Array:
    """Zeros behind the end of an axis."""
    widths = [(0, 0)] * x.ndim
    widths[axis] = (0, size - x.shape[axis])
    return jnp.pad(x, widths)


def _no_cache(model: Transformer, shape: tuple[int, ...]) -> KeyValues:
    """Keys and values of no columns of `shape` [B, G] rows."""
    c = model.config
    empty = jnp.zeros((c.layers, *shape, c.kv_heads, 0, c.head_dim), c.dtype)
    return KeyValues(empty, empty)
