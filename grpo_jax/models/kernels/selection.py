"""Which form of attention a config gets on the platform that programs are compiled for."""

import re
from typing import Any

import jax

from grpo_jax.models.config import ModelConfig

MAX_DECODE_HEAD_DIM = 128  # with wider heads `decode_token` may not fit into shared memory


def target_device() -> Any:
    """The device that programs are traced for.

    It is the default device, or the kind of device of the mesh in use (`sharding.use`) where that
    is of another platform: programs for a TPU slice can be compiled on a machine without one.
    """
    device, described = jax.devices()[0], jax.sharding.get_abstract_mesh().abstract_device
    return device if described is None or described.platform == device.platform else described


def target_platform() -> str:
    """The platform that programs are traced for: 'cpu', 'gpu' or 'tpu'."""
    platform: str = target_device().platform
    return platform


def choose_attention(config: ModelConfig) -> str:
    """Resolves `config.attention`: 'auto' is the platform's kernel if it supports the model.

    Args:
      config: the decoder's.

    Returns:
      'einsum', 'recomputed', 'splash' or 'cudnn'.
    """
    if config.attention != 'auto':
        return config.attention
    device = target_device()
    name = {'tpu': 'splash', 'gpu': 'cudnn'}.get(device.platform, 'recomputed')
    if name == 'cudnn' and not _has_cudnn_kernel(device):
        name = 'recomputed'
    return 'recomputed' if config.unsupported_by(name) else name


def caches_in_place(config: ModelConfig) -> bool:
    """Whether decoding reads its caches in place, by the kernel of `decode_token`.

    It does on NVIDIA GPUs that cuDNN has a kernel for, even for models with soft caps or windows:
    cuDNN does not support these, but the decode kernel does. It needs a 16-bit dtype and heads of
    16, 32, 64 or 128 components. Other models, such as those of Gemma with heads of 256, decode by
    `attention.attend`, after a copy of each layer's cache.
    """
    if config.attention not in ('auto', 'cudnn'):
        return False
    if config.attention == 'auto' and not _has_cudnn_kernel(target_device()):
        return False
    width = config.head_dim
    return (
        config.dtype != 'float32'
        and 16 <= width <= MAX_DECODE_HEAD_DIM
        and not width & (width - 1)  # a power of two
    )


def _has_cudnn_kernel(device: Any) -> bool:
    """Whether the device is an NVIDIA GPU of compute capability 8 or more."""
    capability = str(getattr(device, 'compute_capability', ''))  # '9.0'; of AMD's GPUs, 'gfx942'
    if device.platform != 'gpu' or not re.fullmatch(r'\d+\.\d+', capability):
        return False
    return float(capability) >= 8
