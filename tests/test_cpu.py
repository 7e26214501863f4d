"""The CPU compiler's work-arounds: their numbers, and that other platforms do without them."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from grpo_jax import models
from grpo_jax.models.kernels import cpu
from grpo_jax.models.layers import Projection, multiply


@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
@pytest.mark.parametrize('sizes', [(6, 4), (4, 6), (5, 5)])
def test_slopes_of_a_product_by_hand(sizes, dtype):
    """d/dx of sum(w * (x m)) is w m^T, and d/dm is x^T w, in whichever form the model has it."""
    rng = np.random.default_rng(0)
    x, m, w = (rng.integers(-4, 5, shape) for shape in ((7, sizes[0]), sizes, (7, sizes[1])))
    arrays = tuple(jnp.asarray(array, dtype) for array in (x, m))

    def slopes(attention):
        config = tiny.make_model(attention=attention, dtype=dtype).config

        def loss(x, m):
            return (w * multiply(config, x, Projection(m, None, None, None))).sum()

        return tiny.jit(jax.grad(loss, argnums=(0, 1)))(*arrays)

    for found in (slopes('einsum'), slopes('recomputed')):
        np.testing.assert_array_equal(found[0], w @ m.T)
        np.testing.assert_array_equal(found[1], x.T @ w)
        assert all(slope.dtype == dtype for slope in found)


def test_scaled_rows_by_hand():
    x, factors = jnp.array([[1.0, 2.0], [3.0, -4.0]]), jnp.array([0.5, -2.0])
    gradient = jax.grad(lambda *a: (jnp.array([[1.0, 2.0], [3.0, 4.0]]) * cpu.scale_rows(*a)).sum())
    assert cpu.scale_rows(x, factors).tolist() == [[0.5, 1.0], [-6.0, 8.0]]
    assert gradient(x, factors).tolist() == [[0.5, 1.0], [-6.0, -8.0]]


# Platforms

GEMMA = {
    'attention_softcap': 50.0, 'logit_softcap': 30.0, 'norms': 'both', 'norm_plus_one': True,
    'activation': 'gelu_tanh', 'window': 3, 'window_layers': (0,),
}  # fmt: skip
MISTRAL = {'window': 3, 'window_layers': (0, 1)}
MODELS = {'plain': {}, 'Gemma': GEMMA, 'Mistral': MISTRAL}


def primitives(jaxpr):
    """Names of all primitives of a program, in the order of its text; a function's in its place."""
    for equation in jaxpr.eqns:
        yield equation.primitive.name, equation
        for inner in jax.tree.leaves(
            list(equation.params.values()),
            is_leaf=lambda x: isinstance(x, jax.extend.core.ClosedJaxpr | jax.extend.core.Jaxpr),
        ):
            inner = getattr(inner, 'jaxpr', inner)
            if isinstance(inner, jax.extend.core.Jaxpr):
                yield from primitives(inner)


def workarounds(device, options, rollout, monkeypatch):
    """The barriers and custom products of the gradient that this device compiles."""
    model = tiny.make_model(dtype='bfloat16', head_dim=16, **options)
    prompts = rollout.prompts

    def loss(params):
        arguments = prompts.tokens, prompts.length, rollout.tokens
        return models.completion_hidden(model, params, *arguments).astype(jnp.float32).sum()

    with monkeypatch.context() as context:
        products = []
        product = cpu._transposing_matmul
        context.setattr(cpu, '_transposing_matmul', lambda *x: products.append(1) or product(*x))
        context.setattr(jax, 'devices', lambda: [SimpleNamespace(**device)])
        jaxpr = jax.make_jaxpr(jax.grad(loss))(tiny.shapes(model))
    names = [name for name, _ in primitives(jaxpr.jaxpr)]
    return len(products), names.count('optimization_barrier')


@pytest.mark.parametrize('options', MODELS.values(), ids=MODELS)
def test_other_platforms_have_no_work_arounds(options, rollout, monkeypatch):
    """Nor do models whose attention keeps their platform's kernel out."""
    tpu, gpu = {'platform': 'tpu'}, {'platform': 'gpu', 'compute_capability': '9.0'}
    for device in (tpu, gpu) if options else (gpu | {'compute_capability': '7.5'},):
        assert workarounds(device, options, rollout, monkeypatch) == (0, 0)
    products, barriers = workarounds({'platform': 'cpu'}, options, rollout, monkeypatch)
    assert products > 0
    assert barriers > 0


def test_plain_attention_can_be_differentiated_twice(monkeypatch):
    """On CPUs too: TRPO asks for einsum attention, and with it for plain products."""
    config = tiny.make_model(attention='einsum').config
    assert not cpu.uses_custom_matmul(config)
    assert cpu.uses_custom_matmul(tiny.make_model().config)
    x = jnp.arange(6.0).reshape(2, 3)

    def loss(kernel):
        return (multiply(config, x, Projection(kernel, None, None, None)) ** 2).sum()

    kernel = jnp.ones((3, 4))
    _, product = jax.jvp(jax.grad(loss), (kernel,), (kernel,))
    np.testing.assert_allclose(product, 2 * x.T @ x @ kernel)
