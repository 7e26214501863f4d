"""The decoder's three entries against each other and against a plain forward pass."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
import tiny

from benchmarks.flops import count_flops
from grpo_jax import models
from grpo_jax.models.layers import RMSNorm

EVERYTHING = {
    'attention_bias': True,
    'qk_norm': 'head',
    'tied_head': False,
    'rope_theta': 500.0,
    'norm_eps': 1e-2,
    'head_dim': 8,
}


@functools.cache
def policy(**options):
    model = tiny.make_model(**options)
    return model, tiny.make_params(model)


def group_logits(model, params, rollout):
    """[B, G, T, V] by reading each prompt once."""
    prompts = rollout.prompts
    hidden = models.completion_hidden(model, params, prompts.tokens, prompts.length, rollout.tokens)
    return model.apply({'params': params}, hidden, method='logits')


def decode_logits(model, params, rollout):
    """The same, token by token: each column of keys and values is written before the next step."""
    c, (groups, group_size, max_tokens) = model.config, rollout.tokens.shape
    apply = functools.partial(model.apply, {'params': params})
    length = rollout.prompts.length
    prompt, last = apply(rollout.prompts.tokens, length, method='prefill')
    shape = (c.layers, groups, group_size, c.kv_heads, max_tokens, c.head_dim)
    empty = jnp.zeros(shape, last.dtype)

    def step(own, xs):
        token, t = xs
        hidden, column = apply(token, t, prompt, length, own, method='decode')
        own = jax.tree.map(
            lambda cache, new: jax.lax.dynamic_update_slice_in_dim(cache, new, t, axis=4),
            own,
            column,
        )
        return own, hidden

    columns = jnp.moveaxis(rollout.tokens, -1, 0), jnp.arange(max_tokens)
    _, hidden = jax.lax.scan(step, models.KeyValues(empty, empty), columns)
    first = jnp.broadcast_to(last[:, None], (1, groups, group_size, c.width))
    hidden = jnp.moveaxis(jnp.concatenate([first, hidden[:-1]]), 0, 2)
    return apply(hidden, method='logits')


def run(function, model, params, rollout):
    return tiny.jit(functools.partial(function, model))(params, rollout)


@pytest.mark.parametrize('options', [{}, EVERYTHING], ids=['default', 'everything'])
def test_prefill_and_extend_equal_decode_equal_naive(options, rollout):
    model, params = policy(**options)
    naive = oracle.completion_logits(oracle.float64(params), rollout, model.config)
    assert np.abs(naive).max() > 1  # else the tolerance says nothing
    extended = run(group_logits, model, params, rollout)
    decoded = run(decode_logits, model, params, rollout)
    np.testing.assert_allclose(extended, naive, atol=1e-5)
    np.testing.assert_allclose(decoded, naive, atol=1e-5)


def test_prompt_padding_leaves_no_trace(model, params, rollout):
    """Other padding after the prompts' ends, or more of it, changes nothing."""
    prompts = rollout.prompts
    padding = np.arange(prompts.tokens.shape[1]) >= prompts.length[:, None]
    other = np.where(padding, (prompts.tokens + 1) % tiny.VOCAB, prompts.tokens)
    wider = np.pad(prompts.tokens, ((0, 0), (0, 3)))
    as_is, changed, widened = (
        run(group_logits, model, params, rollout._replace(prompts=prompts._replace(tokens=tokens)))
        for tokens in (prompts.tokens, other, wider)
    )
    np.testing.assert_array_equal(changed, as_is)
    np.testing.assert_allclose(widened, as_is, atol=1e-5)


def test_one_token_completions(model, params, rollout):
    short = rollout._replace(tokens=rollout.tokens[..., :1])
    naive = oracle.completion_logits(oracle.float64(params), short, model.config)
    np.testing.assert_allclose(run(group_logits, model, params, short), naive, atol=1e-5)


def test_bfloat16_computes_in_bfloat16_and_keeps_float32_parameters(rollout):
    model, params = policy(dtype='bfloat16')
    reference = oracle.completion_logits(oracle.float64(params), rollout, model.config)
    logits = run(group_logits, model, params, rollout)
    difference = np.abs(logits - reference)
    assert 1e-3 < difference.mean() < 0.05 * np.abs(reference).max()
    assert logits.dtype == jnp.float32
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(tiny.shapes(model)))


def test_remat_computes_layers_again(rollout):
    """In the backward pass only: forward passes cost the same."""

    def flops(remat):
        model, params = policy(remat=remat)

        def loss(params):
            return group_logits(model, params, rollout).sum()

        return count_flops(loss, params), count_flops(jax.grad(loss), params)

    (stored, stored_gradient), (recomputed, recomputed_gradient) = flops(False), flops(True)
    assert recomputed == stored
    assert 1.1 < recomputed_gradient / stored_gradient < 4 / 3


@pytest.mark.parametrize(('dtype', 'kept'), [('bfloat16', 0), ('float32', 2)])
def test_norms_keep_nothing_in_float32(dtype, kept):
    """What is left to the backward pass has the computation's dtype, if that is a shorter one."""
    norm = RMSNorm(tiny.make_model(dtype=dtype).config)
    x = jnp.ones((2, 3, 8), dtype)
    params = norm.init(jax.random.key(0), x)
    _, pull = jax.vjp(norm.apply, params, x)
    found = [leaf for leaf in jax.tree.leaves(pull) if leaf.shape == x.shape]
    assert sum(leaf.dtype == jnp.float32 for leaf in found) == kept


