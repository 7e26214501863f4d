"""The policy network. Only this folder imports flax."""

from grpo_jax.models.block import KeyValues, Owners
from grpo_jax.models.config import Lora, ModelConfig, with_scalar_head
from grpo_jax.models.flash import from_stacks
from grpo_jax.models.layers import capped
from grpo_jax.models.lora import join, merge, split
from grpo_jax.models.quantized import Quantized, quantized
from grpo_jax.models.reading import (
    completion_hidden,
    continuation_hidden,
    last_tokens,
    read_hidden,
)
from grpo_jax.models.transformer import Transformer, apply, init, scalar_params
from grpo_jax.models.unrolled import stacked, unstacked

__all__ = [
    'KeyValues',
    'Lora',
    'ModelConfig',
    'Owners',
    'Quantized',
    'Transformer',
    'apply',
    'capped',
    'completion_hidden',
    'continuation_hidden',
    'from_stacks',
    'init',
    'join',
    'last_tokens',
    'merge',
    'quantized',
    'read_hidden',
    'scalar_params',
    'split',
    'stacked',
    'unstacked',
    'with_scalar_head',
]
