"""Attention of one token by the kernel for GPUs, interpreted, and decoding that goes through it."""

import contextlib
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from grpo_jax import sharding
from grpo_jax.algorithm.sample import sample
from grpo_jax.models import transformer
from grpo_jax.models.attention import UNLIMITED_WINDOW, DecodeCache, LayerCaches
from grpo_jax.models.kernels import decode_token
from grpo_jax.types import Sampling

interpreted = functools.partial(decode_token.attend_token, interpret=True)

# Groups, rows, key/value heads, queries of a row for each, prompt columns, own columns, head width
SIZES = {
    'several blocks of keys': (2, 3, 2, 3, 70, 130, 16),
    'a head for each query': (1, 2, 4, 1, 5, 9, 16),
    'more queries of a row than a block': (1, 1, 1, 20, 33, 40, 16),
    'rows by themselves': (5, 1, 2, 2, 10, 70, 32),
}


def make_arrays(groups, rows, kv_heads, share, columns, own, width):
    """Of three layers."""
    rng = np.random.default_rng(0)

    def array(*shape):
        return rng.standard_normal(shape).astype(np.float32)

    q = 2 * array(groups, rows, kv_heads * share, width)
    new = [array(groups, rows, kv_heads, width) for _ in range(2)]
    prompt = [array(3, groups, kv_heads, columns, width) for _ in range(2)]
    before = [array(3, groups, rows, kv_heads, own, width) for _ in range(2)]
    return q, tuple(new), LayerCaches(tuple(prompt), tuple(before))


def softmax_attention(q, new, caches, layer, length, t, *, scale, softcap=0.0, window=None):
    """A head of a row at a time, in float64."""
    out = np.zeros(q.shape)
    share = q.shape[2] // new[0].shape[2]
    for b, g, head in np.ndindex(*q.shape[:3]):
        kv = head // share
        k, v = (
            np.concatenate(
                [
                    p[layer, b, kv, : length[b]],
                    o[layer, b, g, kv, : t if np.ndim(t) == 0 else t[b, g]],
                    n[b, g, kv][None],
                ],
                dtype=np.float64,
            )[-(window or 0) :]
            for p, o, n in zip(caches.prompt, caches.own, new, strict=True)
        )
        scores = scale * k @ np.asarray(q[b, g, head], np.float64)
        if softcap:
            scores = softcap * np.tanh(scores / softcap)
        p = np.exp(scores - scores.max())
        out[b, g, head] = p @ v / p.sum()
    return out


