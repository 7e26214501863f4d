"""Parts of a layer: normalization, projections with their adapters, the MLP and its experts.

The functions create their parameters in the module that they are called with, a `Block`, and read
its config.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Shaped

from grpo_jax.models.config import ModelConfig
from grpo_jax.models.kernels import cpu
from grpo_jax.models.quantization import unpack

# Variables of flax: experts to use instead of the router's choice, and the experts that were used.
CHOSEN, RECORDED = 'chosen_experts', 'recorded_experts'
PROBABILITIES = 'router_probabilities'  # of every expert, for the load-balancing loss

_ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    'silu': jax.nn.silu,
    'gelu': lambda x: jax.nn.gelu(x, approximate=False),
    'gelu_tanh': lambda x: jax.nn.gelu(x, approximate=True),
}


class RMSNorm(nn.Module):
    """x / rms(x) * scale, computed in float32 (Zhang and Sennrich, arXiv 1910.07467)."""

    config: ModelConfig
    scanned: bool = False  # see `Block`

    @nn.compact
    def __call__(self, x: Float[Array, '*axes D']) -> Float[Array, '*axes D']:
        c = self.config
        init = nn.initializers.zeros if c.norm_plus_one else nn.initializers.ones
        scale = self.param('scale', init, (x.shape[-1],), c.param_dtype)
        normalize: Callable[..., Array] = functools.partial(_normalize, c)
        if x.dtype != jnp.float32:  # otherwise the backward pass would store two float32 copies
            normalize = jax.checkpoint(normalize, prevent_cse=not self.scanned)
        return normalize(x, scale)


def _normalize(
    c: ModelConfig, x: Float[Array, '*axes D'], scale: Float[Array, ' D']
) -> Float[Array, '*axes D']:
    x32, scale = x.astype(jnp.float32), scale.astype(jnp.float32)
    inverse = jax.lax.rsqrt(jnp.mean(x32 * x32, axis=-1) + c.norm_eps)
    x32 = cpu.scale_rows(x32, inverse)
    return (x32 * (1 + scale if c.norm_plus_one else scale)).astype(x.dtype)


class Projection(NamedTuple):
    """The matrices of a projection, in the computation's dtype."""

    kernel: Shaped[Array, 'fan_in fan_out']  # int8 if quantized
    scale: Float[Array, ' fan_out'] | None  # f32, of the product with a quantized kernel
    adapter: tuple[Float[Array, 'fan_in r'], Float[Array, 'r fan_out']] | None
    bias: Float[Array, ' fan_out'] | None


def projection(
    module: nn.Module, name: str, sizes: tuple[int, ...], out: tuple[int, ...], *, bias: bool
) -> Projection:
    """Creates the parameter `name` [*sizes, *out], its adapter and `<name>_bias` [*out]."""
    c: ModelConfig = module.config
    fan_in, fan_out = math.prod(sizes), math.prod(out)
    matrix = module.param(name, _matrix_init(c, name, fan_in), (*sizes, *out), c.param_dtype)
    kernel, scale = unpack(matrix)
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


def multiply(
    c: ModelConfig, x: Float[Array, 'N fan_in'], weights: Projection
) -> Float[Array, 'N fan_out']:
    """Multiplies x by the projection's matrix and adapter, and adds its bias."""
    product = jnp.matmul if weights.scale is not None else functools.partial(cpu.matmul, c)
    y = _scaled_product(product, x, weights.kernel, weights.scale)
    if weights.adapter is not None:
        a, b = weights.adapter
        y = y + (x @ a * jnp.asarray(c.lora.scale, c.dtype)) @ b
    return y if weights.bias is None else y + weights.bias


def _scaled_product(
    product: Callable[..., Array],
    x: Float[Array, 'N fan_in'],
    matrix: Shaped[Array, '*experts fan_in fan_out'],
    scale: Float[Array, '*rows fan_out'] | None,
) -> Float[Array, 'N fan_out']:
    """Computes product(x, matrix) * scale in float32: sums of integers may overflow in float16."""
    if scale is None:
        return product(x, matrix)
    return (product(x, matrix, preferred_element_type=jnp.float32) * scale).astype(x.dtype)


def project(
    module: nn.Module,
    name: str,
    x: Float[Array, '...'],
    out: tuple[int, ...],
    *,
    inputs: int = 1,
    bias: bool = False,
) -> Float[Array, '...']:
    """Multiplies x by the module's parameter `name` [*in, *out] and its adapter.

    It multiplies two matrices, with all other axes flattened; see `kernels.cpu`.

    Args:
      module: holds the parameters; its config tells whether there is an adapter.
      name: a key of `config.PROJECTIONS`.
      x: [..., *in].
      out: sizes of the output axes.
      inputs: how many axes of x are summed over.
      bias: adds the parameter `<name>_bias` [*out].

    Returns:
      [..., *out].
    """
    lead, sizes = x.shape[:-inputs], x.shape[-inputs:]
    weights = projection(module, name, sizes, out, bias=bias)
    y = multiply(module.config, x.reshape(-1, weights.kernel.shape[0]), weights)
    return y.reshape(*lead, *out)


