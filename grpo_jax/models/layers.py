"""Parts of a layer: projections with their adapters, normalisation, the MLP and its experts.

The functions make their parameters in the module that they are given, a `Block`, whose options they
read.
"""

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from grpo_jax.models.config import ModelConfig
from grpo_jax.models.flash import choose
from grpo_jax.models.quantized import unpacked

_ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    'silu': jax.nn.silu,
    'gelu': lambda x: jax.nn.gelu(x, approximate=False),
    'gelu_tanh': lambda x: jax.nn.gelu(x, approximate=True),
}


class RMSNorm(nn.Module):
    """Zhang and Sennrich, arXiv 1910.07467: x / rms(x) * scale, in float32."""

    config: ModelConfig
    scanned: bool = False  # see `Block`

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        c = self.config
        init = nn.initializers.zeros if c.norm_plus_one else nn.initializers.ones
        scale = self.param('scale', init, (x.shape[-1],), c.param_dtype)
        normalized: Callable[..., jax.Array] = functools.partial(_normalized, c)
        if x.dtype != jnp.float32:  # or the backward pass would be left two copies in float32
            normalized = jax.checkpoint(normalized, prevent_cse=not self.scanned)
        return normalized(x, scale)


def _normalized(c: ModelConfig, x: jax.Array, scale: jax.Array) -> jax.Array:
    x32, scale = x.astype(jnp.float32), scale.astype(jnp.float32)
    inverse = jax.lax.rsqrt(jnp.mean(x32 * x32, axis=-1) + c.norm_eps)
    # A product whose gradient is one again: XLA before 0.12 takes ten times as long for the sum
    # of two arrays' products on CPUs, where one of their axes is 1.
    x32 = jnp.einsum('...d,...->...d', x32, inverse, precision='highest')
    return (x32 * (1 + scale if c.norm_plus_one else scale)).astype(x.dtype)


class Projection(NamedTuple):
    """The matrices of one, in the computation's dtype."""

    kernel: jax.Array  # [fan_in, fan_out]
    scale: jax.Array | None  # f32[fan_out], of the product with a quantised kernel
    adapter: tuple[jax.Array, jax.Array] | None  # [fan_in, r], [r, fan_out]
    bias: jax.Array | None  # [fan_out]


def projection(
    module: nn.Module, name: str, sizes: tuple[int, ...], out: tuple[int, ...], *, bias: bool
) -> Projection:
    """The module's parameter `name` [*sizes, *out], its adapter and `<name>_bias` [*out]."""
    c: ModelConfig = module.config
    fan_in, fan_out = math.prod(sizes), math.prod(out)
    matrix = module.param(name, _matrix_init(c, name, fan_in), (*sizes, *out), c.param_dtype)
    kernel, scale = unpacked(matrix)
    kernel = kernel.astype(c.dtype).reshape(fan_in, fan_out)
    scale = None if scale is None else scale.reshape(fan_out)
    adapter = None
    if c.lora.covers(name):
        a = module.param(f'{name}_lora_a', _adapter_init(fan_in), (*sizes, c.lora.rank))
        b = module.param(f'{name}_lora_b', nn.initializers.zeros, (c.lora.rank, *out))
        adapter = a.astype(c.dtype).reshape(fan_in, -1), b.astype(c.dtype).reshape(-1, fan_out)
    offset = None
    if bias:
        offset = module.param(f'{name}_bias', nn.initializers.zeros, out, c.param_dtype)
        offset = offset.astype(c.dtype).reshape(-1)
    return Projection(kernel, scale, adapter, offset)


def multiply(c: ModelConfig, x: jax.Array, by: Projection) -> jax.Array:
    """[N, fan_out] from x [N, fan_in]."""
    plain = by.scale is not None or choose(c) != 'recomputed'
    y = _scaled(jnp.matmul if plain else _product, x, by.kernel, by.scale)
    if by.adapter is not None:
        a, b = by.adapter
        y = y + (x @ a * jnp.asarray(c.lora.scale, c.dtype)) @ b
    return y if by.bias is None else y + by.bias


