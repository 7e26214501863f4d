"""Attention of one token by the kernel for GPUs, interpreted, and decoding that goes through it."""

import contextlib
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from grpo_jax import sharding
from grpo_jax.models import decoding, flash, transformer
from grpo_jax.models.attention import Stacks
from grpo_jax.sample import sample
from grpo_jax.types import Sampling

interpreted = functools.partial(decoding.attend_token, interpret=True)

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
    return q, tuple(new), Stacks(tuple(prompt), tuple(before))


def softmax_attention(q, new, stacks, layer, length, t, scale):
    """A head of a row at a time, in float64."""
    out = np.zeros(q.shape)
    share = q.shape[2] // new[0].shape[2]
    for b, g, head in np.ndindex(*q.shape[:3]):
        kv = head // share
        k, v = (
            np.concatenate(
                [p[layer, b, kv, : length[b]], o[layer, b, g, kv, :t], n[b, g, kv][None]],
                dtype=np.float64,
            )
            for p, o, n in zip(stacks.prompt, stacks.own, new, strict=True)
        )
        scores = scale * k @ np.asarray(q[b, g, head], np.float64)
        p = np.exp(scores - scores.max())
        out[b, g, head] = p @ v / p.sum()
    return out


@pytest.mark.parametrize('programs', [1, 128])  # that a GPU runs: parts of one column or of all
@pytest.mark.parametrize('size', SIZES)
def test_output(size, programs, monkeypatch):
    monkeypatch.setattr(decoding, '_PROGRAMS', programs)
    arrays = make_arrays(*SIZES[size])
    groups, _, _, _, columns, own, _ = SIZES[size]
    run = tiny.jit(functools.partial(interpreted, scale=0.3))
    for t in (0, 1, own // 2, own):
        # Nothing after it is read.
        behind = tuple(np.where(np.arange(own)[:, None] < t, x, np.nan) for x in arrays[2].own)
        stacks = arrays[2]._replace(own=behind)
        length = np.random.default_rng(t).integers(1, columns + 1, groups).astype(np.int32)
        found, new = run(*arrays[:2], stacks, jnp.int32(1), length, jnp.int32(t))
        expected = softmax_attention(*arrays, 1, length, t, 0.3)
        np.testing.assert_allclose(found, expected, atol=2e-6, err_msg=f't={t}')
        jax.tree.map(np.testing.assert_array_equal, new, arrays[1])


def test_columns_are_cut_only_where_programs_are_few(monkeypatch):
    monkeypatch.setattr(decoding, '_PROGRAMS', 128)
    assert decoding._cut(1024, programs=128) == (1024, 1)
    assert decoding._cut(512, programs=48) == (192, 3)
    assert decoding._cut(4096, programs=2) == (512, 8)
    assert decoding._cut(40, programs=2) == (64, 1)


@pytest.fixture
def through_kernel(monkeypatch):
    """Decoding reads caches by the kernel, in float32 and on this machine."""
    monkeypatch.setattr(decoding, 'attend_token', interpreted)
    for module in (flash, transformer):
        monkeypatch.setattr(module, 'from_stacks', lambda config: True)


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


@pytest.mark.parametrize('unroll', [False, True])
@pytest.mark.parametrize('block', [0, 3])
def test_a_rollout_is_the_same(model, rollout, drawn, unroll, block, through_kernel):
    """In blocks too, in which rows leave their groups and bring their prompts."""
    found = draw(model, tiny.make_params(model), rollout.prompts, unroll=unroll, block=block)
    np.testing.assert_array_equal(found.tokens, drawn.tokens)
    np.testing.assert_allclose(found.logprobs, drawn.logprobs, atol=1e-5)
    assert 0 < drawn.mask.sum() < drawn.mask.size


def test_a_rollout_is_the_same_on_a_mesh(model, rollout, drawn, through_kernel):
    mesh = sharding.make_mesh(fsdp=2, tensor=2)
    params = jax.device_put(
        tiny.make_params(model), sharding.shardings(tiny.make_params(model), mesh)
    )
    prompts = sharding.put_groups(rollout.prompts, mesh)
    found = draw(model, params, prompts, mesh=mesh)
    np.testing.assert_array_equal(found.tokens, drawn.tokens)
    np.testing.assert_allclose(found.logprobs, drawn.logprobs, atol=1e-5)


@pytest.mark.parametrize(
    ('options', 'expected'),
    [
        ({}, True),
        ({'head_dim': 12}, False),  # no power of two
        ({'head_dim': 8}, False),  # fewer than a matrix unit takes
        ({'dtype': 'float32', 'attention': 'auto'}, False),
        ({'attention': 'recomputed'}, False),
    ],
)
def test_which_models_it_takes(options, expected):
    settings = {'head_dim': 16, 'dtype': 'bfloat16', 'attention': 'cudnn'} | options
    if settings['head_dim'] == 12:
        settings['attention'] = 'auto'  # cuDNN takes multiples of 8
    assert flash.from_stacks(tiny.make_model(**settings).config) == expected


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
@pytest.mark.parametrize('size', SIZES)
def test_it_lowers_for_a_gpu(size):
    arrays = jax.tree.map(lambda x: x.astype(jnp.bfloat16), make_arrays(*SIZES[size]))
    length = np.ones(SIZES[size][0], np.int32)
    run = jax.jit(functools.partial(decoding.attend_token, scale=0.3))
    with on_a_gpu():
        lowered = run.trace(*arrays, np.int32(1), length, np.int32(3)).lower(
            lowering_platforms=('cuda',)
        )
    text = lowered.as_text()
    assert 'decode_parts' in text
    assert 'decode_whole' in text
