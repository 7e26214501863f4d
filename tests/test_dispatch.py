"""Attention in all its forms against float64, their gradients included, and on a mesh."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from attention_cases import (
    attend,
    configure,
    make_arrays,
    run_on_cpu,
    softmax_attention,
    value_and_gradient,
)

from grpo_jax import models, sharding
from grpo_jax.models import attention as attention_module
from grpo_jax.models.attention import Piece, concatenate_pieces
from grpo_jax.models.kernels import dispatch, looped, splash


@pytest.fixture
def on_cpu(monkeypatch):
    run_on_cpu(monkeypatch)


CASES = {
    'prompts of all lengths': ({}, (6, 1), {}),
    'prefill': ({'rows': 1, 'columns': 0}, (0, 0), {'scale': 0.7}),
    # Several blocks, some of which are fully masked; in a call for each completion,
    'long': ({'rows': 2, 'length': 130, 'columns': 250, 'heads': 2, 'kv_heads': 1}, (9, 200), {}),
    # and in one for the group.
    'longer': ({'rows': 3, 'columns': 300, 'heads': 2, 'kv_heads': 1}, (9, 300), {}),
    'soft cap': ({}, (6, 1), {'scale': 0.7, 'softcap': 1.5}),
}


@pytest.mark.usefixtures('on_cpu')
@pytest.mark.parametrize(
    ('form', 'case'),
    [
        (form, case)
        for form in ('einsum', 'recomputed', 'splash', 'cudnn')
        for case in CASES
        if (form, case) != ('cudnn', 'soft cap')  # it has none
    ],
)
def test_output_and_gradients(form, case):
    sizes, start, options = CASES[case]
    arrays, weights = make_arrays(**sizes)
    config = configure(form, **{f'attention_{name}': value for name, value in options.items()})
    found = value_and_gradient(config, arrays, weights, jnp.asarray(start))
    expected = softmax_attention(arrays, weights, start, **options)
    jax.tree.map(functools.partial(np.testing.assert_allclose, atol=2e-5), found, expected)


def loop_over(monkeypatch, size, stretches):
    """Makes `recomputed` attention loop over blocks of a few queries."""
    monkeypatch.setattr(attention_module, 'LONGEST_UNROLLED', 0)
    monkeypatch.setattr(looped, 'BLOCK', size)
    monkeypatch.setattr(looped, 'STRETCHES', stretches)


@pytest.mark.parametrize(('case', 'size'), [('long', 48), ('prefill', 2), ('soft cap', 2)])
def test_output_and_gradients_of_a_loop(case, size, monkeypatch):
    """Over blocks of queries in two stretches; the last block is shorter."""
    loop_over(monkeypatch, size, 2)
    test_output_and_gradients('recomputed', case)


@pytest.mark.parametrize('owned', [False, True])
@pytest.mark.parametrize('form', ['einsum', 'recomputed', 'looped'])
def test_blocks_of_queries_change_nothing(form, owned, monkeypatch):
    """Nor with a window, and several owners of the keys of one row."""
    config = configure('recomputed' if form == 'looped' else form)
    (q, own, prompt), weights = make_arrays(length=7, rows=1 if owned else 3)
    owner = jnp.asarray([[0, 0, 1, 1, 1, 2, 2]] * 2)
    positions = 6 + jnp.asarray([[0, 1, 0, 1, 2, 0, 1] if owned else range(7)] * 2)
    columns = jnp.broadcast_to(jnp.arange(6), (2, 6))

    def value_and_gradient(q, own, prompt):
        def loss(arrays):
            q, own, prompt = arrays
            pieces = [Piece(*prompt, columns), Piece(*own, positions)]
            if owned:
                owners = jnp.concatenate([jnp.full((2, 6), 3), owner], axis=1)
                names = jnp.stack([owner, jnp.full((2, 7), 3)], axis=-1)
                pieces = [concatenate_pieces(*pieces)._replace(owner=owners, read_by=names)]
            out = dispatch.attend_groups(config, q, pieces, positions, jnp.int32(5))
            return (weights * out).sum(), out

        traced = tiny.jit(jax.value_and_grad(loss, has_aux=True)).trace((q, own, prompt))
        (_, out), gradient = traced.lower().compile()((q, own, prompt))
        return (out, gradient), str(traced.jaxpr)

    whole, program = value_and_gradient(q, own, prompt)
    if form == 'looped':
        loop_over(monkeypatch, 2, 2)
    else:
        size = 'PACKED_QUERY_BLOCK' if owned else 'QUERY_BLOCK'
        monkeypatch.setattr(attention_module, size, 2)
        monkeypatch.setattr(attention_module, 'MAX_QUERY_BLOCKS', 100)
    blocks, other = value_and_gradient(q, own, prompt)
    assert other.count('dot_general') > program.count('dot_general')
    assert tiny.gap(blocks, whole) < 1e-5


@pytest.mark.usefixtures('on_cpu')
def test_a_model_with_a_kernel_is_the_same_model(rollout):
    """Completions read over their prompts, and the gradient of it, through remat and the scan."""
    weights = np.random.default_rng(0).standard_normal((*rollout.tokens.shape, 16))

    def value_and_gradient(attention):
        model = tiny.make_model(attention=attention)

        def loss(params):
            hidden = models.completion_hidden(
                model, params, rollout.prompts.tokens, rollout.prompts.length, rollout.tokens
            )
            return (weights * hidden).mean(), hidden

        params = tiny.make_params(model)
        (_, hidden), gradient = tiny.jit(jax.value_and_grad(loss, has_aux=True))(params)
        return hidden, gradient

    (hidden, gradient), (expected, of_einsum) = map(value_and_gradient, ('splash', 'einsum'))
    assert 0 < tiny.gap(hidden, expected) < 1e-5 * tiny.largest(expected)
    assert 0 < tiny.gap(gradient, of_einsum) < 1e-5 * tiny.largest(of_einsum)


@pytest.mark.usefixtures('on_cpu')
@pytest.mark.parametrize('form', ['einsum', 'splash', 'cudnn'])
def test_bfloat16_is_computed_in_bfloat16(form):
    arrays, weights = make_arrays()
    arrays = jax.tree.map(lambda x: jnp.asarray(x, jnp.bfloat16), arrays)
    out = tiny.jit(functools.partial(attend, configure(form)))(arrays, jnp.array([6, 1]))
    assert out.dtype == jnp.bfloat16
    expected, _ = softmax_attention(arrays, weights, (6, 1))
    assert 1e-4 < np.abs(np.asarray(out, np.float64) - expected).mean() < 5e-3


def test_a_window_of_one_position_reads_what_stands_there():
    arrays, _ = make_arrays()
    out = attend(configure('auto'), arrays, jnp.array([6, 1]), window=jnp.int32(1))
    values = np.repeat(arrays[1][1], 2, axis=2).swapaxes(2, 3)  # two query heads read each
    np.testing.assert_allclose(out, values, atol=1e-6)


def test_no_kernel_for_a_single_token(monkeypatch):
    """They begin to pay with many, and decoding has one and another piece of keys."""
    monkeypatch.setattr(splash, 'attend', None)
    arrays, _ = make_arrays(length=1)
    run = functools.partial(attend, configure('splash'))
    assert jax.eval_shape(run, arrays, jnp.array([6, 1])).shape == arrays[0].shape


# On a mesh


def test_a_mesh_splits_groups_and_heads(monkeypatch):
    """Groups by the data axes, heads by tensor together with the keys that they read."""
    seen = {}

    def kernel(q, own, prompt, start, **_):
        seen.update(q=q.shape, own=own[0].shape, prompt=prompt[1].shape, start=start.shape)
        return q

    monkeypatch.setattr(splash, 'attend', kernel)

    def shapes(batch, mesh):
        arrays, _ = make_arrays(batch=batch)
        with sharding.use(mesh):
            run = functools.partial(attend, configure('splash'))
            jax.eval_shape(run, arrays, jnp.ones(batch, jnp.int32))
        return seen

    whole = {'q': (4, 3, 5, 4, 8), 'own': (4, 3, 2, 5, 8), 'prompt': (4, 2, 6, 8), 'start': (4,)}
    assert shapes(4, None) == whole
    part = {'q': (2, 3, 5, 2, 8), 'own': (2, 3, 1, 5, 8), 'prompt': (2, 1, 6, 8), 'start': (2,)}
    assert shapes(4, sharding.make_mesh(fsdp=2, tensor=2)) == part
    few = {'q': (2, 3, 5, 1, 8), 'own': (2, 3, 1, 5, 8), 'prompt': (2, 1, 6, 8), 'start': (2,)}
    assert shapes(2, sharding.make_mesh(fsdp=1, tensor=4)) == few  # copies of 2 heads of keys
    assert shapes(3, sharding.make_mesh(fsdp=2, tensor=2))['q'] == (3, 3, 5, 2, 8)


@pytest.mark.usefixtures('on_cpu')
def test_a_mesh_changes_nothing():
    arrays, weights = make_arrays(batch=4)
    start = jnp.array([6, 1, 4, 3])
    expected = softmax_attention(arrays, weights, np.asarray(start))
    mesh = sharding.make_mesh(fsdp=2, tensor=2)
    with sharding.use(mesh):
        found = value_and_gradient(
            configure('cudnn'), sharding.put_groups(arrays, mesh), weights, start
        )
    jax.tree.map(functools.partial(np.testing.assert_allclose, atol=2e-5), found, expected)
