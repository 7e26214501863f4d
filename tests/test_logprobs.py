"""Log-probs and KL against a plain forward pass and against the sampler; weights."""

import functools

import jax
import numpy as np
import oracle
import pytest
import tiny

from grpo_jax.algorithm.logprobs import completion_logprobs, token_weights
from grpo_jax.algorithm.sample import sample
from grpo_jax.algorithm.trpo import completion_kl
from grpo_jax.types import Sampling

VARIANTS = {
    'grouped query': {},
    'multi head, stored': {'kv_heads': 4, 'remat': False},
    'multi query, q/k norm': {'kv_heads': 1, 'qk_norm': 'head'},
    'biases, untied': {'attention_bias': True, 'tied_head': False},
    'everything': {
        'attention_bias': True,
        'qk_norm': 'head',
        'tied_head': False,
        'rope_theta': 500.0,
        'norm_eps': 1e-2,
    },
}
SAMPLINGS = {
    'plain': Sampling(),
    'cool': Sampling(temperature=0.7),
    'top-k': Sampling(top_k=5),
    'cool top-k': Sampling(temperature=0.7, top_k=20),
    'top-p': Sampling(top_p=0.8),
    'min-p': Sampling(min_p=0.1),
    'all': Sampling(temperature=1.3, top_k=30, top_p=0.9, min_p=0.02),
}


def logprobs(model, params, rollout, sampling=Sampling(), **options):  # noqa: B008
    """[B, G, T] log-probs and entropies or None."""
    options = {'chunk': 2} | options
    return completion_logprobs(model, params, rollout, sampling, **options)


@functools.cache
def scorer(model, **options):
    """Compiled once for each model and options; parameters, rollout and sampling are arguments."""
    return tiny.jit(functools.partial(logprobs, model, **options))


# One forward pass over a prompt is worth G


@pytest.mark.parametrize(
    'variant', tiny.some_slow(VARIANTS, 'multi query, q/k norm', 'biases, untied')
)
def test_shared_prompt_equals_naive(variant, rollout):
    """Log-probs and gradients, to 1e-5: 3 completions of prompts of 6, 1, 4 and 5 tokens."""
    model = tiny.make_model(**VARIANTS[variant])
    params = tiny.make_params(model)
    cotangent = np.random.default_rng(1).standard_normal(rollout.mask.shape) * rollout.mask / 10

    def loss(params):
        out = logprobs(model, params, rollout)[0]
        return (out * cotangent).sum(), out

    (_, ours), gradient = tiny.jit(jax.value_and_grad(loss, has_aux=True))(params)

    def plain(params, xp=np):
        return oracle.completion_logits(params, rollout, model.config, xp)

    expected = oracle.logprobs(plain(oracle.float64(params)), rollout.tokens)
    expected_gradient = oracle.pull_back(plain, params, rollout.tokens, cotangent)
    np.testing.assert_allclose(ours, expected, atol=1e-5)
    assert tiny.largest(expected_gradient) > 0.5
    worst = tiny.gap(gradient, expected_gradient)
    print(f'{variant}: log-probs {np.abs(ours - expected).max():.1e}, gradients {worst:.1e}')
    assert worst <= 1e-5


# Chunks, filters, entropy


@pytest.mark.parametrize('chunk', [1, 3, 5, 64])
def test_chunks_change_nothing(chunk, model, params, rollout):
    reference = scorer(model)(params, rollout)[0]
    ours = scorer(model, chunk=chunk)(params, rollout)[0]
    np.testing.assert_allclose(ours, reference, atol=1e-6)


@pytest.mark.parametrize('name', SAMPLINGS)
def test_filters_and_entropy_equal_the_oracle(name, model, params, rollout):
    """A sampled token always counts as inside the support; tokens are random, so many are not."""
    sampling = SAMPLINGS[name]
    ours, entropy = scorer(model, entropy=True)(params, rollout, sampling)
    logits = oracle.completion_logits(oracle.float64(params), rollout, model.config)
    for i in np.ndindex(rollout.tokens.shape):
        token = rollout.tokens[i]
        expected = oracle.distribution(logits[i], *sampling, keep=token)
        inside = expected[expected > 0]
        assert ours[i] == pytest.approx(np.log(expected[token]), abs=2e-5)
        assert entropy[i] == pytest.approx(-(inside * np.log(inside)).sum(), abs=2e-5)


