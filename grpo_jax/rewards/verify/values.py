"""Comparison of SymPy expressions by their values: exact, or to many digits.

The worker process runs this file on its own, so it imports nothing of this package.
"""

import math
import re
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import sympy

_MAX_BITS = 2_000_000  # of numerators and denominators that are computed exactly
_DIGITS = 60  # to which irrational values that differ are told apart, after their leading digits
_MAX_MAGNITUDE = 3000  # decimal digits before or after the point of values that are compared
_MIN_POINTS = 2  # points at which both expressions must have a value
_ENOUGH_POINTS = 5
_SIGNS = (  # of the variables at each point, in turn; whole numbers at points with even factors
    (1,), (-1,), (1, -1), (-1, 1), (1, 1, -1), (1,), (-1, -1, 1), (1,),
)  # fmt: skip
_SIZES = ('5/7', '9/11', '23/13', '8/17', '31/19', '3/23', '41/5', '211/3')
_STEPS = (sympy.floor, sympy.ceiling)  # which jump at whole numbers
POINTS = len(_SIGNS)  # at which expressions with variables are compared
_DECIMAL = re.compile(r'-?[0-9]*\.([0-9]+)')


def same_values(x: Any, y: Any) -> bool:
    """Return whether two expressions are equal at several points where both are defined.

    Exact where the values are rational, otherwise to 60 digits after the leading ones. Except for
    contrived expressions, those that agree at two points or more are equal. This is faster than
    simplification, and its time is bounded. Variables are real, so that a logarithm or an even root
    of a negative number is not defined; where that leaves too few points, complex values count.
    """
    names = sorted({s.name for s in x.free_symbols | y.free_symbols})
    whole = _has_counts(x) or _has_counts(y)
    points = [sample_point(names, k, whole) for k in range(POINTS if names else 1)]
    if names and (x.has(*_STEPS) or y.has(*_STEPS)):
        points[:0] = [sample_point(names, k, True) for k in range(2)]
    for real in (False,) if x.has(sympy.I) or y.has(sympy.I) else (True, False):
        agreed = 0
        for point in points:
            same_here = _same_at(x, y, point, real)
            if same_here is False:
                return False
            agreed += same_here is True
            if agreed == _ENOUGH_POINTS:
                return True
        if agreed >= min(_MIN_POINTS, len(points)):
            return True
    return False


def _same_at(x: Any, y: Any, point: dict[str, Any], real: bool) -> bool | None:
    """Compare at a point; None if one of the two has no value there."""
    try:
        return same_numbers(substitute(x, point, real), substitute(y, point, real), real)
    except (ArithmeticError, ValueError):
        return None


def same_numbers(x: Any, y: Any, real: bool = False) -> bool:
    """Compare two expressions without variables.

    Raises:
        ArithmeticError: one has no finite value, or none that is real if `real`.
    """
    p, q = _rational(x), _rational(y)
    if p is not None and q is not None:
        return p == q
    digits = max(_digits(x, real), _digits(y, real))
    difference = (x - y).evalf(2, maxn=digits + _DIGITS)
    # SymPy gives a value of which no digit is certain a precision of one bit. The error of the
    # other part can be as large.
    parts = difference.as_real_imag()
    error = max((abs(part) for part in parts if part.is_Float and part._prec == 1), default=0)
    return all(
        part.is_zero or (part.is_Float and (part._prec == 1 or abs(part) <= error))
        for part in parts
    )


def _digits(x: Any, real: bool) -> int:
    """Return the number of leading digits that `x` has before or after the point."""
    value = x.evalf(5)
    parts = value.as_real_imag()
    if not all(part.is_Float or part.is_Rational for part in parts) or not value.is_finite:
        raise ArithmeticError('no finite value')
    if real and parts[1].is_Float and parts[1]._prec > 1:
        raise ArithmeticError('not real')
    largest = max(abs(part) for part in parts)
    size = abs(sympy.Float(largest)._mpf_[2] + sympy.Float(largest)._mpf_[3]) if largest else 0
    if size > _MAX_MAGNITUDE / math.log10(2):
        raise ArithmeticError('too large or too small to compare')
    return math.ceil(size * math.log10(2))


def _rational(x: Any) -> Fraction | None:
    """Return the exact value of an expression without variables; None if it may be irrational.

    Raises:
        ArithmeticError: it is a quotient by zero, or too large.
    """
    if x.is_Rational:
        return Fraction(int(x.p), int(x.q))
    if not x.args:
        return None
    operation = _OPERATIONS.get(x.func)
    values = [_rational(argument) for argument in x.args] if operation else [None]
    known = [value for value in values if value is not None]
    return operation(*known) if operation and len(known) == len(values) else None


