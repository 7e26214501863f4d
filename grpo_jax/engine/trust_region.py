"""Trust region policy optimization: natural gradient, hard bound on the mean KL, line search.

Schulman et al., arXiv 1502.05477, appendix C. All are pure functions of parameter trees and of
the caller's functions, which may loop over microbatches with `lax.scan`, so they can run inside one
jitted update on any mesh.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from grpo_jax.types import Params, Scalar

ScalarFunction = Callable[[Params], jax.Array]  # from parameters to f32[]
Product = Callable[[Params], Params]  # a symmetric matrix times a tree of parameter shapes


def fisher_vector_product(
    kl_of: ScalarFunction, params: Params, vector: Params, damping: Scalar = 0.0
) -> Params:
    """(F + damping I) v, where F is the Hessian of `kl_of` at `params`, by forward over reverse.

    At p = params the Hessian of KL(pi_params || pi_p) with respect to p is the Fisher information
    matrix of the policy (arXiv 1502.05477, appendix C.1; Pascanu and Bengio, arXiv 1301.3584,
    section 3). The matrix is never formed: the product is the derivative of the gradient along v
    (Pearlmutter, 1994).

    Args:
      kl_of: p -> f32[], the mean of KL(pi_params || pi_p). If it loops over microbatches, `scan`
        a `jax.checkpoint`ed body, so that one microbatch's activations exist at a time.
      params: where the Hessian is taken, and the first policy of the KL.
      vector: tree like params; rounded to their dtypes for the derivative.
      damping: f32[], added to the diagonal.

    Returns:
      A tree like vector.
    """
    tangent = jax.tree.map(lambda v, p: v.astype(p.dtype), vector, params)
    _, product = jax.jvp(jax.grad(kl_of), (params,), (tangent,))
    return jax.tree.map(lambda f, v: f + damping * v, product, vector)


# x, the residual, the search direction, and the residual's squared norm f32[].
_Iterate = tuple[Params, Params, Params, jax.Array]


def conjugate_gradient(matvec: Product, b: Params, steps: int) -> tuple[Params, Params]:
    """Solves A x = b for a symmetric positive definite A in a fixed number of products.

    Hestenes and Stiefel (1952), from x = 0; arXiv 1502.05477, appendix C, takes 10 steps. x
    stops changing once the residual is at the level of rounding, or if the curvature along the
    direction is not positive. If b is zero or not finite, x is 0.

    Args:
      matvec: v -> A v.
      b: tree of arrays.
      steps: products with A.

    Returns:
      x, and the residual b - A x from the recursion; trees like b.
    """
    square = _dot(b, b)
    rounding = jnp.square(jnp.finfo(square.dtype).eps) * square

    def step(carry: _Iterate, _: None) -> tuple[_Iterate, None]:
        x, residual, direction, square = carry
        product = matvec(direction)
        curvature = _dot(direction, product)
        alpha = square / curvature
        new_residual = _add(residual, -alpha, product)
        new_square = _dot(new_residual, new_residual)
        new_direction = _add(new_residual, new_square / square, direction)
        moved = (_add(x, alpha, direction), new_residual, new_direction, new_square)
        active = (square > rounding) & (curvature > 0)
        return jax.tree.map(lambda new, old: jnp.where(active, new, old), moved, carry), None

    start = (jax.tree.map(jnp.zeros_like, b), b, b, square)
    (x, residual, _, _), _ = jax.lax.scan(step, start, length=steps)
    return x, residual


_Attempt = tuple[jax.Array, jax.Array, jax.Array]  # j, whether the step is accepted, its KL


def natural_step(
    params: Params,
    gradient: Params,
    *,
    surrogate_of: ScalarFunction,
    kl_of: ScalarFunction,
    fisher: Product,
    max_kl: Scalar,
    cg_steps: int,
    backtracks: int,
) -> tuple[Params, dict[str, jax.Array]]:
    """One TRPO step: natural gradient, and a line search that keeps the mean KL within its bound.

    With x = F^-1 g by conjugate gradient, the full step is -sqrt(2 max_kl / x^T F x) x, at which
    the quadratic model of the KL equals max_kl. The line search tries 0.5^j of it for j = 0, 1,
    ..., backtracks - 1, and takes the first step that lowers the surrogate loss and has a mean KL
    of at most max_kl. The parameters stay as they are if there is none, or if g is zero or not
    finite (arXiv 1502.05477, appendix C).

    Args:
      params: the policy before the step.
      gradient: g, of the surrogate loss at params.
      surrogate_of: p -> f32[], the loss that the step lowers.
      kl_of: p -> f32[], the mean KL(pi_params || pi_p) in nats.
      fisher: v -> F v, such as `fisher_vector_product` with damping; v is float32 or wider even if
        the parameters are not.
      max_kl: f32[], positive.
      cg_steps: products with F, at least 1.
      backtracks: step sizes to try, at least 1.

    Returns:
      The new parameters, and scalars f32[]: 'kl_step', the mean KL of the step (0 without one);
      'backtracks', the number of rejected step sizes; 'accepted', 1 or 0; 'fisher_residual',
      |F x - g| / |g| (0 if g is zero or not finite).
    """
    # At least float32: bfloat16 is too coarse for the cancellation in conjugate gradient.
    gradient = jax.tree.map(lambda g: g.astype(jnp.promote_types(g.dtype, jnp.float32)), gradient)
    x, residual = conjugate_gradient(fisher, gradient, cg_steps)
    curvature = _dot(x, gradient)  # x^T F x: the residual g - F x is orthogonal to x
    usable = curvature > 0  # not where g is zero or not finite: x is 0 there
    full = jnp.sqrt(2 * max_kl / curvature)

    def candidate_at(j: jax.Array) -> Params:
        moved = _add(params, -full * 0.5**j, x)
        return jax.tree.map(lambda new, old: new.astype(old.dtype), moved, params)

    def attempt(carry: _Attempt) -> _Attempt:
        j, _, _ = carry
        candidate = candidate_at(j)
        kl = kl_of(candidate)
        accepted = jax.lax.cond(
            kl <= max_kl, lambda p: surrogate_of(p) < before, lambda p: False, candidate
        )
        return jnp.where(accepted, j, j + 1), accepted, kl

    error = jnp.sqrt(_dot(residual, residual) / _dot(gradient, gradient))
    before = surrogate_of(params)
    j, accepted, kl = jax.lax.while_loop(
        lambda carry: usable & ~carry[1] & (carry[0] < backtracks),
        attempt,
        (jnp.int32(0), jnp.bool_(False), jnp.zeros_like(before)),
    )
    params = jax.tree.map(lambda new, old: jnp.where(accepted, new, old), candidate_at(j), params)
    return params, {
        'kl_step': jnp.where(accepted, kl, 0.0),
        'backtracks': j.astype(jnp.float32),
        'accepted': accepted.astype(jnp.float32),
        'fisher_residual': jnp.where(usable, error, 0.0),
    }


def _dot(a: Params, b: Params) -> jax.Array:
    """Sum of products; not `jnp.vdot`, whose flat view would gather sharded leaves."""
    products = jax.tree.map(lambda x, y: jnp.sum(x * y), a, b)
    return jax.tree.reduce(jnp.add, products)


def _add(a: Params, scale: jax.Array, b: Params) -> Params:
    """A tree a + scale * b."""
    return jax.tree.map(lambda x, y: x + scale * y, a, b)