def test_entropy_is_only_computed_when_asked_for(model, params, rollout):
    assert scorer(model)(params, rollout)[1] is None


def test_a_moved_policy_has_finite_logprobs_and_gradients(model, params, rollout):
    """top-k of 1 keeps one token; the others were sampled when the policy was different."""

    def loss(params):
        return logprobs(model, params, rollout, Sampling(top_k=1))[0].sum()

    value, gradient = tiny.jit(jax.value_and_grad(loss))(params)
    assert np.isfinite(value)
    assert np.isfinite(tiny.largest(gradient))
    assert tiny.largest(gradient) > 0.1


# The KL between two policies


@functools.cache
def divergence(model, chunk=2):
    """Compiled once: both policies, rollout and sampling are arguments."""
    return tiny.jit(functools.partial(completion_kl, model, chunk=chunk))


@pytest.fixture(scope='module')
def moved(params):
    """Far enough that filters keep other tokens than before."""
    other = tiny.make_params(tiny.make_model(), seed=5)
    return jax.tree.map(lambda a, b: a + 0.2 * b, params, other)


@pytest.mark.parametrize('name', SAMPLINGS)
def test_kl_equals_the_oracle(name, model, params, moved, rollout):
    """The new policy keeps what its filters keep, and what the old one's do."""
    sampling = SAMPLINGS[name]
    ours = divergence(model)(params, moved, rollout, sampling)
    old, new = (
        oracle.completion_logits(oracle.float64(p), rollout, model.config) for p in (params, moved)
    )
    dropped = added = 0
    for i in np.ndindex(rollout.tokens.shape):
        token = rollout.tokens[i]
        p = oracle.distribution(old[i], *sampling, keep=token)
        own = oracle.distribution(new[i], *sampling, keep=token) > 0
        scaled = new[i] / sampling.temperature
        q = np.where(own | (p > 0), np.exp(scaled - scaled.max()), 0)
        q /= q.sum()
        inside = p > 0
        expected = (p[inside] * np.log(p[inside] / q[inside])).sum()
        assert ours[i] == pytest.approx(expected, abs=1e-5, rel=1e-4)
        dropped += (inside & ~own).sum()
        added += (own & ~inside).sum()
    assert np.median(ours) > 1e-3
    filtered = name not in ('plain', 'cool')
    assert (dropped > 5) == (added > 5) == filtered  # the supports do differ


@pytest.mark.parametrize('chunk', [1, 5, 64])
def test_chunks_change_no_kl(chunk, model, params, moved, rollout):
    expected = divergence(model)(params, moved, rollout, SAMPLINGS['all'])
    ours = divergence(model, chunk)(params, moved, rollout, SAMPLINGS['all'])
    np.testing.assert_allclose(ours, expected, atol=1e-6)


def test_kl_and_its_derivatives_with_filters(model, params, moved, rollout):
    """Zero with gradient zero between a policy and itself; finite to second order elsewhere."""

    @tiny.jit
    def derivatives(old, new, sampling):
        def total(old, new):
            kl = completion_kl(model, old, new, rollout, sampling, chunk=2)
            return kl.sum(), kl

        by_both = jax.grad(total, argnums=(0, 1), has_aux=True)
        (by_old, by_new), kl = by_both(old, new)
        along = jax.jvp(lambda p: jax.grad(total, 1, has_aux=True)(old, p)[0], (new,), (new,))[1]
        return kl, by_old, by_new, along

    for name, sampling in (SAMPLINGS | {'one': Sampling(top_k=1)}).items():
        kl, by_old, by_new, along = derivatives(params, params, sampling)
        np.testing.assert_allclose(kl, 0, atol=1e-6, err_msg=name)
        assert tiny.largest(by_new) < 1e-4, name
        assert tiny.largest(along) > 0.1, name
        kl, by_old, by_new, along = derivatives(params, moved, sampling)
        assert tiny.largest(by_old) == 0, name
        assert tiny.largest(by_new) > 0.1, name
        assert np.isfinite(tiny.largest(along)), name
        assert np.isfinite(kl).all(), name
        assert np.min(kl) > -1e-6, name