def check(size, window=None, softcap=0.0):
    arrays = make_arrays(*SIZES[size])
    groups, _, _, _, columns, own, _ = SIZES[size]
    run = tiny.jit(functools.partial(interpreted, scale=0.3, softcap=softcap))
    for t in (0, 1, own // 2, own):
        # Nothing after it is read.
        after = tuple(np.where(np.arange(own)[:, None] < t, x, np.nan) for x in arrays[2].own)
        caches = arrays[2]._replace(own=after)
        length = np.random.default_rng(t).integers(1, columns + 1, groups).astype(np.int32)
        seen = jnp.int32(UNLIMITED_WINDOW if window is None else window)
        cache = DecodeCache(*jax.tree.map(jnp.asarray, (caches, length, np.int32(t))))
        out, new = run(*jax.tree.map(jnp.asarray, arrays[:2]), cache, jnp.int32(1), seen)
        expected = softmax_attention(
            *arrays, 1, length, t, scale=0.3, softcap=softcap, window=window
        )
        np.testing.assert_allclose(out, expected, atol=2e-6, err_msg=f't={t}')
        jax.tree.map(np.testing.assert_array_equal, new, arrays[1])


@pytest.mark.parametrize('programs', [1, 128])  # that a GPU runs: parts of one column or of all
@pytest.mark.parametrize('size', SIZES)
def test_output(size, programs, monkeypatch):
    monkeypatch.setattr(decode_token, '_PROGRAMS', programs)
    check(size)


@pytest.mark.parametrize('size', tiny.some_slow(SIZES, *list(SIZES)[1:3]))
def test_rows_with_different_numbers_of_columns(size):
    arrays = make_arrays(*SIZES[size])
    groups, rows, _, _, columns, own, _ = SIZES[size]
    rng = np.random.default_rng(1)
    t = rng.integers(0, own + 1, (groups, rows)).astype(np.int32)
    used = np.arange(own)[:, None] < t[..., None, None, None]
    caches = arrays[2]._replace(own=tuple(np.where(used, x, np.nan) for x in arrays[2].own))
    length = rng.integers(1, columns + 1, groups).astype(np.int32)
    cache = DecodeCache(*jax.tree.map(jnp.asarray, (caches, length, t)))
    run = tiny.jit(functools.partial(interpreted, scale=0.3))
    out, _ = run(
        *jax.tree.map(jnp.asarray, arrays[:2]), cache, jnp.int32(1), jnp.int32(UNLIMITED_WINDOW)
    )
    expected = softmax_attention(*arrays, 1, length, t, scale=0.3)
    np.testing.assert_allclose(out, expected, atol=2e-6)


@pytest.mark.parametrize('window', [1, 3, 64, 100])
@pytest.mark.parametrize('size', ['several blocks of keys', 'more queries of a row than a block'])
def test_a_window(size, window):
    """It ends in the row's own columns or in those of its prompt, or holds the token alone."""
    check(size, window=window)


def test_a_soft_cap():
    check('several blocks of keys', softcap=1.5)
    check('a head for each query', softcap=1.5, window=4)


def test_columns_are_split_only_where_programs_are_few(monkeypatch):
    monkeypatch.setattr(decode_token, '_PROGRAMS', 128)
    assert decode_token._split(1024, programs=128) == (1024, 1)
    assert decode_token._split(512, programs=48) == (192, 3)
    assert decode_token._split(4096, programs=2) == (512, 8)
    assert decode_token._split(40, programs=2) == (64, 1)


@pytest.fixture
def through_kernel(monkeypatch):
    """Decoding reads caches by the kernel, in float32 and on this machine."""
    monkeypatch.setattr(decode_token, 'attend_token', interpreted)
    monkeypatch.setattr(transformer, 'caches_in_place', lambda config: True)


def draw(model, params, prompts, **options):
    settings = {'seed': 0, 'step': 0, 'sampling': Sampling(), 'eos_ids': np.array([3, 11, 40])}
    given = {'group_size': 4, 'max_tokens': 9} | options
    jax.clear_caches()  # programs know nothing of the fixture
    return jax.device_get(sample(model, params, prompts, **settings, **given))


@pytest.fixture(scope='module')
def model():
    return tiny.make_model(head_dim=16, attention_bias=True)


@pytest.fixture(scope='module')
def drawn(model, rollout):
    return draw(model, tiny.make_params(model), rollout.prompts, unroll=False)


@pytest.mark.parametrize('unroll', tiny.some_slow([False, True], False))
@pytest.mark.parametrize('block', tiny.some_slow([0, 3], 3))
def test_a_rollout_is_the_same(model, rollout, drawn, unroll, block, through_kernel):
    """In blocks too, in which rows leave their groups and bring their prompts."""
    found = draw(model, tiny.make_params(model), rollout.prompts, unroll=unroll, block=block)
    np.testing.assert_array_equal(found.tokens, drawn.tokens)
    np.testing.assert_allclose(found.logprobs, drawn.logprobs, atol=1e-5)
    assert 0 < drawn.mask.sum() < drawn.mask.size


@pytest.mark.parametrize('mesh', tiny.some_slow([None, (2, 2)], None))
def test_a_rollout_with_windows_and_soft_caps_is_the_same(mesh, rollout, request):
    """Models like Gemma's, whose several tokens no kernel for GPUs takes."""
    options = {'window': 3, 'window_layers': (0,), 'attention_softcap': 2.0, 'norms': 'both'}
    model = tiny.make_model(head_dim=16, **options)
    params, prompts = tiny.make_params(model), rollout.prompts
    drawn = draw(model, params, prompts)
    request.getfixturevalue('through_kernel')
    if mesh is not None:
        mesh = sharding.make_mesh(fsdp=mesh[0], tensor=mesh[1])
        params = jax.device_put(params, sharding.shardings(params, mesh))
        prompts = sharding.put_groups(prompts, mesh)
    found = draw(model, params, prompts, mesh=mesh)
    np.testing.assert_array_equal(found.tokens, drawn.tokens)
    np.testing.assert_allclose(found.logprobs, drawn.logprobs, atol=1e-5)


def test_a_rollout_is_the_same_on_a_mesh(model, rollout, drawn, through_kernel):
    mesh = sharding.make_mesh(fsdp=2, tensor=2)
    params = jax.device_put(
        tiny.make_params(model), sharding.shardings(tiny.make_params(model), mesh)
    )
    prompts = sharding.put_groups(rollout.prompts, mesh)
    found = draw(model, params, prompts, mesh=mesh)
    np.testing.assert_array_equal(found.tokens, drawn.tokens)
    np.testing.assert_allclose(found.logprobs, drawn.logprobs, atol=1e-5)


def on_a_gpu():
    """The context that JAX from 0.11 on asks for where there is none."""
    if not hasattr(jax.sharding, 'AbstractDevice'):
        return contextlib.nullcontext()
    device = jax.sharding.AbstractDevice('NVIDIA H100 80GB HBM3', 132, 'gpu')
    axes = (jax.sharding.AxisType.Auto,)
    return jax.sharding.use_abstract_mesh(
        jax.sharding.AbstractMesh((1,), ('x',), axes, abstract_device=device)
    )


@pytest.mark.filterwarnings('ignore:The Pallas Triton backend:DeprecationWarning')
@pytest.mark.parametrize(('softcap', 'rows_differ'), [(0.0, False), (50.0, False), (0.0, True)])
@pytest.mark.parametrize('size', SIZES)
def test_it_lowers_for_a_gpu(size, softcap, rows_differ):
    t = jnp.full(SIZES[size][:2], 3, jnp.int32) if rows_differ else jnp.int32(3)
    q, new, caches = jax.tree.map(lambda x: jnp.asarray(x, jnp.bfloat16), make_arrays(*SIZES[size]))
    cache = DecodeCache(caches, jnp.ones(SIZES[size][0], jnp.int32), t)
    run = jax.jit(functools.partial(decode_token.attend_token, scale=0.3, softcap=softcap))
    with on_a_gpu():
        lowered = run.trace(q, new, cache, jnp.int32(1), jnp.int32(2)).lower(
            lowering_platforms=('cuda',)
        )
    text = lowered.as_text()
    assert 'decode_parts' in text
    assert 'decode_merge' in text