def _power(base: Fraction, exponent: Fraction) -> Fraction | None:
    if exponent.denominator > 1:
        return None
    bits = max(base.numerator.bit_length(), base.denominator.bit_length())
    if base not in (0, 1, -1) and bits * abs(exponent) > _MAX_BITS:
        return None
    return base**exponent.numerator


def _factorial(n: Fraction) -> Fraction | None:
    if n.denominator > 1 or not 0 <= n <= _MAX_FACTORIAL:
        return None
    return Fraction(math.factorial(n.numerator))


def _binomial(n: Fraction, k: Fraction) -> Fraction | None:
    if n.denominator > 1 or k.denominator > 1 or not 0 <= k <= n <= _MAX_FACTORIAL:
        return None
    return Fraction(math.comb(n.numerator, k.numerator))


_MAX_FACTORIAL = 20_000
_OPERATIONS: dict[Any, Callable[..., Fraction | None]] = {
    sympy.Add: lambda *values: sum(values, Fraction()),
    sympy.Mul: lambda *values: math.prod(values, start=Fraction(1)),
    sympy.Pow: _power,
    sympy.UnevaluatedExpr: lambda value: value,
    sympy.Abs: abs,
    sympy.floor: lambda value: Fraction(math.floor(value)),
    sympy.ceiling: lambda value: Fraction(math.ceil(value)),
    sympy.Max: lambda *values: max(values),
    sympy.Min: lambda *values: min(values),
    sympy.factorial: _factorial,
    sympy.binomial: _binomial,
}


def substitute(x: Any, point: dict[str, Any], real: bool = False) -> Any:
    """Replace the variables by numbers, odd roots of negative numbers by the real ones if `real`.

    Sums and products are evaluated.

    Raises:
        ArithmeticError: an even root of a negative number, or a logarithm of one or of zero, if
            `real`.
    """
    if not real or x.has(sympy.Sum, sympy.Product):
        value = x.xreplace({s: point[s.name] for s in x.free_symbols})
        return value.doit() if value.has(sympy.Sum, sympy.Product) and point else value
    if x.is_Symbol:
        return point[x.name]
    if not x.args:
        return x
    return _real_operation(x, [substitute(argument, point, True) for argument in x.args])


def _real_operation(x: Any, arguments: list[Any]) -> Any:
    """Apply the operation of `x` to other arguments; see `substitute`."""
    if x.func == sympy.log and not arguments[0].evalf(15).is_positive:
        raise ArithmeticError('logarithm of a number that is not positive')
    if x.is_Pow and not arguments[1].is_Integer and arguments[0].evalf(15).is_negative:
        exponent = _rational(arguments[1])
        if exponent is not None and exponent.denominator % 2 == 0:
            raise ArithmeticError('even root of a negative number')
        if exponent is not None and exponent.denominator > 1 and not x.exp.free_symbols:
            return (-1) ** exponent.numerator * sympy.Pow(-arguments[0], arguments[1])
    return x.func(*arguments)


def sample_point(names: list[str], k: int, whole: bool) -> dict[str, Any]:
    """Return the values of the variables at point k: different for each, of both signs."""
    signs = _SIGNS[k]
    if whole:
        return {name: sympy.Integer(2 + k + (3 * k + 5) * j % 7) for j, name in enumerate(names)}
    size = sympy.Rational(_SIZES[k])
    return {
        name: signs[j % len(signs)] * size * sympy.Rational(7 + 5 * (j * (k + 2) % 11), 7 + j)
        for j, name in enumerate(names)
    }


def _has_counts(x: Any) -> bool:
    """Return whether the variables of `x` are counts."""
    return bool(x.has(sympy.Sum, sympy.Product, sympy.factorial, sympy.binomial))


def is_rounded(decimal: Any, value: Any, text: str) -> bool:
    """Return whether the decimal `text` is `value` rounded or truncated.

    The tolerance is that of `numbers.same_number`.
    """
    match = _DECIMAL.fullmatch(text)
    if not match or value.free_symbols or _rational(value) is not None:
        return False
    value = value.evalf(40)
    if not value.is_Float:
        return False
    error = abs(decimal - value)
    return bool(error * 10 ** len(match[1]) < 1 and error * 1000 <= max(abs(decimal), abs(value)))
