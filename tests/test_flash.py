"""Attention in all its forms against float64, their gradients included, and which form is taken.

The TPU's kernel runs interpreted and the GPU's by XLA: the same code around another inside.
"""

import functools
import importlib.util
import math
import re
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from jax.experimental.pallas.ops.tpu import splash_attention

from grpo_jax import models, sharding
from grpo_jax.models import attention as attention_module
from grpo_jax.models import flash
from grpo_jax.models.attention import NOWHERE, Piece, joined

HERE = {
    'splash': functools.partial(flash.splash, interpret=True),
    'cudnn': functools.partial(flash.cudnn, implementation='xla'),
}


@pytest.fixture
def on_cpu(monkeypatch):
    for name, kernel in HERE.items():
        monkeypatch.setitem(flash.KERNELS, name, kernel)


def configure(attention, **options):
    """A config that every form takes; the arrays' dtype is another matter."""
    options = {'dtype': 'bfloat16', 'head_dim': 8, 'attention': attention} | options
    return tiny.make_model(**options).config


def make_arrays(*, batch=2, rows=3, length=5, columns=6, heads=4, kv_heads=2, width=8):
    """Queries, own keys and values, those of the prompt, and what the output is multiplied with."""
    rng = np.random.default_rng(0)

    def array(*shape):
        return rng.standard_normal(shape).astype(np.float32)

    q = 1.5 * array(batch, rows, length, heads, width)
    own = [array(batch, rows, kv_heads, length, width) for _ in range(2)]
    prompt = [array(batch, kv_heads, columns, width) for _ in range(2)] if columns else []
    return (q, own, prompt), array(*q.shape)


def attend(config, arrays, start, window=None):
    """`attend_groups` as prefill (without a prompt) and extend call it."""
    q, own, prompt = arrays
    positions = start[:, None] + jnp.arange(q.shape[2])
    pieces = [Piece(*own, positions)]
    if prompt:
        columns = jnp.arange(prompt[0].shape[2])
        pieces.insert(0, Piece(*prompt, jnp.where(columns < start[:, None], columns, NOWHERE)))
    return flash.attend_groups(config, q, pieces, positions, window)


def value_and_gradient(config, arrays, weights, start):
    def loss(arrays):
        out = attend(config, arrays, start)
        return (weights * out).sum(), out

    (_, out), gradient = tiny.jit(jax.value_and_grad(loss, has_aux=True))(arrays)
    return out, gradient


def softmax_attention(arrays, weights, start, *, scale=8**-0.5, softcap=0.0):
    """Output and gradients of sum(weights * output), a head of a row at a time, in float64."""
    q, own, prompt = jax.tree.map(lambda x: np.asarray(x, np.float64), arrays)
    out, (dq, down, dprompt) = np.zeros_like(q), jax.tree.map(np.zeros_like, (q, own, prompt))
    for b, g, head in np.ndindex(q.shape[0], q.shape[1], q.shape[3]):
        kv, past = head * own[0].shape[2] // q.shape[3], start[b]
        k, v = (x[b, g, kv] for x in own)
        if prompt:
            k, v = (np.concatenate([prompt[i][b, kv, :past], x]) for i, x in enumerate((k, v)))
        visible = np.tri(q.shape[2], len(k), len(k) - q.shape[2], dtype=bool)
        scores, slope = scale * q[b, g, :, head] @ k.T, 1.0
        if softcap:
            scores = softcap * np.tanh(scores / softcap)
            slope = 1 - (scores / softcap) ** 2
        p = np.where(visible, np.exp(scores - scores.max(-1, keepdims=True)), 0)
        p /= p.sum(-1, keepdims=True)
        out[b, g, :, head] = p @ v
        dout = np.asarray(weights[b, g, :, head], np.float64)
        dp = dout @ v.T
        ds = scale * slope * p * (dp - (p * dp).sum(-1, keepdims=True))
        dq[b, g, :, head] = ds @ k
        for i, dx in enumerate((ds.T @ q[b, g, :, head], p.T @ dout)):
            if prompt:
                dprompt[i][b, kv, :past] += dx[:past]
            down[i][b, g, kv] += dx[len(k) - q.shape[2] :]
    return out, (dq, down, dprompt)


