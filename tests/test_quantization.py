"""Weights of one byte: rounding by hand and by properties, the model they make, runs with them."""

import functools

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
import runs
import tiny
from hypothesis.extra import numpy as arrays
from test_transformer import decode_logits, group_logits, run

from grpo_jax import models, sharding
from grpo_jax.algorithm.sample import sample, sample_blocks
from grpo_jax.engine.sampling_params import sampling_params
from grpo_jax.models import Lora, Quantized
from grpo_jax.models.layers import Projection, multiply
from grpo_jax.run import collector, report, setup
from grpo_jax.types import Sampling

# The axes of a parameter, after that of layers, along which output channels differ.
CHANNELS = {
    'embedding': 'v.', 'head': '.v', 'query': 'l.hw', 'key': 'l.kw', 'value': 'l.kw',
    'out': 'l..d', 'gate': 'l.m', 'up': 'l.m', 'down': 'l.d',
}  # fmt: skip
CHANNELS_OF_EXPERTS = CHANNELS | {'gate': 'le.m', 'up': 'le.m', 'down': 'le.d'}
EVERYTHING = {'attention_bias': True, 'out_bias': True, 'mlp_bias': True, 'tied_head': False}
EXPERTS = {'experts': 3, 'experts_per_token': 2, 'tied_head': False}
LORA = Lora(rank=3, alpha=5.0)
MODELS = {
    'adapters': EVERYTHING | {'lora': LORA},
    'experts': EXPERTS,
    'scaled, capped': {'embedding_scaled': True, 'logit_softcap': 3.0, 'norms': 'both'},
}

quantize = jax.jit(models.quantize)


def is_quantized(x):
    return isinstance(x, Quantized)


def named(params):
    """(name, leaf) pairs of a tree, the quantized matrices in one piece."""
    found = jax.tree_util.tree_leaves_with_path(params, is_leaf=is_quantized)
    return [(path[-1].key, leaf) for path, leaf in found]


def dequantized(params):
    """The weights that the integers stand for, in float64."""

    def one(x):
        if is_quantized(x):
            return np.asarray(x.values, np.float64) * np.asarray(x.scale, np.float64)
        return np.asarray(x, np.float64)

    return jax.tree.map(one, params, is_leaf=is_quantized)


def float32(params):
    return jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), params)


# Rounding


def test_by_hand():
    """A scale for each column of [D, M], each row of the embedding, each last axis of [H, h, D]."""
    gate = np.float32([[[1.27, 0.0], [-0.504, 0.0], [0.006, -254.0]]])
    made = quantize({'blocks': {'gate': gate, 'router': gate}, 'embedding': gate[0]})
    values, scale = made['blocks']['gate']
    assert values.tolist() == [[[127, 0], [-50, 0], [1, -127]]]
    np.testing.assert_allclose(scale, [[[0.01, 2.0]]], rtol=1e-6)
    np.testing.assert_array_equal(made['blocks']['router'], gate)
    values, scale = made['embedding']
    assert values.tolist() == [[127, 0], [-127, 0], [0, -127]]
    np.testing.assert_allclose(scale, [[0.01], [0.504 / 127], [2.0]], rtol=1e-6)
    out = np.float32([[[2.0, 1.0], [-6.35, 0.0]], [[12.7, -1.0], [0.0, 0.5]]])[None]
    values, scale = quantize({'out': out})['out']
    assert values.tolist() == [[[[20, 127], [-64, 0]], [[127, -127], [0, 64]]]]
    np.testing.assert_allclose(scale.ravel(), [0.1, 1 / 127], rtol=1e-6)


def test_zeros_stay_zero_and_what_is_not_finite_shows():
    head = np.zeros((4, 3), np.float32)
    head[1, 1:] = np.nan, -np.inf
    head[2] = 1.0
    head[2, 0] = 0.0
    values, scale = quantize({'head': head})['head']
    back = np.asarray(values, np.float32) * scale
    assert (back[:, 0] == 0).all()
    assert np.isnan(np.float32([[0, 0, 1, 0]]) @ back)[0].tolist() == [False, True, True]


def test_every_matrix_and_nothing_else():
    for options, channels in (
        (EVERYTHING | {'lora': LORA, 'qk_norm': 'head'}, CHANNELS),
        (EXPERTS, CHANNELS_OF_EXPERTS),
    ):
        params = tiny.make_params(tiny.make_model(**options))
        before, after = dict(named(params)), dict(named(quantize(params)))
        assert {name for name, leaf in after.items() if is_quantized(leaf)} == set(channels)
        for name, leaf in after.items():
            if not is_quantized(leaf):
                np.testing.assert_array_equal(leaf, before[name])
                continue
            assert leaf.values.dtype == jnp.int8  # a byte for each weight
            assert leaf.values.nbytes == before[name].size
            assert leaf.values.shape == before[name].shape
            sizes = [
                1 if a == '.' else n for a, n in zip(channels[name], leaf.values.shape, strict=True)
            ]
            assert leaf.scale.shape == tuple(sizes)
            assert leaf.scale.dtype == jnp.float32


