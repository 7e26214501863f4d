"""Parameters of reward models and critics, made of those of a language model."""

import jax.numpy as jnp

from grpo_jax.models.config import ModelConfig
from grpo_jax.models.lora import split_adapters
from grpo_jax.models.quantization import dequantize
from grpo_jax.types import Params


def scalar_params(params: Params, config: ModelConfig) -> Params:
    """Parameters of a model with a scalar head: those of a language model, and a score of 0.

    Args:
      params: of the language model, adapters merged. Its arrays are shared, not copied; quantized
        matrices are dequantized, since all parameters of the result can be trained.
      config: of either model.

    Raises:
      ValueError: there are adapters.
    """
    if split_adapters(params)[1]:
        raise ValueError('scalar_params got parameters with adapters: call `merge_adapters` first')
    params = dequantize(params, config.param_dtype)
    trunk = {name: value for name, value in params.items() if name != 'head'}
    return trunk | {'score': jnp.zeros((config.width, 1), config.param_dtype)}
