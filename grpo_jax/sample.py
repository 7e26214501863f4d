"""Sampling a group of completions for each prompt: prefill once per prompt, decode [B, G] rows.

The token distribution lives here as well (`filter_logits`), because sampler and scorer must agree
on it: the log-probs that `sample` returns are those that `score.completion_logprobs` computes for
the same tokens.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from grpo_jax import sharding
from grpo_jax.models import KeyValues, Transformer, apply
from grpo_jax.types import Array, Params, Prompts, Rollout, Sampling

_BLOCK = 64  # tokens per block of the two-level inverse distribution function


def check_sampling(sampling: Sampling) -> None:
    """Raises ValueError for values from which no policy can be trained; call it outside of jit."""
    ranges = {
        'temperature': (sampling.temperature > 0, 'above 0 (greedy completions are all the same)'),
        'top_k': (sampling.top_k >= 0, 'at least 0 (0 keeps all tokens)'),
        'top_p': (0 < sampling.top_p <= 1, 'above 0 and at most 1'),
        'min_p': (0 <= sampling.min_p < 1, 'at least 0 and below 1'),
    }
    for name, (valid, remedy) in ranges.items():
        if not valid:
            raise ValueError(f'sampling {name}={getattr(sampling, name)}: make it {remedy}')


def filter_logits(
    logits: jax.Array, sampling: Sampling, keep: jax.Array | None = None
) -> jax.Array:
    """Logits of the distribution to sample from: scaled by temperature, cut to its support.

    Tokens tied with the last one kept are kept too. The sort that top-k and top-p need runs only
    when one of them is active.

    Args:
      logits: f32[..., V].
      sampling: temperature 0 leaves the scale at 1 (greedy decoding only picks, it does not
        rescale).
      keep: i32[...], a token that stays in the support whatever the filters say: a scorer names the
        sampled token, which must not get probability 0 when the policy has moved since.

    Returns:
      f32[..., V], -inf outside the support; not normalised.
    """
    temperature = jnp.asarray(sampling.temperature, jnp.float32)
    logits = logits / jnp.where(temperature > 0, temperature, 1.0)
    fixed = jax.lax.stop_gradient(logits)
    top_k, top_p = jnp.asarray(sampling.top_k), jnp.asarray(sampling.top_p)
    threshold = jax.lax.cond(
        (top_k > 0) | (top_p < 1),
        functools.partial(_rank_threshold, top_k=top_k, top_p=top_p),
        lambda x: jnp.full(x.shape[:-1], -jnp.inf),
        fixed,
    )
    min_p = fixed.max(-1) + jnp.log(jnp.asarray(sampling.min_p, jnp.float32))
    inside = fixed >= jnp.maximum(threshold, min_p)[..., None]
    if keep is not None:
        inside |= jnp.arange(logits.shape[-1]) == keep[..., None]
    return jnp.where(inside, logits, -jnp.inf)


def _rank_threshold(logits: jax.Array, top_k: jax.Array, top_p: jax.Array) -> jax.Array:
    """The smallest logit that top-k, then top-p among what it left, keep."""
    ordered = -jnp.sort(-logits, axis=-1)
    size = logits.shape[-1]
    count = jnp.where(top_k > 0, jnp.minimum(top_k, size), size)
    ordered = jnp.where(jnp.arange(size) < count, ordered, -jnp.inf)
    probability = jax.nn.softmax(ordered, axis=-1)
    before = jnp.cumsum(probability, axis=-1) - probability
    kept = ((before < top_p) & (ordered > -jnp.inf)).at[..., 0].set(True)
    return jnp.min(jnp.where(kept, ordered, jnp.inf), axis=-1)


def _inverse_cdf(mass: jax.Array, u: jax.Array) -> jax.Array:
    """Index i32[N] drawn by mass f32[N, n] (unnormalised) and uniforms f32[N]; never of mass 0."""
    cumulative = jnp.cumsum(mass, axis=-1)
    hit = (cumulative > (u * cumulative[:, -1])[:, None]) & (mass > 0)
    return jnp.where(hit.any(-1), hit.argmax(-1), mass.argmax(-1))


def draw(keys: jax.Array, logits: jax.Array, sampling: Sampling) -> tuple[jax.Array, jax.Array]:
    """Draws one token per row from `filter_logits` of its logits.

    Inverse distribution function in two levels, first a block of tokens by its mass and then the
    token in it: exact, and two uniforms per row in place of noise for the whole vocabulary.

    Args:
      keys: a random key for each of N rows.
      logits: f32[N, V].
      sampling: the distribution; temperature 0 takes the largest logit.

    Returns:
      token i32[N], and its log-prob f32[N] under the distribution drawn from (at temperature 0:
      under the filtered softmax at temperature 1).
    """
    rows, size = logits.shape
    filtered = filter_logits(logits, sampling)
    peak = filtered.max(-1, keepdims=True)
    mass = jnp.exp(filtered - peak)
    blocks = jnp.pad(mass, ((0, 0), (0, -size % _BLOCK))).reshape(rows, -1, _BLOCK)
    u = jax.vmap(lambda key: jax.random.uniform(key, (2,)))(keys)
    block_mass = blocks.sum(-1)
    block = _inverse_cdf(block_mass, u[:, 0])
    inside = _inverse_cdf(jnp.take_along_axis(blocks, block[:, None, None], 1)[:, 0], u[:, 1])
    token = jnp.where(
        jnp.asarray(sampling.temperature) > 0, block * _BLOCK + inside, filtered.argmax(-1)
    )
    chosen = jnp.take_along_axis(filtered - peak, token[:, None], 1)[:, 0]
    return token, chosen - jnp.log(block_mass.sum(-1))


def row_keys(seed: Array, step: Array, index: Array, group_size: int) -> jax.Array:
    """Random keys [B, G] from (seed, step, prompt index, completion index).

    Token t of a row uses fold_in(key, t). Nothing depends on where in the batch, on which device or
    beside which other prompts a row is sampled.

    Args:
      seed: i32[].
      step: i32[], the training step, so that the same prompt is sampled anew each time.
      index: i32[B], rows of the data set.
      group_size: G.
    """
    base = jax.random.fold_in(jax.random.key(seed), step)

    def row(prompt, completion):
        return jax.random.fold_in(jax.random.fold_in(base, prompt), completion)

    return jax.vmap(lambda i: jax.vmap(lambda g: row(i, g))(jnp.arange(group_size)))(index)


class _Carry(NamedTuple):
    """The decode loop's state: T columns are filled from the left."""

    t: jax.Array  # i32[], columns drawn so far
    token: jax.Array  # i32[B, G], the last one drawn
    done: jax.Array  # bool[B, G]
    matched: jax.Array  # i32[B, G], state in the table of stop strings
    own: KeyValues  # [L, B, G, K, T, h]
    tokens: jax.Array  # i32[B, G, T]
    mask: jax.Array  # bool[B, G, T]
    logprobs: jax.Array  # f32[B, G, T]


