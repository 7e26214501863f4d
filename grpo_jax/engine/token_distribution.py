"""The distribution of the next token: filtered logits, and the log-probs of tokens under it.

Sampler and update share it, so that the log-probs that `algorithm.sample` returns are those that
`algorithm.logprobs` computes for the same tokens.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Bool, Float, Int, UInt32

from grpo_jax.engine.support import unpack
from grpo_jax.types import Array, Sampling

_PIECES = 32  # most pieces into which positions are cut for filtering


def filter_logits(
    logits: Float[Array, '*n V'], sampling: Sampling, keep: Int[Array, '*n'] | None = None
) -> Float[Array, '*n V']:
    """Logits of the distribution to sample from: scaled by temperature, restricted to its support.

    Tokens tied with the last one kept are kept too. A filter costs no time while it is inactive,
    and no compilation if it is None.

    Args:
      logits: f32[..., V].
      sampling: temperature 0 (greedy decoding) does not rescale.
      keep: i32[...], a token that stays in the support regardless of the filters: a scorer passes
        the sampled token, which must not get probability 0 when the policy has moved since.

    Returns:
      f32[..., V], -inf outside the support; not normalized.
    """
    return filter_with_peak(logits, sampling, keep)[0]


def filter_with_peak(
    logits: Float[Array, '*n V'], sampling: Sampling, keep: Int[Array, '*n'] | None = None
) -> tuple[Float[Array, '*n V'], Float[Array, '*n']]:
    """`filter_logits`, and the largest of the returned logits without its gradient.

    Every filter keeps the largest logit, so it is computed before filtering, which saves a pass.
    """
    scale = _scale(sampling)
    # Flattened to two axes, as the matrix product returns them, and compared before scaling:
    # otherwise compilers allocate a second array of the size of the logits.
    rows = logits.reshape(-1, logits.shape[-1])
    fixed = jax.lax.stop_gradient(rows)

    def threshold(
        active: Bool[Array, ''], smallest_kept: Callable[[jax.Array], jax.Array]
    ) -> jax.Array:
        return jax.lax.cond(
            active,
            lambda rows: smallest_kept(rows.reshape(logits.shape)).reshape(-1, 1),
            lambda rows: jnp.full((len(rows), 1), -jnp.inf),
            fixed,
        )

    thresholds = []
    if sampling.top_k is not None or sampling.top_p is not None:
        top_k = jnp.asarray(0 if sampling.top_k is None else sampling.top_k)
        top_p = jnp.asarray(1.0 if sampling.top_p is None else sampling.top_p)
        by_rank = functools.partial(_ranked, scale=scale, top_k=top_k, top_p=top_p)
        ranked = functools.partial(_in_pieces, by_rank)
        thresholds.append(threshold((top_k > 0) | (top_p < 1), ranked))
    if sampling.min_p is not None:
        min_p = jnp.asarray(sampling.min_p, jnp.float32)
        likely = threshold(min_p > 0, lambda logits: logits.max(-1) + scale * jnp.log(min_p))
        thresholds.append(likely)
    filtered = rows / scale
    if thresholds:
        # Not `>=`, which would turn NaN into -inf.
        inside = ~(fixed < functools.reduce(jnp.maximum, thresholds))
        if keep is not None:
            inside |= jnp.arange(rows.shape[-1]) == keep.reshape(-1, 1)
        filtered = _mask_logits(filtered, inside)
    return filtered.reshape(logits.shape), (fixed.max(-1) / scale).reshape(logits.shape[:-1])


def restrict_logits(
    logits: Float[Array, '*n V'],
    sampling: Sampling,
    support: UInt32[Array, '*n words'],
    keep: Int[Array, '*n'],
) -> Float[Array, '*n V']:
    """`filter_logits` with a recorded support in place of the filters."""
    rows = logits.reshape(-1, logits.shape[-1])
    inside = unpack(support.reshape(len(rows), -1), rows.shape[-1])
    inside |= jnp.arange(rows.shape[-1]) == keep.reshape(-1, 1)  # padding has an empty support
    return _mask_logits(rows / _scale(sampling), inside).reshape(logits.shape)


def _scale(sampling: Sampling) -> jax.Array:
    """What logits are divided by: the temperature, or 1 for greedy decoding."""
    temperature = jnp.asarray(sampling.temperature, jnp.float32)
    return jnp.where(temperature > 0, temperature, 1.0)


@jax.custom_jvp
def _mask_logits(logits: jax.Array, inside: jax.Array) -> jax.Array:
    """-inf outside. The gradient there is already 0, so the backward pass needs no mask."""
    return jnp.where(inside, logits, -jnp.inf)


@_mask_logits.defjvp
def _mask_logits_jvp(
    primals: tuple[jax.Array, jax.Array], tangents: tuple[jax.Array, Any]
) -> tuple[jax.Array, jax.Array]:
    return _mask_logits(*primals), tangents[0]


def _in_pieces(function: Callable[[jax.Array], jax.Array], logits: jax.Array) -> jax.Array:
    """Applies `function` ([..., V] to [...]) to a few positions at a time, to save memory.

    The first axis is not cut: it is sharded over devices.
    """
    *lead, size = logits.shape
    pieces = math.gcd(math.prod(lead[1:]), _PIECES)
    if pieces == 1:
        return function(logits)
    pieces_of_logits = logits.reshape(lead[0], pieces, -1, size)
    thresholds = jax.lax.map(
        lambda i: function(
            jax.lax.dynamic_index_in_dim(pieces_of_logits, i, axis=1, keepdims=False)
        ),
        jnp.arange(pieces),
    )
    return thresholds.swapaxes(0, 1).reshape(lead)


def _ranked(logits: jax.Array, scale: jax.Array, top_k: jax.Array, top_p: jax.Array) -> jax.Array:
    """The smallest logit kept by top-k, and by top-p at temperature `scale` among those.

    A loop over the two filters, so that their search is compiled once.
    """

    def restrict(number: jax.Array, smallest: jax.Array) -> jax.Array:
        by_count = number == 0
        mass = jnp.exp((logits - logits.max(-1, keepdims=True)) / scale)
        mass = jnp.where(logits >= smallest[..., None], mass, 0.0)
        required = jnp.where(by_count, top_k.astype(mass.dtype), top_p * mass.sum(-1))
        return _smallest_kept(logits, jnp.where(by_count, 1.0, mass), required)

    everything = jnp.full(logits.shape[:-1], -jnp.inf)
    first, last = jnp.where(top_k > 0, 0, 1), jnp.where(top_p < 1, 2, 1)
    return jax.lax.fori_loop(first, last, restrict, everything)


def _smallest_kept(logits: jax.Array, mass: jax.Array, required: jax.Array) -> jax.Array:
    """The largest logit f32[...] such that it and those above it have the `required` mass, or -inf.

    A binary search that sets the bits of the logit one by one, the highest first: floats are
    ordered like their bits once those of negative numbers are flipped. It needs no sort, and no
    array of the vocabulary's size except the terms of the sums.
    """

    def number(code: jax.Array) -> jax.Array:
        bits = jnp.where(code >> 31 == 1, code ^ jnp.uint32(1 << 31), ~code)
        return jax.lax.bitcast_convert_type(bits, jnp.float32)

    def narrow(i: jax.Array, code: jax.Array) -> jax.Array:
        larger = code | (jnp.uint32(1 << 31) >> i.astype(jnp.uint32))
        reached = jnp.where(logits >= number(larger)[..., None], mass, 0.0).sum(-1)
        return jnp.where(reached >= required, larger, code)

    code = jax.lax.fori_loop(0, 32, narrow, jnp.zeros(logits.shape[:-1], jnp.uint32))
    return jnp.where(code > 0, number(code), -jnp.inf)


def token_logprobs(
    logits: Float[Array, '*n V'],
    targets: Int[Array, '*n'],
    sampling: Sampling,
    *,
    support: UInt32[Array, '*n words'] | None = None,
    entropy: bool = False,
) -> tuple[Float[Array, '*n'], Float[Array, '*n'] | None]:
    """Log-probs of the targets, and if requested the entropy of each distribution in nats.

    A filter never removes a target, see `filter_logits`. With `support` (see `engine.support`) the
    filters are not applied to these logits: the tokens are those that the sampler kept.
    """
    if support is None:
        logits, peak = filter_with_peak(logits, sampling, keep=targets)
    else:
        logits = restrict_logits(logits, sampling, support, keep=targets)
        peak = jax.lax.stop_gradient(logits).max(-1)
    rows, peak = logits.reshape(-1, logits.shape[-1]), peak.reshape(-1)
    if jax.default_backend() != 'gpu':
        # A separate maximum lets compilers overwrite the logits, which saves the memory of a chunk.
        peak = jax.lax.stop_gradient(rows).max(-1)
    norm = peak + jnp.log(jnp.exp(rows - peak[:, None]).sum(-1))
    logprob = (_at(rows, targets.reshape(-1)) - norm).reshape(targets.shape)
    if not entropy:
        return logprob, None
    inside = rows > -jnp.inf
    logp = jnp.where(inside, rows, 0.0) - norm[:, None]
    entropies = -jnp.where(inside, jnp.exp(logp) * logp, 0.0).sum(-1)
    return logprob, entropies.reshape(targets.shape)


@jax.custom_jvp
def _at(logits: Array, targets: Array) -> jax.Array:
    """f32[...], the logit of each position's target; the backward pass has no scatter."""
    return jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]


@_at.defjvp
def _at_jvp(
    primals: tuple[Array, Array], tangents: tuple[jax.Array, Any]
) -> tuple[jax.Array, jax.Array]:
    logits, targets = primals
    hit = jnp.arange(logits.shape[-1]) == targets[..., None]
    return _at(logits, targets), jnp.where(hit, tangents[0], 0.0).sum(-1)