CASES = {
    'prompts of all lengths': ({}, (6, 1), {}),
    'prefill': ({'rows': 1, 'columns': 0}, (0, 0), {'scale': 0.7}),
    # Several blocks, some of which show nothing to anybody; in a call for each completion,
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
        for form in ('einsum', 'recomputed', *HERE)
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


@pytest.mark.parametrize('owned', [False, True])
@pytest.mark.parametrize('form', ['einsum', 'recomputed'])
def test_stripes_of_queries_change_nothing(form, owned, monkeypatch):
    """Nor with a window, and several owners of the keys of one row."""
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
                pieces = [joined(*pieces)._replace(owner=owners, read_by=names)]
            out = flash.attend_groups(configure(form), q, pieces, positions, jnp.int32(5))
            return (weights * out).sum(), out

        traced = tiny.jit(jax.value_and_grad(loss, has_aux=True)).trace((q, own, prompt))
        (_, out), gradient = traced.lower().compile()((q, own, prompt))
        return (out, gradient), str(traced.jaxpr)

    whole, program = value_and_gradient(q, own, prompt)
    monkeypatch.setattr(attention_module, 'OWNED_STRIPE' if owned else 'STRIPE', 2)
    monkeypatch.setattr(attention_module, 'STRIPES', 100)
    stripes, other = value_and_gradient(q, own, prompt)
    assert other.count('dot_general') > program.count('dot_general')
    assert tiny.gap(stripes, whole) < 1e-5


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


# A group in one call


@pytest.mark.parametrize(('past', 'rows'), [(8, 3), (6, 3), (5, 1)])  # the three are six blocks
def test_blocks_of_other_completions_are_skipped(past, rows, monkeypatch):
    make, kernels = splash_attention.make_splash_mha_single_device, []

    def spy(*args, **options):
        kernels.append(make(*args, **options))
        return kernels[-1]

    monkeypatch.setattr(flash, '_BLOCK', 128)
    monkeypatch.setattr(splash_attention, 'make_splash_mha_single_device', spy)
    arrays, _ = make_arrays(batch=1, rows=3, length=250, columns=128 * past - 9, heads=2)
    HERE['splash'](*arrays, jnp.array([9]), scale=1.0, softcap=0.0)
    (kernel,) = kernels  # of `rows` completions
    # Of a completion's two blocks of queries, one sees the prompt and itself, the other one more.
    # The gradient of keys has as many steps for each block as queries have blocks.
    for info, steps in (
        (kernel.fwd_mask_info, (1, 2 * rows, past + 2)),
        (kernel.dq_mask_info, (1, 2 * rows, past + 2)),
        (kernel.dkv_mask_info, (1, 2 * rows, past + 2 * rows)),
    ):
        assert info.block_mask.shape == steps
        assert (info.block_mask > 0).sum() == rows * (2 * past + 3)
        assert (info.block_mask == 1).sum() == rows * 2
        assert len(info.partial_mask_blocks) == 1


# On a mesh


def test_a_mesh_splits_groups_and_heads(monkeypatch):
    """Whole groups by fsdp, heads by tensor together with the keys that they read."""
    seen = {}

    def kernel(q, own, prompt, start, **_):
        seen.update(q=q.shape, own=own[0].shape, prompt=prompt[1].shape, start=start.shape)
        return q

    monkeypatch.setitem(flash.KERNELS, 'splash', kernel)

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
    assert shapes(2, sharding.make_mesh(fsdp=1, tensor=4))['q'] == (2, 3, 5, 4, 8)
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


# For TPUs, without one


def test_lowered_for_tpus_the_model_holds_the_kernel_and_no_scores():
    """In the forward pass, the one that remat repeats, and twice in the backward pass."""
    lowered = {}
    shapes = (2, 384), (2,), (2, 2, 257)  # P = 384, T - 1 = 256
    texts = [jax.ShapeDtypeStruct(shape, jnp.int32) for shape in shapes]
    for attention in ('einsum', 'splash'):
        model = tiny.make_model(head_dim=64, dtype='bfloat16', attention=attention)

        def loss(params, *texts, model=model):
            return models.completion_hidden(model, params, *texts).astype(jnp.float32).sum()

        traced = jax.jit(jax.grad(loss)).trace(tiny.shapes(model), *texts)
        lowered[attention] = traced.lower(lowering_platforms=('tpu',)).as_text()
    names = ('splash_mha_fwd', 'splash_mha_dq', 'splash_mha_dkv')
    for name in names:
        assert name in lowered['splash'], name
        assert name not in lowered['einsum'], name
    scores = [f'{keys}xf32' for keys in ('64x2x384', '64x2x256', '64x2x64')]  # stripe x R x N
    for shape in scores:
        assert shape in lowered['einsum'], shape
        assert shape not in lowered['splash'], shape


@pytest.fixture
def compile_for_a_tpu(monkeypatch):
    """Compiles a function of arrays of these shapes, in bfloat16."""
    if importlib.util.find_spec('libtpu') is None:
        pytest.skip('needs libtpu, which compiles for TPUs')
    from jax.experimental import topologies

    settings = {
        'TPU_SKIP_MDS_QUERY': '1',
        'TPU_WORKER_HOSTNAMES': 'localhost',
        'TPU_ACCELERATOR_TYPE': 'v5p-16',
        'ALLOW_MULTIPLE_LIBTPU_LOAD': '1',  # no device is used: others may compile too
    }
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    devices = topologies.get_topology_desc(platform='tpu', topology_name='v5p:2x2x1').devices
    place = jax.sharding.SingleDeviceSharding(devices[0])

    def compile(function, arrays):
        arguments = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, jnp.bfloat16, sharding=place), arrays
        )
        return jax.jit(function).lower(arguments).compile()

    return compile


