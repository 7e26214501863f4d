"""Exact arithmetic as a tool, of bounded size."""

import ast
import math
import operator
from collections.abc import Callable
from fractions import Fraction

_LONGEST = 1000  # characters of an expression
_LARGEST = 10**100  # absolute values
_FINEST = 10**100  # denominators

_BINARY: dict[type[ast.operator], Callable[[Fraction, Fraction], Fraction | int]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
}


def calculator(expression: str) -> str:
    """Compute an expression of numbers, + - * / // % ** and parentheses.

    Args:
        expression: What to compute, such as (12.5 + 3) * 4.

    Returns:
        The result: a whole number, or a decimal one with 15 digits where it is none.
    """
    if len(expression) > _LONGEST:
        return f'error: more than {_LONGEST} characters'
    source = expression.strip().removesuffix('=').replace('^', '**').replace('×', '*')
    try:
        value = _value(ast.parse(source.replace('÷', '/').strip(), mode='eval').body)
    except ZeroDivisionError:
        return 'error: division by zero'
    except OverflowError:
        return 'error: the numbers are too large'
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return 'error: not an expression of numbers, + - * / // % ** and parentheses'
    return str(value.numerator) if value.denominator == 1 else f'{float(value):.15g}'


def _value(node: ast.expr) -> Fraction:
    match node:
        case ast.Constant(value=int() | float() as number) if not isinstance(number, bool):
            return _bounded(
                Fraction(str(number)) if math.isfinite(number) else Fraction(_LARGEST + 1)
            )
        case ast.UnaryOp(op=ast.USub(), operand=operand):
            return -_value(operand)
        case ast.UnaryOp(op=ast.UAdd(), operand=operand):
            return _value(operand)
        case ast.BinOp(left=left, op=ast.Pow(), right=right):
            return _power(_value(left), _value(right))
        case ast.BinOp(left=left, op=op, right=right) if type(op) in _BINARY:
            return _bounded(Fraction(_BINARY[type(op)](_value(left), _value(right))))
    raise ValueError('not arithmetic')


def _power(base: Fraction, exponent: Fraction) -> Fraction:
    """Return a power; its size is bounded before it is computed."""
    if exponent.denominator != 1:
        if base < 0:
            raise ValueError('no real number')
        return _bounded(Fraction(repr(float(base) ** float(exponent))))
    if abs(base) in (0, 1) and exponent > 1:
        return base ** int(2 - exponent % 2)  # which has the same sign
    bits = max(abs(base.numerator), base.denominator).bit_length()
    if (bits - 1) * abs(exponent) > math.log2(_LARGEST):
        raise OverflowError
    return _bounded(base ** int(exponent))


def _bounded(value: Fraction) -> Fraction:
    if abs(value) > _LARGEST or value.denominator > _FINEST:
        raise OverflowError
    return value
