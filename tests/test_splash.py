"""The TPU's kernel for groups: what it skips, and what is compiled for a TPU without one."""

import importlib.util
import math
import re

import jax
import jax.numpy as jnp
import pytest
import tiny
from attention_cases import ON_CPU, attend, configure, make_arrays
from jax.experimental.pallas.ops.tpu import splash_attention

from grpo_jax import models
from grpo_jax.models.kernels import splash


@pytest.mark.parametrize(('past', 'rows'), [(8, 3), (6, 3), (5, 1)])  # the three are six blocks
def test_blocks_of_other_completions_are_skipped(past, rows, monkeypatch):
    make, kernels = splash_attention.make_splash_mha_single_device, []

    def spy(*args, **options):
        kernels.append(make(*args, **options))
        return kernels[-1]

    monkeypatch.setattr(splash, '_BLOCK', 128)
    monkeypatch.setattr(splash_attention, 'make_splash_mha_single_device', spy)
    arrays, _ = make_arrays(batch=1, rows=3, length=250, columns=128 * past - 9, heads=2)
    ON_CPU[splash](*arrays, jnp.array([9]), scale=1.0, softcap=0.0)
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