# The sampler agrees


@pytest.mark.parametrize('name', SAMPLINGS)
def test_sampler_equals_scorer(name, model, params, rollout):
    drawn = sample(
        model,
        params,
        rollout.prompts,
        seed=0,
        step=0,
        sampling=SAMPLINGS[name],
        eos_ids=np.array([3, 11, 40]),
        group_size=8,
        max_tokens=9,
    )
    scored = scorer(model)(params, drawn, SAMPLINGS[name])[0]
    difference = np.abs(np.where(drawn.mask, drawn.logprobs - scored, 0)).max()
    print(f'{name}: {difference:.1e}')
    assert difference <= 1e-4
    assert np.asarray(drawn.mask).sum() > 50
    if name != 'plain':  # without the setting the same tokens have other log-probs
        ignored = scorer(model)(params, drawn, Sampling())[0]
        assert np.abs(np.where(drawn.mask, drawn.logprobs - ignored, 0)).max() > 1e-2


def test_sampler_equals_scorer_in_bfloat16(rollout):
    """Both round the same things: norm scales stay float32, matrices and biases do not."""
    model = tiny.make_model(dtype='bfloat16', attention_bias=True, qk_norm='head')
    params = tiny.make_params(model)
    drawn = sample(
        model,
        params,
        rollout.prompts,
        seed=0,
        step=0,
        sampling=Sampling(),
        eos_ids=np.array([3]),
        group_size=8,
        max_tokens=9,
    )
    scored = scorer(model)(params, drawn)[0]
    assert np.abs(np.where(drawn.mask, drawn.logprobs - scored, 0)).max() <= 1e-4


# Weights


MASK = np.array([[[1, 1, 0], [1, 0, 0]], [[1, 1, 1], [0, 0, 0]]], bool)


@pytest.mark.parametrize(
    ('aggregation', 'expected'),
    [
        # rows of 2, 1, 3 and 0 tokens among B G = 4
        ('sequence_mean', [[[1 / 8, 1 / 8, 0], [1 / 4, 0, 0]], [[1 / 12] * 3, [0, 0, 0]]]),
        ('token_mean', [[[1 / 6, 1 / 6, 0], [1 / 6, 0, 0]], [[1 / 6] * 3, [0, 0, 0]]]),
        ('constant', [[[1 / 12, 1 / 12, 0], [1 / 12, 0, 0]], [[1 / 12] * 3, [0, 0, 0]]]),
        ('sequence_sum', [[[1 / 4, 1 / 4, 0], [1 / 4, 0, 0]], [[1 / 4] * 3, [0, 0, 0]]]),
    ],
)
def test_weights_by_hand(aggregation, expected):
    np.testing.assert_allclose(token_weights(MASK, aggregation=aggregation), expected, rtol=1e-6)


@pytest.mark.parametrize('aggregation', ['sequence_mean', 'token_mean', 'constant', 'sequence_sum'])
def test_weights_of_ragged_rows(aggregation, rollout):
    ours = token_weights(rollout.mask, aggregation=aggregation)
    np.testing.assert_allclose(ours, oracle.weights(rollout.mask, aggregation), rtol=1e-6)


def test_weights_of_nothing_are_zero():
    for aggregation in ('sequence_mean', 'token_mean', 'constant', 'sequence_sum'):
        assert (
            np.asarray(token_weights(np.zeros((2, 2, 3), bool), aggregation=aggregation)) == 0
        ).all()


def test_unknown_aggregation():
    with pytest.raises(
        ValueError, match=r"aggregation='sum' is unknown: use one of sequence_mean, "
    ):
        token_weights(MASK, aggregation='sum')
