"""The policy network. Only this folder imports flax."""

from grpo_jax.models.transformer import (
    KeyValues,
    ModelConfig,
    Transformer,
    apply,
    group_hidden,
    init,
)

__all__ = ['KeyValues', 'ModelConfig', 'Transformer', 'apply', 'group_hidden', 'init']
