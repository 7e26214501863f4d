"""Preference losses of two completions of one prompt: DPO and its variants.

A pair is a group of G = 2, so its prompt is processed once, as in every group.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Bool, Float

from grpo_jax.types import Array, Scalar

PAIRWISE = ('dpo', 'ipo', 'hinge')

Pair = Float[Array, 'G T']


def dpo(
    logprobs: Pair,
    ref_logprobs: Pair,
    advantages: Pair,
    mask: Bool[Array, 'G T'],
    *,
    beta: Scalar,
    label_smoothing: Scalar = 0.0,
) -> Pair:
    """-(1 - s) log sigmoid(beta * m) - s log sigmoid(-beta * m) of a pair with the `margin` m.

    Direct preference optimization (arXiv 2305.18290), eq. 7, where s = label_smoothing is 0. With
    s > 0 a preference is assumed to be wrong with probability s (conservative DPO, see arXiv
    2403.00409).

    Args:
      logprobs: f32[2, T] of the policy that is trained.
      ref_logprobs: f32[2, T] of the reference.
      advantages: f32[2, T], the same at all tokens of a completion; the larger is preferred.
      mask: bool[2, T], the completion tokens.
      beta: f32[], above 0.
      label_smoothing: f32[], s.

    Returns:
      f32[2, T], the pair's loss at each of its tokens: with the weights 1 / (B G |o_i|) of
      'sequence_mean' the sum over all tokens is the mean over pairs.
    """
    scaled = beta * margin(logprobs, ref_logprobs, advantages, mask)
    correct, flipped = jax.nn.log_sigmoid(scaled), jax.nn.log_sigmoid(-scaled)
    loss = -(1 - label_smoothing) * correct - label_smoothing * flipped
    return jnp.broadcast_to(loss, logprobs.shape)


def ipo(
    logprobs: Pair, ref_logprobs: Pair, advantages: Pair, mask: Bool[Array, 'G T'], *, beta: Scalar
) -> Pair:
    """(m - 1 / (2 beta))^2 of a pair with the `margin` m.

    Identity preference optimization (Azar et al., arXiv 2310.12036), eq. 17. Arguments and result
    as in `dpo`.
    """
    loss = jnp.square(margin(logprobs, ref_logprobs, advantages, mask) - 0.5 / beta)
    return jnp.broadcast_to(loss, logprobs.shape)


def hinge(
    logprobs: Pair, ref_logprobs: Pair, advantages: Pair, mask: Bool[Array, 'G T'], *, beta: Scalar
) -> Pair:
    """max(0, 1 - beta * m) of a pair with the `margin` m.

    The hinge loss of SLiC-HF (arXiv 2305.10425), applied to log-ratios to the reference. Arguments
    and result as in `dpo`.
    """
    loss = jax.nn.relu(1 - beta * margin(logprobs, ref_logprobs, advantages, mask))
    return jnp.broadcast_to(loss, logprobs.shape)


def margin(
    logprobs: Pair, ref_logprobs: Pair, advantages: Pair, mask: Bool[Array, 'G T']
) -> Float[Array, '']:
    """How much further the preferred completion has moved from the reference than the other.

    m = log-ratio(preferred) - log-ratio(other), where a completion's log-ratio is the sum of
    log(pi / ref) over its tokens. The completion with the larger advantage is preferred; if both
    advantages are equal, m and its gradient are 0. Arguments as in `dpo`.

    Raises:
      ValueError: the group is not a pair.
    """
    if logprobs.shape[0] != 2:
        raise ValueError(
            f'group_size={logprobs.shape[0]}: the losses {", ".join(PAIRWISE)} compare a pair of '
            'completions; use group_size=2'
        )
    difference = jnp.where(mask, logprobs - ref_logprobs, 0.0)
    advantage = advantages[:, 0]
    return (jnp.sign(advantage - advantage[::-1]) * difference.sum(-1)).sum()
