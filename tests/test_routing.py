"""The sampler's experts in later passes: recording, and computing with recorded experts."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from grpo_jax.algorithm.logprobs import completion_logprobs
from grpo_jax.algorithm.sample import sample
from grpo_jax.engine.compute import Compute, choose
from grpo_jax.engine.policy import Policy
from grpo_jax.models import apply, apply_routed, unstack_layers
from grpo_jax.models.layers import CHOSEN, experts
from grpo_jax.models.routing import apply_recording
from grpo_jax.types import Batch, Prompts, Sampling

EXPERTS = {'experts': 5, 'experts_per_token': 2}
SHAPE = (4, 3, 6, 5)  # B, G, P, T

PLANS = {
    'one chunk': (True, Compute()),
    'whole completions': (False, Compute(logprob_chunk=2)),
    'bundles': (True, Compute(rows=4, microbatch=4)),
    'packed': (True, Compute(rows=4, microbatch=4, packed=True)),
    'unrolled': (True, Compute(unroll=True, microbatch=2)),
}


def assert_close(ours, expected):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=2e-5), ours, expected)


class Layer(nn.Module):
    """The experts alone."""

    config: object
    scanned: bool = False

    @nn.compact
    def __call__(self, x):
        return experts(self, x)


@pytest.mark.parametrize('normalize', [True, False])
def test_given_experts_equal_numpy(normalize):
    config = tiny.make_model(**EXPERTS, normalize_experts=normalize).config
    rng = np.random.default_rng(0)
    x = rng.standard_normal((7, config.width))
    chosen = np.stack([rng.permutation(5)[:2] for _ in range(7)])
    layer = Layer(config)
    shapes = jax.eval_shape(layer.init, jax.random.key(0), jnp.float32(x))['params']
    params = jax.tree.map(lambda s: 0.3 * rng.standard_normal(s.shape), shapes)
    ours = layer.apply(
        {'params': jax.tree.map(jnp.float32, params), CHOSEN: {'experts': jnp.asarray(chosen)}},
        jnp.float32(x),
    )
    scores = np.exp(x @ params['router'])
    scores /= scores.sum(-1, keepdims=True)
    expected = np.zeros_like(x)
    for i, pair in enumerate(chosen):
        total = scores[i, pair].sum() if normalize else 1
        for e in pair:
            gate, up = x[i] @ params['gate'][e], x[i] @ params['up'][e]
            out = (gate / (1 + np.exp(-gate)) * up) @ params['down'][e]
            expected[i] += scores[i, e] / total * out
    np.testing.assert_allclose(ours, expected, rtol=1e-4, atol=1e-6)


@functools.cache
def recorded(block=0, unroll=False):
    """A policy with experts, its recorded samples, and a policy whose routers choose others."""
    model = tiny.make_model(**EXPERTS)
    params, other = (tiny.make_params(model, seed) for seed in (0, 1))
    prompts = Prompts(*map(jnp.asarray, tiny.make_rollout().prompts[:3]))
    rollout = sample(
        model, params, prompts, seed=0, step=0, sampling=Sampling(), eos_ids=np.arange(9),
        group_size=SHAPE[1], max_tokens=SHAPE[3], block=block, record=('routing',), unroll=unroll,
    )  # fmt: skip
    return model, params, other, rollout


def logprobs_and_routing(model, params, rollout):
    """Of every completion as a part of one long prompt: no cache, no groups.

    Returns:
      Log-probs with the recorded experts, and the experts that the model chooses by itself.
    """
    prompts, (groups, size, length) = rollout.prompts, rollout.mask.shape
    rows, experts_of_rows, starts = [], [], []
    for b, g in np.ndindex(groups, size):
        n = int(prompts.length[b])
        pad = [(0, prompts.tokens.shape[1] - n)]
        row = np.concatenate([prompts.tokens[b, :n], rollout.tokens[b, g]])
        recorded = np.concatenate([prompts.routing[b, : n - 1], rollout.routing[b, g]])
        rows.append(np.pad(row[:-1], pad))
        experts_of_rows.append(np.pad(recorded, [*pad, (0, 0), (0, 0)]))
        starts.append(n)
    rows, starts = np.stack(rows), np.asarray(starts)
    at = starts[:, None] - 1 + np.arange(length)  # the token from which each one is predicted
    own = tiny.jit(functools.partial(apply_recording, model, method='prefill'))(
        params, rows, np.full(len(rows), rows.shape[1])
    )[1]
    own = np.reshape(own, (*rows.shape, *own.shape[1:]))[np.arange(len(rows))[:, None], at]

    def predict(params, experts, tokens, lengths):
        last = apply_routed(model, params, experts, tokens, lengths, method='prefill')[1]
        return jax.nn.log_softmax(apply(model, params, last, method='logits'))

    prefixes = (np.repeat(x, length, axis=0) for x in (np.stack(experts_of_rows), rows))
    every = np.asarray(tiny.jit(predict)(params, *prefixes, at.reshape(-1) + 1))
    logprobs = every[np.arange(len(every)), np.reshape(rollout.tokens, -1)]
    shape = rollout.mask.shape
    return logprobs.reshape(shape), own.reshape(*shape, *own.shape[2:])


def test_the_recorded_experts_are_those_of_the_sampler():
    """Those of a token's input, so that they are aligned with the token that it predicts."""
    model, params, _, rollout = recorded()
    mask = np.asarray(rollout.mask)
    logprobs, routing = logprobs_and_routing(model, params, rollout)
    np.testing.assert_array_equal(rollout.routing[mask], routing[mask])
    np.testing.assert_allclose(rollout.logprobs[mask], logprobs[mask], atol=2e-5)
    assert rollout.routing.dtype == np.uint8


