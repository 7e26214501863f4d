"""Drawing tokens: range checks of the sampling options, random keys, and the draw itself."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key, Shaped

from grpo_jax.engine.token_distribution import filter_with_peak
from grpo_jax.types import Sampling

RECORDS = ('support', 'routing')  # what a rollout may hold for the update, see `types.Rollout`

_BLOCK = 64  # tokens per block of the two-level inverse-CDF sampling


def check_sampling(sampling: Sampling, *, greedy: bool = False) -> None:
    """Checks the ranges of concrete sampling options.

    Args:
      sampling: numbers, not traced.
      greedy: accept temperature 0, at which all completions of a group are the same.

    Raises:
      ValueError: an option is out of its range.
    """
    valid_temperature = sampling.temperature > 0 or (greedy and sampling.temperature == 0)
    top_k, top_p, min_p = _filters(sampling)
    ranges = {
        'temperature': (
            valid_temperature,
            'at least 0' if greedy else 'above 0 (greedy completions are all the same)',
        ),
        'top_k': (top_k >= 0, 'at least 0 (0 keeps all tokens)'),
        'top_p': (0 < top_p <= 1, 'above 0 and at most 1'),
        'min_p': (0 <= min_p < 1, 'at least 0 and below 1'),
    }
    for name, (valid, remedy) in ranges.items():
        if not valid:
            raise ValueError(f'sampling {name}={getattr(sampling, name)}: make it {remedy}')


def check_record(record: tuple[str, ...], sampling: Sampling, experts: int) -> None:
    """Checks what a rollout is to record, see `algorithm.sample`.

    Args:
      record: names.
      sampling: numbers, not traced.
      experts: of each layer; 0: the model has none.

    Raises:
      ValueError: an unknown name, a support without filters, or a routing without experts.
    """
    for name in record:
        if name not in RECORDS:
            raise ValueError(f'record names {name!r}: use any of {", ".join(RECORDS)}')
    if 'support' in record and not any(_active(sampling)):
        raise ValueError(
            "record='support' has no effect without a filter: set top_k, top_p or min_p, or "
            'remove it'
        )
    if 'routing' in record and not experts:
        raise ValueError("record='routing' has no effect on a model without experts: remove it")


def without_inactive(sampling: Sampling) -> Sampling:
    """The same distribution with None for each filter that keeps all tokens.

    Programs compile faster without them; for options that do not change during a run.

    Args:
      sampling: numbers, not traced.
    """
    filters = zip(_filters(sampling), _active(sampling), strict=True)
    return Sampling(sampling.temperature, *(x if active else None for x, active in filters))


def _filters(sampling: Sampling) -> tuple[Any, Any, Any]:
    """top_k, top_p and min_p, those that are None as the numbers that keep all tokens."""
    values = zip(sampling[1:], Sampling()[1:], strict=True)
    top_k, top_p, min_p = (inactive if x is None else x for x, inactive in values)
    return top_k, top_p, min_p


def _active(sampling: Sampling) -> tuple[bool, bool, bool]:
    """Whether top_k, top_p and min_p remove any tokens."""
    top_k, top_p, min_p = _filters(sampling)
    return top_k > 0, top_p < 1, min_p > 0


def _inverse_cdf(mass: jax.Array, u: jax.Array) -> jax.Array:
    """Index i32[N] drawn from unnormalized mass f32[N, n] by uniforms f32[N]; never of mass 0."""
    cumulative = jnp.cumsum(mass, axis=-1)
    hit = (cumulative > (u * cumulative[:, -1])[:, None]) & (mass > 0)
    return jnp.where(hit.any(-1), hit.argmax(-1), mass.argmax(-1))


def draw(
    keys: Key[Array, ' N'], logits: Float[Array, 'N V'], sampling: Sampling
) -> tuple[Int[Array, ' N'], Float[Array, ' N'], Bool[Array, 'N V']]:
    """Draws one token for each row of logits, after temperature and filters.

    Inverse-CDF sampling in two levels: it draws a block of tokens by its mass, then a token of that
    block. This is exact, and needs two uniform numbers per row instead of one per token of the
    vocabulary.

    Args:
      keys: a random key for each of N rows.
      logits: f32[N, V].
      sampling: the distribution; temperature 0 takes the largest logit.

    Returns:
      token i32[N]; its log-prob f32[N] under the distribution that it was drawn from (at
      temperature 0: under the filtered softmax at temperature 1); and the tokens that the filters
      kept.
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
    token = jax.lax.cond(  # argmax costs as much as the draw, so only greedy decoding computes it
        jnp.asarray(sampling.temperature) > 0,
        lambda drawn, _: drawn,
        lambda _, filtered: filtered.argmax(-1).astype(jnp.int32),
        (block * _BLOCK + inside).astype(jnp.int32),
        filtered,
    )
    chosen = jnp.take_along_axis(filtered - peak, token[:, None], 1)[:, 0]
    # Not a sum, which compilers would turn into one over the whole vocabulary.
    total = jnp.cumsum(block_mass, axis=-1)[:, -1]
    return token, chosen - jnp.log(total), filtered > -jnp.inf


def completion_keys(
    seed: int | Int[Array, ''],
    step: int | Int[Array, ''],
    index: Shaped[Array, ' B'],
    group_size: int,
) -> Key[Array, 'B G']:
    """Random keys from (seed, step, prompt index, completion index).

    Token t of a completion uses fold_in(key, t). Keys do not depend on the place in the batch, on
    the device, or on the other prompts of the batch. Where a batch has a prompt several times, the
    n-th copy has the keys of completions n * G to n * G + G - 1, so copies differ.

    Args:
      seed: i32[].
      step: i32[], the training step, so that a prompt gets new completions at each step.
      index: i32[B], rows of the data set.
      group_size: G.
    """
    base = jax.random.fold_in(jax.random.key(seed), step)

    def row(prompt: jax.Array, completion: jax.Array) -> Key[Array, '']:
        return jax.random.fold_in(jax.random.fold_in(base, prompt), completion)

    index = jnp.asarray(index)
    copy = jnp.tril(index[:, None] == index, -1).sum(-1)  # earlier copies of each prompt
    completions = copy[:, None] * group_size + jnp.arange(group_size)
    return jax.vmap(lambda i, group: jax.vmap(lambda g: row(i, g))(group))(index, completions)
