"""Clip-Cov and KL-Cov: which tokens are chosen, and that the choice is one of the whole batch."""

import functools

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny

from grpo_jax.algorithm import covariance
from grpo_jax.algorithm.config import Algorithm
from grpo_jax.algorithm.program import init_state
from grpo_jax.algorithm.update import train_step
from grpo_jax.engine.compute import Compute
from grpo_jax.types import Sampling

CLIP = {'covariance': 'clip', 'cov_low': 0.1, 'cov_high': 0.6}
KL = {'covariance': 'kl', 'inner_updates': 2}


def test_covariance_by_hand():
    """Means -2 and 1 over the three tokens in the mask; the fourth counts for nothing."""
    logprobs = jnp.float32([[[-1.0, -2.0, -3.0, 50.0]]])
    advantages = jnp.float32([[[3.0, 1.0, -1.0, 50.0]]])
    mask = jnp.array([[[True, True, True, False]]])
    ours = covariance.token_covariance(logprobs, advantages, mask)
    np.testing.assert_allclose(ours, [[[2.0, 0.0, 2.0, 0.0]]], atol=1e-6)


def case(seed, shape=(3, 4, 6)):
    rng = np.random.default_rng(seed)
    mask = np.arange(shape[2]) < rng.integers(1, shape[2] + 1, shape[:2])[..., None]
    return rng.normal(-2, 1, shape), rng.standard_normal(shape), mask


def choose(options, case, step=0):
    logprobs, advantages, mask = case
    arrays = jnp.float32(logprobs), jnp.float32(advantages), jnp.asarray(mask)
    chosen = covariance.choose_tokens(Algorithm(**options), *arrays, jnp.int32(step))
    return np.asarray(chosen)


def by_numpy(case):
    logprobs, advantages, mask = case
    return (logprobs - logprobs[mask].mean()) * (advantages - advantages[mask].mean())


@hypothesis.settings(max_examples=20, deadline=None)
@hypothesis.given(seed=st.integers(0, 10**6), share=st.sampled_from([1e-4, 0.1, 0.25, 0.5, 1.0]))
def test_tokens_of_the_highest_covariance(seed, share):
    """Exactly as many as the share says, at least one, none lower than one that is left out."""
    batch = case(seed)
    cov, mask = by_numpy(batch), batch[2]
    chosen = choose(KL | {'cov_share': share}, batch)
    assert chosen.sum() == max(1, int(share * mask.sum()))
    assert not (chosen & ~mask).any()
    rest = cov[mask & ~chosen]
    assert rest.size == 0 or cov[chosen].min() >= rest.max() - 1e-5


def test_equal_advantages_choose_no_more_than_the_share():
    logprobs, advantages, mask = case(0)
    chosen = choose(KL | {'cov_share': 0.1}, (logprobs, 0 * advantages, mask))
    assert chosen.sum() == max(1, int(0.1 * mask.sum()))


@hypothesis.settings(max_examples=20, deadline=None)
@hypothesis.given(seed=st.integers(0, 10**6), share=st.sampled_from([1e-4, 0.05, 0.1, 1.0]))
def test_tokens_drawn_between_the_bounds(seed, share):
    batch = case(seed)
    cov, mask = by_numpy(batch), batch[2]
    chosen = choose(CLIP | {'cov_share': share}, batch, step=seed)
    eligible = mask & (cov > 0.1) & (cov < 0.6)
    assert chosen.sum() == min(eligible.sum(), max(1, int(share * mask.sum())))
    assert not (chosen & ~eligible).any()


def test_the_draw_depends_on_the_step_alone():
    batch = case(1, (4, 6, 8))
    options = CLIP | {'cov_share': 0.05}
    one, again, other = (choose(options, batch, step) for step in (1, 1, 2))
    assert (one == again).all()
    assert (one != other).any()


def update(algorithm, rollout, rewards, **cut):
    """The parameters after one step of gradient descent, and the gradient's norm."""
    model, optimizer = tiny.Bigram(), optax.sgd(1.0)
    program = tiny.jit(
        functools.partial(train_step, model=model, optimizer=optimizer, compute=Compute(**cut))
    )
    state = init_state(model, optimizer, model.make_params())
    state, metrics = program(state, None, rollout, rewards, Sampling(), algorithm)
    return jax.device_get(state.params), float(metrics['grad_norm'])


@pytest.mark.parametrize('options', [CLIP, KL])
def test_microbatches_do_not_change_the_choice(options, rollout, rewards):
    """Nor chunks of logits; but treating tokens changes the update."""
    algorithm = Algorithm(**options, cov_share=0.2)
    whole, norm = update(algorithm, rollout, rewards, microbatch=4, widths=1)
    assert norm > 1e-2
    parts, _ = update(algorithm, rollout, rewards, microbatch=1, widths=1, logprob_chunk=2)
    assert tiny.gap(parts, whole) < 1e-5
    plain = Algorithm(inner_updates=algorithm.inner_updates)
    without, _ = update(plain, rollout, rewards, microbatch=4, widths=1)
    assert tiny.gap(whole, without) > 1e-3