@functools.cache
def expected_of_another():
    model, _, other, rollout = recorded()
    return logprobs_and_routing(model, other, rollout)


@functools.cache
def expected_gradient():
    model, _, other, rollout = recorded()

    def loss(params):
        logprobs, _ = completion_logprobs(model, params, rollout, Sampling())
        return 0.1 * jnp.where(rollout.mask, logprobs, 0.0).sum()

    return tiny.jit(jax.grad(loss))(other)


@pytest.mark.parametrize('plan', tiny.some_slow(list(PLANS), 'bundles', 'unrolled'))
def test_all_ways_to_compute_a_gradient_use_the_recorded_experts(plan):
    model, _, other, rollout = recorded()
    tokenwise, compute = PLANS[plan]
    mask = np.asarray(rollout.mask)
    weights = jnp.where(rollout.mask, 0.1, 0.0)
    batch = Batch(rollout, weights, weights)
    expected, routing = expected_of_another()
    assert (routing[mask] != rollout.routing[mask]).any()  # its own routers choose others
    policy = Policy(model, None, Sampling(), choose(compute, model.config, SHAPE))
    gradient, outputs = tiny.jit(
        lambda params: policy.gradient(
            lambda logprobs, _, part: (part.weights * logprobs).sum(), params, batch,
            tokenwise=tokenwise, entropy=False,
        )
    )(other)  # fmt: skip
    np.testing.assert_allclose(outputs['logprobs'][mask], expected[mask], atol=2e-5)
    assert_close(gradient, expected_gradient())


@pytest.mark.parametrize('options', [{'block': 2}, {'unroll': True}])
def test_blocks_and_separate_layers_record_the_same(options):
    _, _, _, whole = recorded()
    _, _, _, other = recorded(**options)
    mask = np.asarray(whole.mask)
    np.testing.assert_array_equal(other.routing[mask], whole.routing[mask])


def test_separate_layers_use_recorded_experts():
    model, _, other, rollout = recorded()
    prompts = rollout.prompts
    arguments = prompts.routing, prompts.tokens, prompts.length
    expected = apply_routed(model, other, *arguments, method='prefill')
    ours = apply_routed(
        model.clone(unrolled=True), unstack_layers(other), *arguments, method='prefill'
    )
    assert_close(ours, expected)
