"""The sampler's own filters in later scores: packing, recording and scoring."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
import tiny
from hypothesis import given
from hypothesis import strategies as st

from grpo_jax.algorithm.checks import check_support
from grpo_jax.algorithm.logprobs import completion_logprobs
from grpo_jax.algorithm.presets import preset
from grpo_jax.algorithm.sample import sample
from grpo_jax.engine.compute import Compute, choose
from grpo_jax.engine.policy import Policy
from grpo_jax.engine.support import pack, unpack
from grpo_jax.models import apply, completion_hidden
from grpo_jax.types import Batch, Prompts, Sampling

SAMPLING = Sampling(temperature=0.8, top_k=9, top_p=0.8)
SHAPE = (4, 3, 6, 5)  # B, G, P, T

PLANS = {
    'one chunk': (True, Compute(logprob_chunk=8)),
    'chunks': (True, Compute(logprob_chunk=2)),
    'whole completions': (False, Compute(logprob_chunk=2)),
    'bundles': (True, Compute(rows=4, microbatch=4)),
    'packed': (True, Compute(rows=4, microbatch=4, packed=True)),
}


@given(st.lists(st.booleans(), min_size=1, max_size=100))
def test_packing_equals_numpy(flags):
    kept = np.asarray([flags, flags[::-1]])
    bits = np.pad(kept, ((0, 0), (0, -kept.shape[1] % 32)))
    expected = np.packbits(bits, axis=1, bitorder='little').view('<u4')
    np.testing.assert_array_equal(pack(jnp.asarray(kept)), expected)
    np.testing.assert_array_equal(unpack(jnp.asarray(expected), kept.shape[1]), kept)


@functools.cache
def recorded(block=0):
    """A policy, its recorded samples, and another policy."""
    model = tiny.make_model()
    params, other = (tiny.make_params(model, seed) for seed in (0, 1))
    prompts = Prompts(*map(jnp.asarray, tiny.make_rollout().prompts[:3]))
    rollout = sample(
        model, params, prompts, seed=0, step=0, sampling=SAMPLING, eos_ids=np.arange(20),
        group_size=SHAPE[1], max_tokens=SHAPE[3], block=block, record=('support',),
    )  # fmt: skip
    return model, params, other, rollout


def logits_of(model, params, rollout):
    prompts = rollout.prompts
    hidden = completion_hidden(model, params, prompts.tokens, prompts.length, rollout.tokens)
    return np.asarray(apply(model, params, hidden, method='logits'), np.float64)


def expected_logprobs():
    """Log-probs of the other policy over the sets that the first one's filters keep."""
    model, params, other, rollout = recorded()
    flat = logits_of(model, params, rollout).reshape(-1, tiny.VOCAB)
    kept = np.stack([oracle.distribution(row, *SAMPLING) for row in flat]) > 0
    scaled = logits_of(model, other, rollout).reshape(-1, tiny.VOCAB) / SAMPLING.temperature
    norm = np.log(np.where(kept, np.exp(scaled), 0).sum(-1))
    chosen = np.take_along_axis(scaled, np.asarray(rollout.tokens).reshape(-1, 1), 1)[:, 0]
    shape = rollout.mask.shape
    return kept.reshape(*shape, -1), (chosen - norm).reshape(shape)


def test_the_recorded_sets_are_those_of_the_sampler():
    _, _, _, rollout = recorded()
    kept, _ = expected_logprobs()
    mask = np.asarray(rollout.mask)
    assert 0 < mask.mean() < 1
    np.testing.assert_array_equal(unpack(rollout.support, tiny.VOCAB)[mask], kept[mask])
    assert 1 < kept[mask].sum(-1).mean() <= 9


def test_another_policy_is_scored_over_the_same_sets():
    model, params, other, rollout = recorded()
    mask = np.asarray(rollout.mask)
    _, expected = expected_logprobs()
    ours, _ = completion_logprobs(model, other, rollout, SAMPLING, chunk=2)
    np.testing.assert_allclose(ours[mask], expected[mask], atol=2e-5)
    own, _ = completion_logprobs(model, params, rollout, SAMPLING)
    np.testing.assert_allclose(own[mask], rollout.logprobs[mask], atol=2e-5)
    apart, _ = completion_logprobs(model, other, rollout._replace(support=None), SAMPLING)
    assert abs(apart[mask] - expected[mask]).max() > 0.1  # it would keep other tokens


@functools.cache
def expected_gradient():
    model, _, other, rollout = recorded()

    def loss(params):
        logprobs, _ = completion_logprobs(model, params, rollout, SAMPLING)
        return 0.1 * jnp.where(rollout.mask, logprobs, 0.0).sum()

    return tiny.jit(jax.grad(loss))(other)


@pytest.mark.parametrize('plan', tiny.some_slow(list(PLANS), 'one chunk', 'bundles', 'chunks'))
def test_all_ways_to_compute_a_gradient_use_the_recorded_sets(plan):
    model, _, other, rollout = recorded()
    tokenwise, compute = PLANS[plan]
    weights = jnp.where(rollout.mask, 0.1, 0.0)
    batch = Batch(rollout, weights, weights)
    policy = Policy(model, None, SAMPLING, choose(compute, model.config, SHAPE))
    gradient, outputs = tiny.jit(
        lambda params: policy.gradient(
            lambda logprobs, _, part: (part.weights * logprobs).sum(), params, batch,
            tokenwise=tokenwise, entropy=False,
        )
    )(other)  # fmt: skip
    _, logprobs = expected_logprobs()
    mask = np.asarray(rollout.mask)
    np.testing.assert_allclose(outputs['logprobs'][mask], logprobs[mask], atol=2e-5)
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, atol=2e-5), gradient, expected_gradient()
    )


def test_blocks_record_the_same():
    _, _, _, whole = recorded()
    _, _, _, parts = recorded(block=2)
    mask = np.asarray(whole.mask)
    np.testing.assert_array_equal(parts.support[mask], whole.support[mask])


def test_a_trust_region_does_not_use_a_recorded_support():
    message = "a recorded support has no effect with step='trust_region'"
    with pytest.raises(ValueError, match=message):
        check_support(preset('trpo'), recorded=True)
    check_support(preset('trpo'), recorded=False)
    check_support(preset('grpo'), recorded=True)