@jax.custom_vjp
def _product(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """Multiplies, for CPUs: the kernel's gradient is x^T slope, the narrower of them turned before.

    A sum over the first axis of both operands is what their compiler is slowest at.
    """
    return x @ kernel


def _product_forward(x, kernel):
    return x @ kernel, (x, kernel)


def _product_backward(kept, slope):
    x, kernel = kept
    held = jax.lax.optimization_barrier  # or they would be turned back
    to_x = slope @ kernel.T
    if x.shape[-1] > slope.shape[-1]:
        return to_x, held(held(slope.T) @ x).T
    return to_x, held(x.T) @ slope


_product.defvjp(_product_forward, _product_backward)


def _scaled(product: Callable[..., jax.Array], x, matrix, scale: jax.Array | None) -> jax.Array:
    """product(x, matrix) * scale, in float32 before: sums of integers may overflow in float16."""
    if scale is None:
        return product(x, matrix)
    return (product(x, matrix, preferred_element_type=jnp.float32) * scale).astype(x.dtype)


def project(
    module: nn.Module,
    name: str,
    x: jax.Array,
    out: tuple[int, ...],
    *,
    inputs: int = 1,
    bias: bool = False,
) -> jax.Array:
    """Multiplies x by the module's parameter `name` [*in, *out], and adds its adapter's share.

    The product is one of two matrices: with more axes the compiler for CPUs would reorder an
    operand of the weight's gradient element by element.

    Args:
      module: holds the parameters; its config says whether there is an adapter.
      name: a key of `config.PROJECTIONS`.
      x: [..., *in].
      out: sizes of the output axes.
      inputs: how many axes of x are summed over.
      bias: adds the parameter `<name>_bias` [*out].

    Returns:
      [..., *out].
    """
    lead, sizes = x.shape[:-inputs], x.shape[-inputs:]
    by = projection(module, name, sizes, out, bias=bias)
    y = multiply(module.config, x.reshape(-1, by.kernel.shape[0]), by)
    return y.reshape(*lead, *out)


def _matrix_init(c: ModelConfig, name: str, fan_in: int) -> nn.initializers.Initializer:
    """Matrices that write into the residual stream start small, so that tokens show."""
    small = 0.02 / (2 * c.layers) ** 0.5
    return nn.initializers.normal(small if name in ('out', 'down') else fan_in**-0.5)


def _adapter_init(fan_in: int) -> nn.initializers.Initializer:
    """As in PEFT: A within 1 / sqrt(inputs) and B zero, so the policy starts as the base."""
    bound = fan_in**-0.5

    def init(key, shape, dtype=jnp.float32):
        return jax.random.uniform(key, shape, dtype, -bound, bound)

    return init


def capped(c: ModelConfig, logits: jax.Array) -> jax.Array:
    """What the model makes of the products of hidden states and `Transformer.output_matrix`."""
    return c.logit_softcap * jnp.tanh(logits / c.logit_softcap) if c.logit_softcap else logits


def mlp(module: nn.Module, x: jax.Array) -> jax.Array:
    """act(x gate) * (x up) down (Shazeer, arXiv 2002.05202) of x [..., D].

    Of what is as wide as the MLP, the backward pass is left the two products alone: to compute the
    rest again costs less than to write and read it.
    """
    c: ModelConfig = module.config
    gate = project(module, 'gate', x, (c.mlp_width,), bias=c.mlp_bias)
    up = project(module, 'up', x, (c.mlp_width,), bias=c.mlp_bias)
    down = projection(module, 'down', (c.mlp_width,), (c.width,), bias=c.mlp_bias)

    def narrow(gate, up, down):
        return multiply(c, _ACTIVATIONS[c.activation](gate) * up, down)

    rows = (y.reshape(-1, c.mlp_width) for y in (gate, up))
    return jax.checkpoint(narrow, prevent_cse=not module.scanned)(*rows, down).reshape(x.shape)


def experts(module: nn.Module, x: jax.Array) -> jax.Array:
    """Several MLPs, of which each token uses its best few by a softmax router (arXiv 2401.04088).

    Every token reaches all its experts: none is dropped for balance, so a token's result does not
    depend on its neighbours, and sampler and scorer agree.
    """
    c: ModelConfig = module.config
    tokens = x.reshape(-1, c.width)
    weights, chosen = _route(module, tokens)
    order = jnp.argsort(chosen.reshape(-1))  # copies of the tokens, those of one expert together
    expert = chosen.reshape(-1)[order]
    sizes = jnp.bincount(chosen.reshape(-1), length=c.experts).astype(jnp.int32)

    def multiply(name: str, x: jax.Array, width: int) -> jax.Array:
        shape = (c.experts, x.shape[-1], width)
        matrix = module.param(name, _matrix_init(c, name, x.shape[-1]), shape, c.param_dtype)
        kernel, scale = unpacked(matrix)
        scale = None if scale is None else scale[expert, 0]
        product = functools.partial(jax.lax.ragged_dot, group_sizes=sizes)
        return _scaled(product, x, kernel.astype(c.dtype), scale)

    copies = tokens[order // c.experts_per_token]
    hidden = _ACTIVATIONS[c.activation](multiply('gate', copies, c.mlp_width))
    hidden = hidden * multiply('up', copies, c.mlp_width)
    out = multiply('down', hidden, c.width)[jnp.argsort(order)]
    out = out.reshape(-1, c.experts_per_token, c.width)
    return (out * weights[..., None]).sum(1).reshape(x.shape)


def _route(module: nn.Module, tokens: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Weights and numbers [N, experts_per_token] of the experts that each token uses."""
    c: ModelConfig = module.config
    init = nn.initializers.normal(c.width**-0.5)
    router = module.param('router', init, (c.width, c.experts), c.param_dtype)
    scores = jax.nn.softmax((tokens @ router.astype(c.dtype)).astype(jnp.float32))
    weights, chosen = jax.lax.top_k(scores, c.experts_per_token)
    if c.normalize_experts:
        weights = weights / weights.sum(-1, keepdims=True)
    return weights.astype(tokens.dtype), chosen
