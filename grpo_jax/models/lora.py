"""Adapters as separate parameters: split from the base, joined with it, merged into it.

With adapters the policy and its reference share the base: the reference is the base without
adapters, so it needs no second copy.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from grpo_jax.models.config import ModelConfig
from grpo_jax.models.quantization import dequantize, is_quantized
from grpo_jax.types import Params


def split_adapters(params: Params) -> tuple[Params, Params]:
    """Splits parameters into (base, adapters); without adapters the second is empty."""
    base: Params = {}
    adapters: Params = {}
    for name, value in params.items():
        if isinstance(value, dict):
            base[name], inner = split_adapters(value)
            adapters |= {name: inner} if inner else {}
        elif _is_adapter(name):
            adapters[name] = value
        else:
            base[name] = value
    return base, adapters


def join_adapters(base: Params, adapters: Params) -> Params:
    """The inverse of `split_adapters`; nothing is copied."""
    joined = dict(base)
    for name, value in adapters.items():
        joined[name] = join_adapters(base[name], value) if isinstance(value, dict) else value
    return joined


def merge_adapters(config: ModelConfig, base: Params, adapters: Params) -> Params:
    """Parameters of an equivalent decoder without adapters: W + alpha / r * A B.

    The sum is computed in float32 and rounded to the dtype of W. A quantized base is dequantized
    first, so that the result computes what was trained: it keeps the base's rounding errors, and
    has the adapters' product only as exactly as `config.param_dtype`.

    Args:
      config: of the decoder with adapters.
      base: see `split_adapters`.
      adapters: see `split_adapters`.
    """
    merged = _merge(config, dequantize(base, 'float32'), adapters)
    return jax.tree.map(
        lambda x, before: x.astype(config.param_dtype) if is_quantized(before) else x, merged, base
    )


def _merge(config: ModelConfig, base: Params, adapters: Params) -> Params:
    merged = dict(base)
    for name, value in adapters.items():
        if isinstance(value, dict):
            merged[name] = _merge(config, base[name], value)
        elif name.endswith('_lora_a'):
            kernel = name.removesuffix('_lora_a')
            merged[kernel] = _add_product(
                base[kernel], value, adapters[f'{kernel}_lora_b'], config.lora.scale
            )
    return merged


def _add_product(
    kernel: Float[Array, 'L ...'],
    a: Float[Array, 'L ... r'],
    b: Float[Array, 'L r ...'],
    scale: float,
) -> Float[Array, 'L ...']:
    """Computes kernel [L, *in, *out] + scale * a [L, *in, r] @ b [L, r, *out]."""
    layers, rank = a.shape[0], a.shape[-1]
    product = jnp.einsum(
        'lir,lro->lio',
        a.reshape(layers, -1, rank),
        b.reshape(layers, rank, -1),
        precision='highest',
    )
    return (kernel + scale * product.reshape(kernel.shape)).astype(kernel.dtype)


def _is_adapter(name: str) -> bool:
    return name.endswith(('_lora_a', '_lora_b'))
