"""Passing a loss or advantage estimator the arrays and coefficients that its signature names.

So a function of your own needs no registration and no fixed signature: `Algorithm(loss=my_loss)`.
"""

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any


def names_of(function: Callable[..., Any]) -> frozenset[str]:
    """The names of a function's parameters."""
    return frozenset(inspect.signature(function).parameters)


def bind(
    function: Callable[..., Any], arrays: Mapping[str, Any], coefficients: Mapping[str, Any]
) -> Callable[[], Any]:
    """Binds the arrays and coefficients that a function's signature names.

    Args:
      function: a loss or an advantage estimator.
      arrays: by name; None for an array that is absent from this update.
      coefficients: of `Algorithm`, by name.

    Returns:
      The function of no arguments that calls `function` with them.

    Raises:
      ValueError: a parameter without default is neither, or is an array that is absent.
    """
    arguments = {}
    for name, parameter in inspect.signature(function).parameters.items():
        if arrays.get(name) is not None:
            arguments[name] = arrays[name]
        elif name in coefficients:
            arguments[name] = coefficients[name]
        elif parameter.default is parameter.empty:
            reason = 'is absent from this update' if name in arrays else 'is unknown'
            raise ValueError(
                f'{getattr(function, "__name__", function)!r} has a parameter {name!r}, which '
                f'{reason}: choose from the arrays {", ".join(arrays)} and the coefficients '
                f'{", ".join(coefficients)}'
            )
    return functools.partial(function, **arguments)