@hypothesis.settings(max_examples=50)
@hypothesis.given(
    name=st.sampled_from(sorted(CHANNELS)), seed=st.integers(0, 2**31), power=st.integers(-30, 30)
)
def test_a_weight_is_off_by_half_a_step_at_most(name, seed, power):
    """And the largest of a channel by nothing; channels of very different size."""
    rng = np.random.default_rng(seed)
    axes = CHANNELS[name]
    shape = (2, 3, 4, 5)[: len(axes)]
    channel = [1 if axis == '.' else n for axis, n in zip(axes, shape, strict=True)]
    spread = 10.0 ** rng.integers(-3, 4, channel)
    weights = np.float32(rng.standard_normal(shape) * spread * 2.0**power)
    back = dequantized(quantize({name: weights}))[name]
    summed = tuple(i for i, axis in enumerate(axes) if axis == '.')
    largest = np.abs(weights).max(summed, keepdims=True)
    assert (np.abs(back - weights) <= largest / 254 * (1 + 1e-4)).all()
    edge = np.abs(weights) == largest
    np.testing.assert_allclose(back[edge], weights[edge], rtol=1e-6)


@hypothesis.settings(max_examples=50)
@hypothesis.given(
    whole=arrays.arrays(np.int8, (5, 4), elements=st.integers(-127, 127)),
    powers=arrays.arrays(np.int64, 4, elements=st.integers(-40, 40)),
)
def test_what_is_on_the_grid_stays(whole, powers):
    whole[0] = 127  # so that the step is the power of two
    weights = np.float32(whole * 2.0**powers)
    values, scale = quantize({'head': weights})['head']
    np.testing.assert_array_equal(values, whole)
    np.testing.assert_allclose(scale[0], 2.0**powers, rtol=1e-6)


# The model


@functools.cache
def pair(name):
    """A model, its parameters and these quantized."""
    model = tiny.make_model(**MODELS[name])
    params = tiny.make_params(model)
    return model, params, quantize(params)


@pytest.mark.parametrize('name', MODELS)
def test_logits_are_those_of_the_rounded_weights(name, rollout):
    model, params, small = pair(name)
    ours = run(decode_logits, model, small, rollout)
    expected = run(decode_logits, model, float32(dequantized(small)), rollout)
    assert np.abs(expected).max() > 1  # else the tolerance says nothing
    np.testing.assert_allclose(ours, expected, atol=2e-5)
    assert tiny.gap(ours, run(decode_logits, model, params, rollout)) > 1e-2


def test_logits_equal_naive(rollout):
    model = tiny.make_model(tied_head=False, attention_bias=True)
    small = quantize(tiny.make_params(model))
    naive = oracle.completion_logits(dequantized(small), rollout, model.config)
    np.testing.assert_allclose(run(decode_logits, model, small, rollout), naive, atol=1e-5)


def test_adapters_stay_exact(rollout):
    """Of a base of zeros they are all that is left."""
    model, params, _ = pair('adapters')
    base, adapters = models.split_adapters(params)
    base['blocks'] = {name: 0 * x if name in CHANNELS else x for name, x in base['blocks'].items()}
    params = models.join_adapters(base, adapters)
    params['embedding'] = jnp.sign(params['embedding'])  # on the grid
    params['head'] = jnp.sign(params['head'])
    ours = run(group_logits, model, quantize(params), rollout)
    np.testing.assert_allclose(ours, run(group_logits, model, params, rollout), atol=1e-5)


@pytest.mark.parametrize('dtype', ['bfloat16', 'float16'])
def test_narrow_computations(dtype):
    """Integers' products are summed in float32: those here would be infinite in float16."""
    config = tiny.make_model(dtype=dtype).config
    kernel = jnp.full((16, 2), 127, dtype).at[0, 0].set(0)
    by = Projection(kernel, jnp.float32([1 / 127, 1 / 1270]), None, None)
    x = jnp.full((1, 16), 1000.0, dtype)
    made = multiply(config, x, by)
    assert made.dtype == dtype
    np.testing.assert_allclose(np.float32(made), [[15_000, 1600]], rtol=4e-3)


# Samples

SETTINGS = {
    'seed': 0,
    'step': 0,
    'sampling': Sampling(),
    'eos_ids': np.arange(6),
    'group_size': 4,
    'max_tokens': 7,
}


def completions(model, params, prompts, **options):
    return jax.device_get(sample(model, params, prompts, **(SETTINGS | options)))


