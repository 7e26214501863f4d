"""The sampler's calls: what they convert, and how they are named."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from grpo_jax import models
from grpo_jax.engine import sampling_params as conversions
from grpo_jax.engine.calls import Call
from grpo_jax.engine.compaction import SlotShape
from grpo_jax.engine.sampler_calls import SamplerCalls, describe
from grpo_jax.models import Quantized


@pytest.mark.parametrize('quantized', [False, True])
def test_only_what_changes_is_converted(quantized):
    """Otherwise each rollout would copy the base of adapters whose dtype is another."""
    base = jnp.ones((1, 2, 2), 'bfloat16')
    if quantized:
        base = Quantized(jnp.ones((1, 2, 2), 'int8'), jnp.ones((1, 1, 2), 'float32'))
    params = {
        'blocks': {'gate': base, 'gate_a': jnp.full((1, 2, 1), 1 / 3, 'float32')},
        'final_norm': {'scale': jnp.ones(2, 'float32')},
    }
    call = conversions.conversion(params, 'bfloat16', 'model', False)
    assert [x.shape for x in jax.tree.leaves(call.arguments)] == [(1, 2, 1)]
    made = conversions.sampling_params(params, 'bfloat16', 'model', False)
    assert made['blocks']['gate'] is base
    assert made['final_norm']['scale'] is params['final_norm']['scale']
    assert made['blocks']['gate_a'].dtype == jnp.bfloat16
    assert conversions.conversion(made, 'bfloat16', 'model', False) is None
    np.testing.assert_allclose(np.float32(made['blocks']['gate_a']), 1 / 3, rtol=2**-8)


def test_matrices_that_are_quantized_for_sampling_replace_arrays():
    params = {'blocks': {'gate': jnp.ones((1, 2, 2))}, 'final_norm': {'scale': jnp.ones(2)}}
    made = conversions.sampling_params(params, 'float32', 'int8', False)
    assert made['blocks']['gate'].values.dtype == jnp.int8
    assert made['final_norm']['scale'] is params['final_norm']['scale']


def test_widths_of_blocks():
    config = models.ModelConfig(
        vocab_size=5, width=4, layers=1, heads=1, kv_heads=1, head_dim=4, mlp_width=4
    )
    calls = SamplerCalls(models.Transformer(config), None, 2, 150, block=64)
    assert (calls.first_width, calls.next_width(64), calls.next_width(128)) == (64, 128, 150)
    assert SamplerCalls(models.Transformer(config), None, 2, 10).first_width == 10


def test_names():
    four, two = SlotShape(4, 4), SlotShape(8, 1, apart=True)
    assert describe('block', (four, 64), (four, 64)) == 'block to column 64 of 4 x 4 completions'
    assert describe('growth', (four, 64), (four, 128)) == (
        'caches of 4 x 4 completions from 64 to 128 columns'
    )
    assert describe('compaction', (four, 64), (two, 64)) == (
        'compaction of 4 x 4 completions to 8 x 1 completions, 64 columns'
    )
    assert describe('choice', (four, 64), (two, 64)) == (
        'choice of 8 x 1 completions from 4 x 4 completions'
    )
    assert describe('copies', (four, 64), (two, 64)) == (
        'copies of the prompts of 4 x 4 completions for 8 x 1 completions'
    )


def test_a_call_deletes_what_it_spends():
    kept, spent = jnp.ones(2), jnp.full(2, 3.0)
    call = Call(jax.jit(lambda x, y: jnp.pad(x + y, 1)), (kept, spent), spent=(spent,))
    np.testing.assert_array_equal(call.run(), [0, 4, 4, 0])
    assert (kept.is_deleted(), spent.is_deleted()) == (False, True)