def _matrix_init(c: ModelConfig, name: str, fan_in: int) -> nn.initializers.Initializer:
    """Matrices that write into the residual stream start small, so that embeddings dominate."""
    small = 0.02 / (2 * c.layers) ** 0.5
    return nn.initializers.normal(small if name in ('out', 'down') else fan_in**-0.5)


def _adapter_init(fan_in: int) -> Callable[..., Array]:
    """As in PEFT: A within +-1 / sqrt(fan_in) and B zero, so that the policy starts as the base."""
    bound = fan_in**-0.5

    def init(key: Array, shape: tuple[int, ...], dtype: Any = jnp.float32) -> Array:
        return jax.random.uniform(key, shape, dtype, -bound, bound)

    return init


def finish_logits(c: ModelConfig, products: Float[Array, '*axes V']) -> Float[Array, '*axes V']:
    """Logits from products of hidden states and the output matrix.

    It applies the soft cap, if there is one. Rows of the embedding that the tokenizer has no token
    for get -inf, so every distribution, its log-probs and its entropy are over the tokenizer's
    tokens alone, in sampling and in training.
    """
    logits = products
    if c.logit_softcap:
        logits = c.logit_softcap * jnp.tanh(logits / c.logit_softcap)
    if not c.token_ranges:
        return logits
    token = jnp.arange(logits.shape[-1])
    known = [(token >= start) & (token < stop) for start, stop in c.token_ranges]
    return jnp.where(functools.reduce(jnp.logical_or, known), logits, -jnp.inf)


def mlp(module: nn.Module, x: Float[Array, '*axes D']) -> Float[Array, '*axes D']:
    """(act(x gate) * (x up)) down (Shazeer, arXiv 2002.05202).

    Of the arrays as wide as the MLP, only the two products are stored for the backward pass:
    recomputing the others costs less than writing and reading them.
    """
    c: ModelConfig = module.config
    gate = project(module, 'gate', x, (c.mlp_width,), bias=c.mlp_bias)
    up = project(module, 'up', x, (c.mlp_width,), bias=c.mlp_bias)
    down = projection(module, 'down', (c.mlp_width,), (c.width,), bias=c.mlp_bias)

    def output(gate: Array, up: Array, down: Projection) -> Array:
        return multiply(c, _ACTIVATIONS[c.activation](gate) * up, down)

    rows = (y.reshape(-1, c.mlp_width) for y in (gate, up))
    return jax.checkpoint(output, prevent_cse=not module.scanned)(*rows, down).reshape(x.shape)


def experts(module: nn.Module, x: Float[Array, '*axes D']) -> Float[Array, '*axes D']:
    """Several MLPs; a softmax router picks the top few for each token (Mixtral, arXiv 2401.04088).

    No token is dropped to balance the experts, so a token's result does not depend on the other
    tokens, and sampler and update agree.
    """
    c: ModelConfig = module.config
    tokens = x.reshape(-1, c.width)
    weights, chosen = _route(module, tokens)
    order = jnp.argsort(chosen.reshape(-1))  # copies of the tokens, sorted by expert
    expert = chosen.reshape(-1)[order]
    sizes = jnp.bincount(chosen.reshape(-1), length=c.experts).astype(jnp.int32)

    def multiply(name: str, x: Array, width: int) -> Array:
        shape = (c.experts, x.shape[-1], width)
        matrix = module.param(name, _matrix_init(c, name, x.shape[-1]), shape, c.param_dtype)
        kernel, scale = unpack(matrix)
        scale = None if scale is None else scale[expert, 0]
        product = functools.partial(jax.lax.ragged_dot, group_sizes=sizes)
        return _scaled_product(product, x, kernel.astype(c.dtype), scale)

    copies = tokens[order // c.experts_per_token]
    hidden = _ACTIVATIONS[c.activation](multiply('gate', copies, c.mlp_width))
    hidden = hidden * multiply('up', copies, c.mlp_width)
    out = multiply('down', hidden, c.width)[jnp.argsort(order)]
    out = out.reshape(-1, c.experts_per_token, c.width)
    return (out * weights[..., None]).sum(1).reshape(x.shape)


def _route(
    module: nn.Module, tokens: Float[Array, 'N D']
) -> tuple[Float[Array, 'N chosen'], Int[Array, 'N chosen']]:
    """Weights and indices of the experts that each token uses."""
    c: ModelConfig = module.config
    init = nn.initializers.normal(c.width**-0.5)
    router = module.param('router', init, (c.width, c.experts), c.param_dtype)
    scores = jax.nn.softmax((tokens @ router.astype(c.dtype)).astype(jnp.float32))
    if module.has_variable(CHOSEN, 'experts'):  # see `models.routing`
        chosen: Array = module.get_variable(CHOSEN, 'experts')
        weights = jnp.take_along_axis(scores, chosen, axis=-1)
    else:
        weights, chosen = jax.lax.top_k(scores, c.experts_per_token)
    for kind, name, value in ((RECORDED, 'experts', chosen), (PROBABILITIES, 'all', scores)):
        module.sow(kind, name, value, reduce_fn=lambda _, new: new, init_fn=lambda: None)
    if c.normalize_experts:
        weights = weights / weights.sum(-1, keepdims=True)
    return weights.astype(tokens.dtype), chosen