@functools.partial(jax.jit, static_argnames=('model', 'group_size', 'max_tokens', 'mesh'))
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
) -> Rollout:
    """Samples `group_size` completions of each prompt.

    Each prompt is prefilled once, whatever the group size. The loop ends when every row has ended.

    Args:
      model: the decoder.
      params: its parameters.
      prompts: tokens [B, P], lengths and data-set rows.
      seed: i32[], the run's seed.
      step: i32[], the training step (see `row_keys`).
      sampling: the distribution of the next token; all its values are traced.
      eos_ids: i32[E], tokens that end a completion.
      group_size: G.
      max_tokens: T.
      stops: [states, V] from `tokens.stop_table`, where strings end a completion as well.
      mesh: the devices; with one, prompts lie as `sharding.groups` says.

    Returns:
      Rollout of [B, G, T] arrays. Tokens after the end are 0 and masked; the one that ends is not.
    """
    keys = row_keys(seed, step, prompts.index, group_size)
    with sharding.use(mesh):
        params = _compute_copy(params, model.config.dtype)
        return _sample(model, params, prompts, keys, sampling, eos_ids, stops, max_tokens)


def _compute_copy(params: Params, dtype: str) -> Params:
    """Matrices in the computation's dtype: cast once, not in every decode step.

    Norm scales stay as they are, since they are used in float32.
    """
    return jax.tree_util.tree_map_with_path(
        lambda path, x: x if path[-1].key == 'scale' else x.astype(dtype), params
    )


def _sample(
    model, params, prompts: Prompts, keys, sampling, eos_ids, stops, max_tokens: int
) -> Rollout:
    shape = (*keys.shape, max_tokens)

    def pick(hidden, t, carry: _Carry) -> _Carry:
        """Draws column t from hidden states [B, G, D] and writes it down."""
        logits = apply(model, params, hidden, method='logits')
        folded = jax.vmap(lambda key: jax.random.fold_in(key, t))(keys.reshape(-1))
        token, logprob = draw(folded, logits.reshape(len(folded), -1), sampling)
        live = ~carry.done
        token = jnp.where(live, token.reshape(keys.shape), 0)
        logprob = jnp.where(live, logprob.reshape(keys.shape), 0.0)
        ends = (token[..., None] == eos_ids).any(-1)
        matched = carry.matched
        if stops is not None:
            matched = stops[matched, token].astype(jnp.int32)
            ends |= matched == len(stops) - 1
        return carry._replace(
            t=t + 1,
            token=token,
            done=carry.done | (live & ends),
            matched=matched,
            tokens=carry.tokens.at[:, :, t].set(token),
            mask=carry.mask.at[:, :, t].set(live),
            logprobs=carry.logprobs.at[:, :, t].set(logprob),
        )

    prompt, last = apply(model, params, prompts.tokens, prompts.length, method='prefill')

    def advance(carry: _Carry) -> _Carry:
        t = carry.t - 1
        hidden, column = apply(
            model, params, carry.token, t, prompt, prompts.length, carry.own, method='decode'
        )
        own = jax.tree.map(
            lambda cache, new: jax.lax.dynamic_update_slice_in_dim(cache, new, t, axis=4),
            carry.own,
            column,
        )
        return pick(hidden, carry.t, carry._replace(own=own))

    first = jnp.broadcast_to(last[:, None], (*keys.shape, last.shape[-1]))
    carry = pick(first, jnp.int32(0), _empty(model, shape))
    carry = jax.lax.while_loop(lambda c: (c.t < max_tokens) & ~c.done.all(), advance, carry)
    return Rollout(prompts, carry.tokens, carry.mask, carry.logprobs, carry.done)


def _empty(model: Transformer, shape: tuple[int, ...]) -> _Carry:
    """The loop's state before the first token of `shape` [B, G, T]."""
    c = model.config
    cache = jnp.zeros((c.layers, *shape[:2], c.kv_heads, shape[2], c.head_dim), c.dtype)
    return _Carry(
        t=jnp.int32(0),
        token=jnp.zeros(shape[:2], jnp.int32),
        done=jnp.zeros(shape[:2], bool),
        matched=jnp.zeros(shape[:2], jnp.int32),
        own=KeyValues(cache, cache),
        tokens=jnp.zeros(shape, jnp.int32),
        mask=jnp.zeros(shape, bool),
        logprobs=jnp.zeros(shape, jnp.float32),
    )
