"""The policy network. Only this folder imports flax."""

from grpo_jax.models.config import Lora, ModelConfig
from grpo_jax.models.lora import join, merge, split
from grpo_jax.models.transformer import KeyValues, Transformer, apply, completion_hidden, init

__all__ = [
    'KeyValues',
    'Lora',
    'ModelConfig',
    'Transformer',
    'apply',
    'completion_hidden',
    'init',
    'join',
    'merge',
    'split',
]
