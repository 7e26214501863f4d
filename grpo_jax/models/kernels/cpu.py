"""Work-arounds for XLA's CPU compiler; on other platforms each function is the plain operation.

Times are those of the whole update relative to the plain operation, on the workloads W1 to W4 of
`benchmarks/RESULTS.md` and two cores of an AMD Zen 4.

`materialize`: without a barrier the compiler fuses a cheap producer into every consumer.
  Attention masks were compared again for each score: with it W1 takes 0.975 of the time. The
  gradients of keys and values were computed in another order of axes: that and recomputed scores
  take 0.93 of the time on W1 and 0.90 on W2. No version up to 0.12 is known to make it obsolete.
`scale_rows`: for the gradient of x * factors[..., None], a sum over a product of two arrays in
  which an axis is 1, XLA before 0.12 takes ten times as long as for a dot product. With the MLP's
  recomputation, W1 takes 0.96 of the time. Obsolete when jax 0.12 is the oldest supported version.
`matmul`: a product that sums over the first axis of both operands, as the gradient of a weight
  does, is the slowest of all. With the narrower operand transposed beforehand, jax 0.12 takes 0.95,
  0.96, 0.98 and 0.97 of the time on W1 to W4; jax 0.10.2 takes as long (W1 1.01, W3 1.00).
  Obsolete when the compiler transposes the operand itself.
`options_of_one_run`: random numbers take long programs, and each runs once. Optimized less, that of
  the parameters of `configs/arithmetic.py` compiles in 1.1 in place of 2.4 seconds of two
  processors, with the same bits; the first step comes after 9.8 in place of 10.3 s.

`layers.project` flattens its operands to matrices on every platform: with more axes, this compiler
reorders an operand of the weight's gradient element by element.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree, Shaped

from grpo_jax.models.config import ModelConfig
from grpo_jax.models.kernels.selection import target_platform


def materialize(x: PyTree) -> PyTree:
    """Returns x, which a CPU computes once and writes to memory as it is."""
    return jax.lax.optimization_barrier(x) if target_platform() == 'cpu' else x


def options_of_one_run() -> dict[str, int]:
    """Compiler options of a program that runs once and multiplies no matrices."""
    return {'xla_backend_optimization_level': 1} if target_platform() == 'cpu' else {}


def scale_rows(
    x: Float[Array, '*rows D'], factors: Float[Array, '*rows']
) -> Float[Array, '*rows D']:
    """Multiplies each row x[..., :] by its factor; on CPUs by an einsum, whose gradient is one."""
    if target_platform() == 'cpu':
        return jnp.einsum('...d,...->...d', x, factors, precision='highest')
    return x * factors[..., None]


def uses_custom_matmul(config: ModelConfig) -> bool:
    """Whether `matmul` has a gradient of its own for this config.

    It does on CPUs, unless the config asks for plain attention (`attention='einsum'`): TRPO
    differentiates its gradient once more in forward mode, which a custom gradient does not allow.
    """
    return target_platform() == 'cpu' and config.attention in ('auto', 'recomputed')


def matmul(
    config: ModelConfig, x: Shaped[Array, 'N I'], kernel: Shaped[Array, 'I O']
) -> Shaped[Array, 'N O']:
    """Multiplies two matrices, on CPUs with a custom gradient; see `uses_custom_matmul`."""
    return _transposing_matmul(x, kernel) if uses_custom_matmul(config) else jnp.matmul(x, kernel)


@jax.custom_vjp
def _transposing_matmul(x: Array, kernel: Array) -> Array:
    """Computes x @ kernel; the kernel's gradient first transposes the narrower of its operands."""
    return x @ kernel


def _matmul_forward(x: Array, kernel: Array) -> tuple[Array, tuple[Array, Array]]:
    return x @ kernel, (x, kernel)


def _matmul_backward(residuals: tuple[Array, Array], grad: Array) -> tuple[Array, Array]:
    x, kernel = residuals
    barrier = jax.lax.optimization_barrier  # without it the compiler undoes the transposition
    grad_x = grad @ kernel.T
    if x.shape[-1] > grad.shape[-1]:
        return grad_x, barrier(barrier(grad.T) @ x).T
    return grad_x, barrier(x.T) @ grad


_transposing_matmul.defvjp(_matmul_forward, _matmul_backward)
