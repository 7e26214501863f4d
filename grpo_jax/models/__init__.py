"""The policy network. Only this package imports flax."""

from grpo_jax.models.attention import MASKED_POSITION
from grpo_jax.models.block import KeyValues, Owners
from grpo_jax.models.config import Lora, ModelConfig, with_scalar_head
from grpo_jax.models.forward import (
    completion_hidden,
    hidden_after_prompt,
    hidden_at_tokens,
    last_tokens,
)
from grpo_jax.models.kernels.selection import caches_in_place
from grpo_jax.models.layers import finish_logits
from grpo_jax.models.lora import join_adapters, merge_adapters, split_adapters
from grpo_jax.models.quantization import Quantized, dequantize, quantize, quantize_base
from grpo_jax.models.routing import apply_routed, router_outputs
from grpo_jax.models.scalar_head import scalar_params
from grpo_jax.models.transformer import Transformer, apply, init_params
from grpo_jax.models.unrolled import stack_layers, unstack_layers

__all__ = [
    'MASKED_POSITION',
    'KeyValues',
    'Lora',
    'ModelConfig',
    'Owners',
    'Quantized',
    'Transformer',
    'apply',
    'apply_routed',
    'caches_in_place',
    'completion_hidden',
    'dequantize',
    'finish_logits',
    'hidden_after_prompt',
    'hidden_at_tokens',
    'init_params',
    'join_adapters',
    'last_tokens',
    'merge_adapters',
    'quantize',
    'quantize_base',
    'router_outputs',
    'scalar_params',
    'split_adapters',
    'stack_layers',
    'unstack_layers',
    'with_scalar_head',
]
