"""The products of experts on TPUs, interpreted, against NumPy and against JAX's own derivative."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from grpo_jax.models.kernels import experts


@pytest.mark.parametrize(
    ('sizes', 'rows'),
    [([5, 0, 11, 1, 0, 20], 37), ([0, 0, 130, 0, 0, 0], 130), ([256, 1, 1, 1, 1, 252], 512)],
)
def test_gradients(sizes, rows):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(rows, 24)).astype(np.float32)
    matrices = rng.normal(size=(6, 24, 40)).astype(np.float32)
    cotangent = rng.normal(size=(rows, 40)).astype(np.float32)
    ends = np.cumsum([0, *sizes])
    parts = [slice(a, b) for a, b in itertools.pairwise(ends)]

    def loss(x, matrices):
        product = experts.multiply(x, matrices, jnp.asarray(sizes, jnp.int32), True)
        return (product * cotangent).sum(), product

    (_, product), (of_x, of_matrices) = jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)(
        x, matrices
    )
    for expert, part in enumerate(parts):
        np.testing.assert_allclose(product[part], x[part] @ matrices[expert], atol=1e-4)
        np.testing.assert_allclose(of_x[part], cotangent[part] @ matrices[expert].T, atol=1e-4)
        np.testing.assert_allclose(of_matrices[expert], x[part].T @ cotangent[part], atol=1e-4)
