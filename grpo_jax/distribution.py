"""The distribution of the next token, and drawing from it.

Sampler and scorer must agree on it: the log-probs that `sample.sample` returns are those that
`score.completion_logprobs` computes for the same tokens.
"""

import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp

from grpo_jax.types import Array, Sampling

_BLOCK = 64  # tokens per block of the two-level inverse distribution function
_PIECES = 32  # most pieces that positions are filtered in


def check_sampling(sampling: Sampling, *, greedy: bool = False) -> None:
    """Raises ValueError for values out of their range; call it outside of jit.

    Temperature 0 is one of them but with `greedy`: no policy learns from completions that are all
    the same.
    """
    warm = sampling.temperature > 0 or (greedy and sampling.temperature == 0)
    ranges = {
        'temperature': (
            warm,
            'at least 0' if greedy else 'above 0 (greedy completions are all the same)',
        ),
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

    Tokens tied with the last one kept are kept too. What the filters cost is spent only when one of
    them is active.

    Args:
      logits: f32[..., V].
      sampling: temperature 0 leaves the scale at 1 (greedy decoding only picks, it does not
        rescale).
      keep: i32[...], a token that stays in the support whatever the filters say: a scorer names the
        sampled token, which must not get probability 0 when the policy has moved since.

    Returns:
      f32[..., V], -inf outside the support; not normalised.
    """
    return filter_with_peak(logits, sampling, keep)[0]


def filter_with_peak(
    logits: jax.Array, sampling: Sampling, keep: jax.Array | None = None
) -> tuple[jax.Array, jax.Array]:
    """`filter_logits`, and the largest f32[...] of what is returned, without its gradient.

    Every filter keeps the largest logit, so it is known before they are applied: one pass less.
    """
    temperature = jnp.asarray(sampling.temperature, jnp.float32)
    scale = jnp.where(temperature > 0, temperature, 1.0)
    top_k, top_p = map(jnp.asarray, (sampling.top_k, sampling.top_p))
    min_p = jnp.asarray(sampling.min_p, jnp.float32)
    # Two axes, as the product that logits are has, and conditions that read the product itself: so
    # compilers make nothing of its size beside it.
    rows = logits.reshape(-1, logits.shape[-1])
    fixed = jax.lax.stop_gradient(rows)

    def where(active, smallest_kept):
        return jax.lax.cond(
            active,
            lambda rows: smallest_kept(rows.reshape(logits.shape)).reshape(-1, 1),
            lambda rows: jnp.full((len(rows), 1), -jnp.inf),
            fixed,
        )

    ranked = functools.partial(_ranked, scale=scale, top_k=top_k, top_p=top_p)
    ranked = where((top_k > 0) | (top_p < 1), functools.partial(_in_pieces, ranked))
    likely = where(min_p > 0, lambda logits: logits.max(-1) + scale * jnp.log(min_p))
    inside = ~(fixed < jnp.maximum(ranked, likely))  # so a NaN stays one
    if keep is not None:
        inside |= jnp.arange(rows.shape[-1]) == keep.reshape(-1, 1)
    filtered = _outside_out(rows / scale, inside)
    return filtered.reshape(logits.shape), (fixed.max(-1) / scale).reshape(logits.shape[:-1])


@jax.custom_jvp
def _outside_out(logits: jax.Array, inside: jax.Array) -> jax.Array:
    """-inf outside, where there is no slope anyway: a gradient needs neither logits nor mask."""
    return jnp.where(inside, logits, -jnp.inf)


@_outside_out.defjvp
def _outside_out_jvp(primals, tangents):
    return _outside_out(*primals), tangents[0]


def _in_pieces(function: Callable[[jax.Array], jax.Array], logits: jax.Array) -> jax.Array:
    """`function`, [..., V] to [...], of a few positions at a time: what it makes is small.

    Where there are positions: the first axis is spread over devices, and a cut would move it.
    """
    *lead, size = logits.shape
    pieces = math.gcd(math.prod(lead[1:]), _PIECES)
    if pieces == 1:
        return function(logits)
    cut = logits.reshape(lead[0], pieces, -1, size)
    found = jax.lax.map(
        lambda i: function(jax.lax.dynamic_index_in_dim(cut, i, axis=1, keepdims=False)),
        jnp.arange(pieces),
    )
    return found.swapaxes(0, 1).reshape(lead)


def _ranked(logits: jax.Array, scale: jax.Array, top_k: jax.Array, top_p: jax.Array) -> jax.Array:
    """The smallest logit that top-k, then top-p at temperature `scale` among what it left, keep."""
    count = jnp.where(top_k > 0, top_k, logits.shape[-1])
    kth = _cut(logits, jnp.ones_like(logits), count)
    mass = jnp.exp((logits - logits.max(-1, keepdims=True)) / scale)
    mass = jnp.where(logits >= kth[..., None], mass, 0.0)
    return jnp.where(top_p < 1, _cut(logits, mass, top_p * mass.sum(-1)), kth)


def _cut(logits: jax.Array, mass: jax.Array, enough: jax.Array) -> jax.Array:
    """The largest logit f32[...] such that it and those above it have `enough` mass; else -inf.

    It is found bit by bit, the highest first, as floats are ordered like their bits if those of
    negative ones are flipped: no sort, and nothing of the size of the vocabulary beside the sums'
    terms.
    """

    def number(code):
        bits = jnp.where(code >> 31 == 1, code ^ jnp.uint32(1 << 31), ~code)
        return jax.lax.bitcast_convert_type(bits, jnp.float32)

    def narrow(i, code):
        larger = code | (jnp.uint32(1 << 31) >> i.astype(jnp.uint32))
        reached = jnp.where(logits >= number(larger)[..., None], mass, 0.0).sum(-1)
        return jnp.where(reached >= enough, larger, code)

    code = jax.lax.fori_loop(0, 32, narrow, jnp.zeros(logits.shape[:-1], jnp.uint32))
    return jnp.where(code > 0, number(code), -jnp.inf)


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
    filtered, peak = filter_with_peak(logits, sampling)
    peak = peak[:, None]
    mass = jnp.exp(filtered - peak)
    blocks = jnp.pad(mass, ((0, 0), (0, -size % _BLOCK))).reshape(rows, -1, _BLOCK)
    u = jax.vmap(lambda key: jax.random.uniform(key, (2,)))(keys)
    block_mass = blocks.sum(-1)
    block = _inverse_cdf(block_mass, u[:, 0])
    inside = _inverse_cdf(jnp.take_along_axis(blocks, block[:, None, None], 1)[:, 0], u[:, 1])
    token = jax.lax.cond(  # the search for the largest logit costs as much as the draw
        jnp.asarray(sampling.temperature) > 0,
        lambda drawn, _: drawn,
        lambda _, filtered: filtered.argmax(-1).astype(jnp.int32),
        (block * _BLOCK + inside).astype(jnp.int32),
        filtered,
    )
    chosen = jnp.take_along_axis(filtered - peak, token[:, None], 1)[:, 0]
    # Not a sum of them, which compilers would make one of the whole vocabulary.
    total = jnp.cumsum(block_mass, axis=-1)[:, -1]
    return token, chosen - jnp.log(total)


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
