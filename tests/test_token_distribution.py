"""The distribution that tokens are drawn from: temperature and filters."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
import tiny

from grpo_jax import models
from grpo_jax.algorithm.logprobs import completion_logprobs
from grpo_jax.algorithm.sample import sample
from grpo_jax.engine.chunked_loss import ChunkedLoss
from grpo_jax.engine.token_distribution import filter_logits, filter_with_peak, token_logprobs
from grpo_jax.types import Batch, Sampling

filters = jax.jit(filter_logits)


@pytest.mark.parametrize('name', tiny.FILTERS)
def test_filters_equal_the_oracle(name):
    """The order matters: top-p applies to the renormalized distribution that top-k leaves."""
    logits = 2 * np.random.default_rng(0).standard_normal((6, tiny.VOCAB)).astype(np.float32)
    ours = jax.nn.softmax(filters(logits, tiny.FILTERS[name]))
    expected = np.stack([oracle.distribution(row, *tiny.FILTERS[name]) for row in logits])
    np.testing.assert_array_equal(np.asarray(ours) > 0, expected > 0)
    np.testing.assert_allclose(ours, expected, atol=1e-6)


def test_filters_by_hand():
    logits = np.log(np.float32([0.5, 0.25, 0.125, 0.125]))

    def kept(**options):
        return (np.asarray(filters(logits, Sampling(**options))) > -np.inf).tolist()

    assert kept(top_k=2) == [True, True, False, False]
    assert kept(top_k=3) == [True, True, True, True]  # the fourth is tied with the third
    assert kept(top_p=0.45) == [True, False, False, False]
    assert kept(top_p=0.6) == [True, True, False, False]
    assert kept(top_k=2, top_p=0.7) == [True, True, False, False]  # 0.5 of 0.75 is below 0.7
    assert kept(top_k=2, top_p=0.6) == [True, False, False, False]  # and above 0.6
    assert kept(min_p=0.4) == [True, True, False, False]
    assert kept(temperature=0.5, min_p=0.4) == [True, False, False, False]  # squared: a quarter


@pytest.mark.parametrize('positions', [1, 7, 12, 64])  # in 1, 1, 4 and 32 pieces
def test_positions_are_filtered_independently(positions):
    logits = np.random.default_rng(0).standard_normal((2, 3, positions, 9)).astype(np.float32)
    sampling = Sampling(top_k=6, top_p=0.8)
    rows = [filters(row, sampling) for row in logits.reshape(-1, 9)]
    np.testing.assert_array_equal(filters(logits, sampling).reshape(-1, 9), rows)


@pytest.mark.parametrize('sampling', [Sampling(), Sampling(min_p=0.1), Sampling(top_k=2)])
def test_no_filter_hides_a_nan(sampling):
    """Not even that of a token that was not drawn."""
    logits = np.float32([[0.0, 2.0, np.nan, 1.0]])
    assert np.isnan(filter_logits(logits, sampling)).any()
    assert np.isnan(filter_logits(logits, sampling, keep=np.array([1]))).any()


@pytest.mark.parametrize('name', tiny.FILTERS)
def test_the_largest_logit_is_known_before_the_filters(name):
    logits = np.random.default_rng(0).standard_normal((2, 3, tiny.VOCAB)).astype(np.float32)
    filtered, peak = jax.jit(filter_with_peak)(logits, tiny.FILTERS[name])
    np.testing.assert_array_equal(peak, filtered.max(-1))


def test_filters_that_are_none_are_not_compiled():
    """The result is that of filters that keep all tokens; active filters share one search."""
    logits = np.random.default_rng(0).standard_normal((1, tiny.VOCAB)).astype(np.float32)
    without = Sampling(0.7, None, None, None)
    np.testing.assert_allclose(filters(logits, without), filters(logits, Sampling(0.7)), rtol=1e-6)

    def counted(sampling):
        program = str(jax.make_jaxpr(filter_logits)(logits, sampling))
        return [program.count(f'{loop}[') for loop in ('cond', 'while', 'scan')]

    assert counted(without) == [0, 0, 0]
    assert (
        counted(Sampling(0.7, 5, None, None)) == counted(Sampling(0.7, 5, 0.9, None)) == [1, 1, 1]
    )
    assert counted(Sampling(0.7, None, None, 0.1)) == [1, 0, 0]


@pytest.mark.parametrize('options', [{'top_k': 3}, {'top_p': 0.8}, {'min_p': 0.1}])
def test_each_filter_alone(options):
    """The others are None, or keep all tokens."""
    logits = np.random.default_rng(0).standard_normal((4, tiny.VOCAB)).astype(np.float32)
    alone = Sampling(0.7, **{'top_k': None, 'top_p': None, 'min_p': None} | options)
    kept = np.asarray(filters(logits, alone))
    assert 0 < np.isinf(kept).sum() < kept.size
    np.testing.assert_allclose(kept, filters(logits, Sampling(0.7, **options)), rtol=1e-6)


def test_a_kept_token_joins_the_support():
    logits = np.random.default_rng(0).standard_normal((5, tiny.VOCAB)).astype(np.float32)
    token = np.argmin(logits, axis=-1)
    ours = jax.nn.softmax(filters(logits, Sampling(top_k=3), keep=token))
    expected = [
        oracle.distribution(row, top_k=3, keep=i) for row, i in zip(logits, token, strict=True)
    ]
    np.testing.assert_allclose(ours, np.stack(expected), atol=1e-6)


# Embeddings that the tokenizer has no tokens for

KNOWN = ((0, 20), (23, 60))  # of 67 ids
UNKNOWN = [20, 21, 22, *range(60, tiny.VOCAB)]


def padded_model(**options):
    """A model whose likeliest tokens are those that the tokenizer lacks."""
    model = tiny.make_model(tied_head=False, token_ranges=KNOWN, **options)
    params = tiny.make_params(model)
    return model, params | {'head': params['head'].at[:, UNKNOWN].multiply(4.0)}


def draws(model, params, sampling):
    rollout = tiny.make_rollout()
    options = {'seed': 0, 'step': 0, 'eos_ids': np.array([3]), 'group_size': 64, 'max_tokens': 5}
    return jax.device_get(sample(model, params, rollout.prompts, sampling=sampling, **options))


@pytest.mark.parametrize('name', ['plain', 'all'])
@pytest.mark.parametrize(
    'options',
    [{}, pytest.param({'logit_softcap': 3.0}, marks=pytest.mark.slow)],
    ids=['plain', 'capped'],
)
def test_unknown_ids_are_never_sampled_and_log_probs_agree(name, options):
    model, params = padded_model(**options)
    sampling = tiny.FILTERS[name]
    rollout = draws(model, params, sampling)
    used = rollout.tokens[rollout.mask]
    assert not np.isin(used, UNKNOWN).any()
    assert len(np.unique(used)) > (30 if name == 'plain' else 5)
    logprobs, entropy = tiny.jit(
        lambda params, rollout: completion_logprobs(model, params, rollout, sampling, entropy=True)
    )(params, rollout)
    mask = rollout.mask
    np.testing.assert_allclose(logprobs[mask], rollout.logprobs[mask], atol=1e-4)
    assert np.isfinite(entropy).all()
    whole = model.clone(config=dataclasses.replace(model.config, token_ranges=()))
    assert np.isin(draws(whole, params, sampling).tokens, UNKNOWN).mean() > 0.1


def test_log_probs_are_over_the_known_ids():
    """The softmax over the columns of the known ids alone, in float64."""
    model, params = padded_model()
    hidden = np.random.default_rng(0).standard_normal((4, model.config.width)).astype(np.float32)
    logits = np.asarray(models.apply(model, params, hidden, method='logits'))
    assert (logits[:, UNKNOWN] == -np.inf).all()
    known = np.setdiff1d(np.arange(tiny.VOCAB), UNKNOWN)
    products = hidden.astype(np.float64) @ np.asarray(params['head'], np.float64)[:, known]
    expected = products - np.log(np.exp(products).sum(-1, keepdims=True))
    targets = np.array([0, 19, 23, 59])
    ours, entropy = token_logprobs(logits, targets, Sampling(), entropy=True)
    rows = expected[np.arange(4), [known.tolist().index(t) for t in targets]]
    np.testing.assert_allclose(ours, rows, atol=1e-5)
    np.testing.assert_allclose(entropy, -(np.exp(expected) * expected).sum(-1), atol=1e-5)


def test_the_chunked_loss_is_over_the_known_ids():
    """Its gradient is that of plain autodiff, 0 for the columns of unknown ids."""
    model, params = padded_model()
    rollout = tiny.make_rollout(vocab=20)
    shape = rollout.tokens.shape
    part = Batch(rollout, advantages=jnp.zeros(shape), weights=jnp.ones(shape)).per_token()
    hidden = np.random.default_rng(2).standard_normal((*shape, model.config.width))
    hidden = hidden.astype(np.float32)

    def loss(logits, part):
        logprobs, entropy = token_logprobs(
            logits, part.rollout.tokens, Sampling(temperature=0.7, top_k=9), entropy=True
        )
        return (part.weights * logprobs * (1 + 0.1 * entropy)).sum(), {'logprobs': logprobs}

    def plain(params, hidden):
        return loss(models.apply(model, params, hidden, method='logits'), part)[0]

    def matrix(params):
        return models.apply(model, params, method='output_matrix')

    zeros = jax.tree.map(jnp.zeros_like, params)
    chunked = ChunkedLoss(model.config, matrix, loss, 2)
    total, states, _ = jax.jit(chunked.add_gradient)(params, hidden, part, zeros)
    expected, expected_states = jax.jit(jax.grad(plain, argnums=(0, 1)))(params, hidden)
    np.testing.assert_allclose(total['head'], expected['head'], atol=1e-5)
    np.testing.assert_allclose(states, expected_states, atol=1e-5)
    assert (np.asarray(total['head'])[:, UNKNOWN] == 0).all()
    assert np.abs(total['head']).max() > 0.1


def test_without_padding_the_program_is_the_same():
    """Bit for bit, since nothing is computed that was not computed before."""
    model, hidden = tiny.make_model(), jax.ShapeDtypeStruct((3, 16), jnp.float32)

    def program(config):
        return str(jax.make_jaxpr(lambda x: models.finish_logits(config, x))(hidden))

    assert 'select' not in program(model.config)
    assert 'select' in program(padded_model()[0].config)


def test_ranges_within_the_vocabulary():
    for ranges in (((0, 68),), ((5, 5),), ((-1, 4),)):
        with pytest.raises(ValueError, match=r'model token_ranges=.* within 0 to vocab_size=67'):
            tiny.make_model(token_ranges=ranges)
