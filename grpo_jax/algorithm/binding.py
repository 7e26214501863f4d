"""Calling a loss or an advantage estimator with the arrays and coefficients that it names.

So your own function needs no registration and no fixed signature: `Algorithm(loss=my_loss)`.
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
    """The function with the arrays and coefficients that its signature names.

    Args:
      function: a loss or an advantage estimator.
      arrays: by name; None for an array that this update does not have.
      coefficients: of `Algorithm`, by name.

    Raises:
      ValueError: it names something else, or an array that this update does not have.
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
                f'{reason}: use some of the arrays {", ".join(arrays)} and the coefficients '
                f'{", ".join(coefficients)}'
            )
    return functools.partial(function, **arguments)
