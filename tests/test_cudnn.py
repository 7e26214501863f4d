"""What the GPU's kernel does not support; `test_dispatch` covers what it computes."""

import jax.numpy as jnp
import pytest
from attention_cases import make_arrays

from grpo_jax.models.kernels import cudnn


def test_cudnn_has_no_soft_cap():
    arrays, _ = make_arrays()
    with pytest.raises(ValueError, match=r"no softcap=2.0: use attention='einsum'"):
        cudnn.attend(*arrays, jnp.array([6, 1]), scale=1.0, softcap=2.0)
