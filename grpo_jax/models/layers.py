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

from grpo_jax.models import quantization
from grpo_jax.models.config import ModelConfig
from grpo_jax.models.kernels import cpu
from grpo_jax.models.kernels.selection import target_platform
from grpo_jax.models.quantization import Quantized, unpack
from grpo_jax.sharding import by_axes, on_each_data_device

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
    """The matrices of a projection, in the computation's dtype unless they are quantized."""

    kernel: Shaped[Array, 'rows fan_out']  # [fan_in, fan_out], or the values of a `Quantized`
    scale: Float[Array, '*blocks fan_out'] | None  # of a quantized kernel, see `Quantized`
    adapter: tuple[Float[Array, 'fan_in r'], Float[Array, 'r fan_out']] | None
    bias: Float[Array, ' fan_out'] | None


def projection(
    module: nn.Module, name: str, sizes: tuple[int, ...], out: tuple[int, ...], *, bias: bool
) -> Projection:
    """Creates the parameter `name` [*sizes, *out], its adapter and `<name>_bias` [*out]."""
    c: ModelConfig = module.config
    fan_in, fan_out = math.prod(sizes), math.prod(out)
    kernel, scale = unpack(_matrix(module, name, fan_in, (*sizes, *out)))
    kernel = by_axes(kernel.astype(c.dtype) if scale is None else kernel, name)
    if scale is not None:
        scale = scale.reshape(-1, fan_out) if kernel.dtype == jnp.uint8 else scale.reshape(fan_out)
    kernel = kernel.reshape(-1, fan_out)
    adapter = None
    if c.lora.covers(name):
        a = module.param(f'{name}_lora_a', _adapter_init(fan_in), (*sizes, c.lora.rank))
        b = module.param(f'{name}_lora_b', nn.initializers.zeros, (c.lora.rank, *out))
        a = by_axes(a.astype(c.dtype), f'{name}_lora_a')
        b = by_axes(b.astype(c.dtype), f'{name}_lora_b')
        adapter = a.reshape(fan_in, -1), b.reshape(-1, fan_out)
    offset = None
    if bias:
        offset = module.param(f'{name}_bias', nn.initializers.zeros, out, c.param_dtype)
        offset = offset.astype(c.dtype).reshape(-1)
    return Projection(kernel, scale, adapter, offset)


def multiply(
    c: ModelConfig, x: Float[Array, 'N fan_in'], weights: Projection
) -> Float[Array, 'N fan_out']:
    """Multiplies x by the projection's matrix and adapter, and adds its bias."""
    if weights.scale is None:
        y = cpu.matmul(c, x, weights.kernel)
    else:
        y = _quantized_product(c)(x, weights.kernel, weights.scale)
    if weights.adapter is not None:
        a, b = weights.adapter
        y = y + (x @ a * jnp.asarray(c.lora.scale, c.dtype)) @ b
    return y if weights.bias is None else y + weights.bias


def _quantized_product(c: ModelConfig) -> Callable[..., Array]:
    """The product with a quantized matrix.

    TRPO, which needs `attention='einsum'`, differentiates its gradient once more in forward mode,
    which a custom gradient does not allow.
    """
    return quantization.multiply if c.attention == 'einsum' else quantization.multiply_frozen


def _matrix(
    module: nn.Module, name: str, fan_in: int, shape: tuple[int, ...]
) -> Float[Array, '...'] | Quantized:
    """The module's parameter `name` of this shape, or the `Quantized` that is in its place."""
    if module.has_variable('params', name):
        stored: Any = module.get_variable('params', name)
        if isinstance(stored, Quantized):  # whose shape flax would not expect
            return stored
    c: ModelConfig = module.config
    return module.param(name, _matrix_init(c, name, fan_in), shape, c.param_dtype)


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
    y = multiply(module.config, x.reshape(-1, math.prod(sizes)), weights)
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
    matrices = {}
    for name, size, width in (
        ('gate', c.width, c.mlp_width), ('up', c.width, c.mlp_width), ('down', c.mlp_width, c.width)
    ):  # fmt: skip
        kernel, scale = unpack(_matrix(module, name, size, (c.experts, size, width)))
        kernel = kernel.astype(c.dtype) if scale is None else kernel
        matrices[name] = by_axes(kernel, name), scale
    run = on_each_data_device(functools.partial(_sum_of_experts, c))
    return run((tokens, weights, chosen), matrices).reshape(x.shape)


def _sum_of_experts(
    c: ModelConfig,
    routed: tuple[Float[Array, 'N D'], Float[Array, 'N chosen'], Int[Array, 'N chosen']],
    matrices: dict[str, tuple[Shaped[Array, 'E _ _'], Float[Array, '...'] | None]],
) -> Float[Array, 'N D']:
    """The weighted sum of what each token's experts compute.

    Args:
      c: of the decoder.
      routed: the tokens, and the weights and numbers of their experts.
      matrices: kernel and scale of 'gate', 'up' and 'down', see `quantization.unpack`.
    """
    tokens, weights, chosen = routed
    order = jnp.argsort(chosen.reshape(-1))  # copies of the tokens, sorted by expert
    expert = chosen.reshape(-1)[order]
    sizes = jnp.bincount(chosen.reshape(-1), length=c.experts).astype(jnp.int32)

    def multiply(name: str, x: Array) -> Array:
        kernel, scale = matrices[name]
        if scale is None:
            return _expert_product(c)(x, kernel, sizes)
        scale = scale if kernel.dtype == jnp.uint8 else scale[expert, 0]
        return _quantized_product(c)(x, kernel, scale, sizes)

    copies = tokens[order // c.experts_per_token]
    hidden = _ACTIVATIONS[c.activation](multiply('gate', copies)) * multiply('up', copies)
    out = multiply('down', hidden)[jnp.argsort(order)]
    out = out.reshape(-1, c.experts_per_token, c.width)
    return (out * weights[..., None]).sum(1)


def _expert_product(c: ModelConfig) -> Callable[..., Array]:
    """The product of rows with the matrices of their experts.

    A kernel cannot be partitioned over the `tensor` axis, nor differentiated again (see
    `_quantized_product`).
    """
    mesh = jax.sharding.get_abstract_mesh()
    partitioned = not mesh.empty and mesh.shape['tensor'] > 1
    if partitioned or c.attention == 'einsum' or target_platform() != 'tpu':
        return jax.lax.ragged_dot
    from grpo_jax.models.kernels import experts  # slow to import

    return experts.multiply


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
        choose = on_each_data_device(lambda scores, _: jax.lax.top_k(scores, c.experts_per_token))
        weights, chosen = choose(scores, ())
    for kind, name, value in ((RECORDED, 'experts', chosen), (PROBABILITIES, 'all', scores)):
        module.sow(kind, name, value, reduce_fn=lambda _, new: new, init_fn=lambda: None)
    if c.normalize_experts:
        weights = weights / weights.sum(-1, keepdims=True)
    return weights.astype(tokens.dtype), chosen