def test_init():
    model = tiny.make_model(**EVERYTHING, width=64, mlp_width=128)
    make = tiny.jit(functools.partial(models.init_params, model))
    params, other = make(jax.random.key(0)), make(jax.random.key(1))
    block = params['blocks']
    assert jax.tree.map(jnp.shape, params) == jax.tree.map(jnp.shape, tiny.shapes(model))
    for name in ('query', 'key', 'value', 'gate', 'up'):
        assert np.std(block[name]) == pytest.approx(64**-0.5, rel=0.1), name
    for name in ('out', 'down'):  # 0.02 / sqrt(2 layers)
        assert np.std(block[name]) == pytest.approx(0.01, rel=0.1), name
    for name in ('query', 'out', 'down'):
        assert np.std(block[name][0] - block[name][1]) > 0.01, 'layers start equal'
    for name in ('embedding', 'head'):
        assert np.std(params[name]) == pytest.approx(64**-0.5, rel=0.1)
    for name in ('query_bias', 'key_bias', 'value_bias'):
        assert (block[name] == 0).all()
    for norm in (block['attention_norm'], block['query_norm'], params['final_norm']):
        assert (norm['scale'] == 1).all()
    assert not np.allclose(params['embedding'], other['embedding'])


@pytest.mark.parametrize(
    ('options', 'message'),
    [
        ({'heads': 4, 'kv_heads': 3}, r'heads=4 is not a multiple of kv_heads=3'),
        ({'head_dim': 7}, r'head_dim=7 is odd: make it even'),
    ],
)
def test_bad_sizes(options, message):
    with pytest.raises(ValueError, match=message):
        tiny.make_model(**options)


# A scalar head


def test_scalar_head():
    """It starts at 0, in the place of the logits, whether or not these were the embedding's."""
    for tied in (True, False):
        config = models.with_scalar_head(tiny.make_model(tied_head=tied).config)
        model = models.Transformer(config)
        params = tiny.jit(functools.partial(models.init_params, model))(jax.random.key(0))
        assert params.keys() == {'embedding', 'blocks', 'final_norm', 'score'}
        assert params['score'].shape == (config.width, 1)
        assert (params['score'] == 0).all()


@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
def test_scores_by_hand(dtype):
    model = tiny.make_model(scalar_head=True, width=4, dtype=dtype, logit_softcap=1.0)
    params = tiny.make_params(model) | {'score': jnp.array([[1.0], [2.0], [-1.0], [0.5]])}
    hidden = jnp.arange(24.0).astype(dtype).reshape(2, 3, 4)
    scores = models.apply(model, params, hidden, method='scores')
    assert scores.dtype == jnp.float32
    assert scores.tolist() == [[1.5, 11.5, 21.5], [31.5, 41.5, 51.5]]


@pytest.mark.parametrize(
    ('scalar', 'method', 'message'),
    [
        (True, 'logits', r'scalar_head=True has no logits: ask for its scores'),
        (False, 'scores', r'scalar_head=False has no scores: ask for its logits'),
    ],
)
def test_a_model_has_logits_or_scores(scalar, method, message):
    model = tiny.make_model(scalar_head=scalar)
    with pytest.raises(ValueError, match=message):
        models.apply(model, tiny.make_params(model), jnp.zeros((1, 16)), method=method)


def test_the_trunk_of_a_policy():
    """Its arrays with a score of 0, and nothing of its head and adapters."""
    lora = models.Lora(rank=2)
    model, params = policy(tied_head=False, param_dtype='bfloat16')
    config = models.with_scalar_head(dataclasses.replace(model.config, lora=lora))
    assert config == dataclasses.replace(model.config, scalar_head=True)
    made = models.scalar_params(params, config)
    expected = tiny.shapes(models.Transformer(config))
    assert jax.tree.map(jnp.shape, made) == jax.tree.map(jnp.shape, expected)
    assert made['score'].dtype == jnp.bfloat16
    assert not made['score'].any()
    assert made['embedding'] is params['embedding']
    assert 'head' in params
    adapted = tiny.make_params(tiny.make_model(lora=lora))
    with pytest.raises(ValueError, match=r'parameters with adapters: call `merge_adapters`'):
        models.scalar_params(adapted, config)


def test_adapters_have_no_scalar_head():
    with pytest.raises(ValueError, match=r'scalar_head=True with lora rank=2: .* use rank 0'):
        tiny.make_model(scalar_head=True, lora=models.Lora(rank=2))


def test_states_that_have_read_a_token_predict_the_next(model, params, rollout):
    @tiny.jit
    def both(params):
        prompts = rollout.prompts
        arguments = model, params, prompts.tokens, prompts.length, rollout.tokens
        return models.completion_hidden(*arguments), models.hidden_at_tokens(*arguments)

    predict, read = both(params)
    assert read.shape == predict.shape
    np.testing.assert_allclose(read[:, :, :-1], predict[:, :, 1:], atol=1e-5)
    naive = oracle.hidden_states(oracle.float64(params), oracle.sequences(rollout)[0], model.config)
    last = naive.reshape(*rollout.tokens.shape[:2], *naive.shape[1:])
    places = np.asarray(rollout.prompts.length) + rollout.tokens.shape[2] - 1
    for b, place in enumerate(places):
        np.testing.assert_allclose(read[b, :, -1], last[b, :, place], atol=1e-5)


@pytest.mark.parametrize(
    'options',
    [
        {'window': -1, 'window_layers': (0, 1)}, {'kv_heads': 0}, {'heads': 0}, {'width': 0},
        {'head_dim': 0}, {'mlp_width': 0}, {'layers': 0}, {'rope_theta': 0.0},
        {'local_rope_theta': -1.0},
    ],
    ids=str,
)  # fmt: skip
def test_sizes_that_no_model_has(options):
    (name, value), *_ = options.items()
    with pytest.raises(ValueError, match=f'model {name}={value}: make it'):
        tiny.make_model(**options)