def test_tokens_and_logprobs_are_those_of_the_rounded_weights(rollout):
    model, params, small = pair('adapters')
    ours = completions(model, params, rollout.prompts, weights='int8')
    expected = completions(model, float32(dequantized(small)), rollout.prompts)
    np.testing.assert_array_equal(ours.tokens, expected.tokens)
    np.testing.assert_array_equal(ours.mask, expected.mask)
    np.testing.assert_allclose(ours.logprobs, expected.logprobs, atol=1e-5)


def test_logprobs_equal_naive(model, params, rollout):
    ours = completions(model, params, rollout.prompts, weights='int8')
    gaps = [
        np.abs(oracle.logprobs(logits, ours.tokens) - ours.logprobs)[ours.mask]
        for logits in (
            oracle.completion_logits(tree, ours, model.config)
            for tree in (dequantized(quantize(params)), oracle.float64(params))
        )
    ]
    assert gaps[0].max() < 1e-5
    assert gaps[1].mean() > 1e-3  # the exact model says something else


def test_weights_are_rounded_from_the_parameters_and_not_from_their_copy(rollout, monkeypatch):
    """Which is in bfloat16 here; converting is traced once."""
    traced = []
    monkeypatch.setattr(
        'grpo_jax.engine.sampling_params.quantize',
        lambda tree: traced.append(1) or models.quantize(tree),
    )
    model = tiny.make_model(dtype='bfloat16')
    params = tiny.make_params(model)
    made = sampling_params(params, 'bfloat16', 'int8', unroll=False)
    assert tiny.same(
        *([x for _, x in named(tree) if is_quantized(x)] for tree in (made, quantize(params)))
    )
    rest = {x.dtype.name for name, x in named(made) if not is_quantized(x) and name != 'scale'}
    assert rest <= {'bfloat16'}
    assert traced
    traced.clear()
    drawn = completions(model, params, rollout.prompts, weights='int8')
    assert not traced
    logits = run(group_logits, model, made, rollout._replace(tokens=drawn.tokens))
    expected = oracle.logprobs(np.asarray(logits, np.float64), drawn.tokens)
    np.testing.assert_allclose(drawn.logprobs[drawn.mask], expected[drawn.mask], atol=0.1)


def test_unknown_weights(model, params, rollout):
    with pytest.raises(ValueError, match="weights='int4' is unknown: use one of model, int8"):
        completions(model, params, rollout.prompts, weights='int4')


@pytest.mark.slow
def test_samples_on_a_mesh():
    """Their matrices lie like those that they are made from."""
    model = tiny.make_model(vocab_size=72, attention_bias=True, tied_head=False)
    params, prompts = tiny.make_params(model), tiny.make_rollout(vocab=72, groups=8).prompts
    alone = completions(model, params, prompts, weights='int8')
    mesh = sharding.make_mesh(fsdp=4, tensor=2)
    placed = jax.device_put(params, sharding.shardings(params, mesh))
    for name, leaf in named(sampling_params(placed, 'float32', 'int8', unroll=False)):
        if is_quantized(leaf):
            exact = dict(named(placed))[name]
            assert leaf.values.sharding.is_equivalent_to(exact.sharding, exact.ndim)
    groups = sharding.put_groups(prompts, mesh)
    meshed = completions(model, placed, groups, weights='int8', mesh=mesh)
    np.testing.assert_array_equal(meshed.tokens, alone.tokens)
    np.testing.assert_array_equal(meshed.mask, alone.mask)
    np.testing.assert_allclose(meshed.logprobs, alone.logprobs, atol=1e-5)


# A run


def test_a_run_reports_and_corrects_the_mismatch(tmp_path, monkeypatch):
    """Only what is trained on is sampled with rounded weights; the temperatures tell which."""
    asked = []

    def noting(draw):
        def drawn(*args, weights='model', **options):
            asked.append((weights, float(options['sampling'].temperature)))
            return draw(*args, weights=weights, **options)

        return drawn

    monkeypatch.setattr(setup, 'sample', noting(sample))
    monkeypatch.setattr(collector, 'sample_blocks', noting(sample_blocks))
    config = runs.get_config()
    config.sft.steps = 0
    config.grpo.update(weights='int8', steps=4)
    config.grpo.sampling.temperature = 0.9
    config.grpo.algorithm.importance = 'token'
    runs.train(config, tmp_path)
    assert set(asked) == {('int8', 0.9), ('model', 0.0), ('model', 1.0)}
    for row in report.read(tmp_path / 'metrics.jsonl', 'grpo'):
        ratio = {k: row[f'sampling/importance_sampling_ratio/{k}'] for k in ('min', 'mean', 'max')}
        assert ratio['min'] < 0.995
        assert ratio['mean'] == pytest.approx(1, abs=0.02)
        assert ratio['max'] > 1.005
        assert row['sampling/sampling_logp_difference/max'] > 0.005
        assert row['sampling/sampling_logp_difference/mean'] > 0.001
