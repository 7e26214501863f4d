"""Matrix-product FLOPs of a program, counted from its jaxpr.

XLA's own cost analysis counts the body of a loop once, whatever its trip count. Layers,
microbatches and log-prob chunks are all loops here, so it would miss most of the work.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
from jax.extend.core import Jaxpr, JaxprEqn, jaxprs_in_params

_UNCOUNTED = (
    'conv_general_dilated',
    'pallas_call',
    'ragged_dot',
    'ragged_dot_general',
    'dot_product_attention_fwd_wrapper',  # cuDNN's
    'dot_product_attention_bwd_wrapper',
)


def count_flops(fn: Callable[..., Any], *args: Any, while_trips: int = 1, **kwargs: Any) -> int:
    """Floating-point operations of all matrix products in one call of `fn`, which is only traced.

    A product of [m, k] and [k, n] is 2 m k n. The body of a scan counts `length` times, that of a
    while loop `while_trips` times, a cond as its most expensive branch, the body of a shard_map
    once for each device. Norms, softmax, sorting, the optimizer and products of rows that match one
    to one are not counted. Recomputation in the backward pass counts again: the result is the work
    of the hardware, not of the model.

    Args:
      fn: a function, or what `jax.jit` made of one.
      *args: arguments of fn; for arrays `jax.ShapeDtypeStruct` is enough.
      while_trips: trips of each while loop, which a jaxpr does not tell; a `sample` that fills all
        its columns makes T - 1.
      **kwargs: keyword arguments of fn.

    Returns:
      The count, over all devices together.

    Raises:
      ValueError: the program holds an operation whose work is of another kind, such as a kernel.
    """
    jitted: Any = fn if hasattr(fn, 'trace') else jax.jit(fn)
    return _count(jitted.trace(*args, **kwargs).jaxpr.jaxpr, while_trips)


def _count(jaxpr: Jaxpr, while_trips: int) -> int:
    return sum(_count_equation(equation, while_trips) for equation in jaxpr.eqns)


def _count_equation(equation: JaxprEqn, while_trips: int) -> int:
    name, params = equation.primitive.name, equation.params
    if name == 'dot_general':
        lhs, out = _shape(equation.invars[0]), _shape(equation.outvars[0])
        (contracted, _), (batch, _) = params['dimension_numbers']
        if not contracted or len(out) == len(batch):  # numbers times rows, or rows times rows
            return 0
        return 2 * math.prod(lhs[axis] for axis in contracted) * math.prod(out)
    if name in _UNCOUNTED:
        raise ValueError(f'the program holds {name}, whose work is not counted: leave it out')
    bodies = [_count(body, while_trips) for body in jaxprs_in_params(params)]
    if name == 'cond':
        return max(bodies)
    if name == 'scan':
        return params['length'] * sum(bodies)
    if name == 'while':
        return while_trips * sum(bodies)
    if name == 'shard_map':
        devices = math.prod(params['mesh'].shape[axis] for axis in params['newly_manual_axes'])
        return devices * sum(bodies)
    return sum(bodies)


def _shape(variable: Any) -> tuple[int, ...]:
    return variable.aval.shape