def loss_on_a_tpu(arrays):
    return attend(configure('splash'), arrays, jnp.array([6, 1])).astype(jnp.float32).sum()


def test_compiled_for_a_tpu(compile_for_a_tpu):
    compiled = compile_for_a_tpu(jax.grad(loss_on_a_tpu), make_arrays()[0])
    assert compiled.as_text().count('tpu_custom_call') == 3  # forward, and of q, and of k and v


def test_compiled_for_a_tpu_no_prompt_is_repeated(compile_for_a_tpu):
    """If it is a long one: nothing is as large as a copy for each completion."""
    arrays, _ = make_arrays(rows=6, length=128, columns=1024, heads=2, width=128)
    compiled = compile_for_a_tpu(jax.grad(loss_on_a_tpu), arrays)
    shapes = re.findall(r'\b[a-z]+\d+\[([\d,]+)\]', compiled.as_text())
    sizes = [math.prod(map(int, shape.split(','))) for shape in shapes]
    assert arrays[2][0].size < max(sizes) < 6 * arrays[2][0].size


# Which form is taken


@pytest.mark.parametrize(
    ('device', 'options', 'expected'),
    [
        ({'platform': 'cpu'}, {}, 'recomputed'),
        ({'platform': 'tpu'}, {'dtype': 'float32'}, 'splash'),
        ({'platform': 'tpu'}, {'attention_softcap': 30.0}, 'splash'),
        ({'platform': 'tpu'}, {'window': 4, 'window_layers': (1,)}, 'recomputed'),
        ({'platform': 'tpu'}, {'attention': 'einsum'}, 'einsum'),
        ({'platform': 'cpu'}, {'attention': 'splash'}, 'splash'),
        ({'platform': 'gpu', 'compute_capability': '9.0'}, {'head_dim': 128}, 'cudnn'),
        ({'platform': 'gpu', 'compute_capability': '10.0'}, {'dtype': 'float16'}, 'cudnn'),
        ({'platform': 'gpu', 'compute_capability': '7.5'}, {}, 'recomputed'),
        ({'platform': 'gpu'}, {}, 'recomputed'),
        ({'platform': 'gpu', 'compute_capability': 'gfx942'}, {}, 'recomputed'),
        ({'platform': 'gpu', 'compute_capability': '9.0'}, {'dtype': 'float32'}, 'recomputed'),
        ({'platform': 'gpu', 'compute_capability': '9.0'}, {'head_dim': 136}, 'recomputed'),
        ({'platform': 'gpu', 'compute_capability': '9.0'}, {'head_dim': 12}, 'recomputed'),
    ],
)
def test_the_platform_chooses(device, options, expected, monkeypatch):
    config = configure(**({'attention': 'auto'} | options))
    monkeypatch.setattr(jax, 'devices', lambda: [SimpleNamespace(**device)])
    assert flash.choose(config) == expected


def test_no_kernel_for_a_single_token(monkeypatch):
    """They begin to pay with many, and decoding has one and another piece of keys."""
    monkeypatch.setitem(flash.KERNELS, 'splash', None)
    arrays, _ = make_arrays(length=1)
    run = functools.partial(attend, configure('splash'))
    assert jax.eval_shape(run, arrays, jnp.array([6, 1])).shape == arrays[0].shape


@pytest.mark.parametrize(
    ('options', 'message'),
    [
        (
            {'attention': 'flash'},
            r"attention='flash' is unknown: use one of auto, einsum, r",
        ),
        (
            {'attention': 'splash', 'window': 4, 'window_layers': (1,)},
            r"attention='splash' does not take window=4: use attention='auto' or 'einsum'",
        ),
        ({'attention': 'cudnn', 'window': 4, 'window_layers': (1,)}, r'does not take window=4'),
        ({'attention': 'cudnn', 'attention_softcap': 50.0}, r'not take attention_softcap=50.0'),
        ({'attention': 'cudnn', 'dtype': 'float32'}, r"does not take dtype='float32'"),
        ({'attention': 'cudnn', 'head_dim': 12}, r'does not take head_dim=12, .* 8, 16, ... or'),
    ],
)
def test_options_that_a_kernel_does_not_take(options, message):
    with pytest.raises(ValueError, match=message):
        configure(**options)


def test_cudnn_has_no_soft_cap():
    arrays, _ = make_arrays()
    with pytest.raises(ValueError, match=r"no softcap=2.0: use attention='einsum'"):
        flash.cudnn(*arrays, jnp.array([6, 1]), scale=1.0, softcap=2.0)
