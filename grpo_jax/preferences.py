"""Losses of pairs: two completions of one prompt, of which one is preferred (DPO and its kin).

A pair is a group of G = 2, so its prompt is read once, as every group's. The losses have the form
of those in `losses`.
"""

import jax
import jax.numpy as jnp

from grpo_jax.types import Batch, Objective

PAIRWISE = ('dpo', 'ipo', 'hinge')


def dpo(logprobs: jax.Array, group: Batch, objective: Objective) -> jax.Array:
    """-(1 - s) log sigmoid(beta * m) - s log sigmoid(-beta * m) of a pair with the `margin` m.

    Direct preference optimization (arXiv 2305.18290), eq. 7, where s = label_smoothing is 0; the
    conservative form (see arXiv 2403.00409) holds the preference to be wrong with probability s.

    Args:
      logprobs: f32[2, T] of the policy that is trained.
      group: see `margin`.
      objective: beta and label_smoothing.

    Returns:
      f32[2, T], the pair's loss at each of its tokens: with the weights 1 / (B G |o_i|) of
      'sequence_mean' the sum over all tokens is the mean over pairs.
    """
    scaled = objective.beta * margin(logprobs, group)
    kept, swapped = jax.nn.log_sigmoid(scaled), jax.nn.log_sigmoid(-scaled)
    smoothing = objective.label_smoothing
    return jnp.broadcast_to(-(1 - smoothing) * kept - smoothing * swapped, logprobs.shape)


def ipo(logprobs: jax.Array, group: Batch, objective: Objective) -> jax.Array:
    """(m - 1 / (2 beta))^2 of a pair with the `margin` m; beta must not be 0.

    A general theoretical paradigm (Azar et al., arXiv 2310.12036), eq. 17. Arguments and result are
    those of `dpo`.
    """
    loss = jnp.square(margin(logprobs, group) - 0.5 / objective.beta)
    return jnp.broadcast_to(loss, logprobs.shape)


def hinge(logprobs: jax.Array, group: Batch, objective: Objective) -> jax.Array:
    """max(0, 1 - beta * m) of a pair with the `margin` m.

    SLiC-HF (arXiv 2305.10425), of log-ratios to the reference. Arguments and result are
    those of `dpo`.
    """
    loss = jax.nn.relu(1 - objective.beta * margin(logprobs, group))
    return jnp.broadcast_to(loss, logprobs.shape)


def margin(logprobs: jax.Array, group: Batch) -> jax.Array:
    """How much further a pair's preferred completion has moved from the reference than the other.

    m = log-ratio(preferred) - log-ratio(other), a completion's log-ratio being the sum of
    log(pi / ref) over its tokens. The one with the larger advantage is preferred; where both have
    the same there is no preference, and m and its gradient are 0.

    Args:
      logprobs: f32[2, T] of the policy that is trained.
      group: ref_logprobs f32[2, T], the rollout's mask, and advantages f32[2, T], each the same at
        all tokens of a completion.

    Returns:
      f32[].

    Raises:
      ValueError: the group is no pair, or has no ref_logprobs.
    """
    if logprobs.shape[0] != 2:
        raise ValueError(
            f'group_size={logprobs.shape[0]}: the losses {", ".join(PAIRWISE)} compare a pair of '
            'completions; use group_size=2'
        )
    if group.ref_logprobs is None:
        raise ValueError(
            f'ref_logprobs=None: the losses {", ".join(PAIRWISE)} are relative to a reference; '
            'give the log-probs of one'
        )
    difference = jnp.where(group.rollout.mask, logprobs - group.ref_logprobs, 0.0)
    advantage = group.advantages[:, 0]
    return (jnp.sign(advantage - advantage[::-1]) * difference.sum(-1)).sum()
