"""Adapters as parameters of their own: taken from the base, joined to it, folded into it.

With adapters the base is what the policy and its reference share: the reference is the base with
the adapters off, so it needs no second copy.
"""

import jax
import jax.numpy as jnp

from grpo_jax.models.config import ModelConfig
from grpo_jax.types import Params


def split(params: Params) -> tuple[Params, Params]:
    """(base, adapters) from parameters that hold both; without adapters the second is empty."""
    base: Params = {}
    adapters: Params = {}
    for name, value in params.items():
        if isinstance(value, dict):
            base[name], inner = split(value)
            adapters |= {name: inner} if inner else {}
        elif _is_adapter(name):
            adapters[name] = value
        else:
            base[name] = value
    return base, adapters


def join(base: Params, adapters: Params) -> Params:
    """Parameters of the policy from the two trees that `split` gave; nothing is copied."""
    joined = dict(base)
    for name, value in adapters.items():
        joined[name] = join(base[name], value) if isinstance(value, dict) else value
    return joined


def merge(config: ModelConfig, base: Params, adapters: Params) -> Params:
    """Parameters of a decoder without adapters that computes the same: W + alpha / r * A B.

    The sum is made in float32 and rounded to the dtype of W.

    Args:
      config: of the decoder with adapters.
      base: see `split`.
      adapters: see `split`.
    """
    merged = dict(base)
    for name, value in adapters.items():
        if isinstance(value, dict):
            merged[name] = merge(config, base[name], value)
        elif name.endswith('_lora_a'):
            kernel = name.removesuffix('_lora_a')
            merged[kernel] = _fold(
                base[kernel], value, adapters[f'{kernel}_lora_b'], config.lora.scale
            )
    return merged


def _fold(kernel: jax.Array, a: jax.Array, b: jax.Array, scale: float) -> jax.Array:
    """[L, *in, *out] from a [L, *in, r] and b [L, r, *out]."""
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
