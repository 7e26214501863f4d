"""Comparison of SymPy expressions by their values, without parser and workers."""

import pytest

sympy = pytest.importorskip('sympy')

from grpo_jax.rewards.verify.values import is_rounded, same_numbers, same_values  # noqa: E402

a, b, n, x = sympy.symbols('a b n x')
EQUAL = [
    ((x + 1) ** 2, x**2 + 2 * x + 1),
    (sympy.sqrt(a * b), sympy.sqrt(a) * sympy.sqrt(b)),
    (sympy.log(a * b), sympy.log(a) + sympy.log(b)),
    (sympy.sqrt(2) + sympy.sqrt(3), sympy.sqrt(5 + 2 * sympy.sqrt(6))),
    (sympy.Pow(-8, sympy.Rational(1, 3), evaluate=False), sympy.Integer(-2)),
    (sympy.sqrt(x - 100) * 2, sympy.sqrt(4 * x - 400)),
    (sympy.factorial(n), n * sympy.factorial(n - 1)),
    (sympy.exp(sympy.I * sympy.pi), sympy.Integer(-1)),
    ((-1) ** (n + 1), -((-1) ** n)),
    # The imaginary part of the difference is smaller than the error.
    (sympy.Pow(a, sympy.log(x, a, evaluate=False), evaluate=False), x),
]
UNEQUAL = [
    (sympy.Integer(2) ** 100, sympy.Integer(2) ** 100 - 1),
    (1 / sympy.factorial(2004), sympy.Integer(0)),
    (x**100 - 1, x**100 + 1),
    (sympy.pi * 2**1000 + 1, sympy.pi * 2**1000),
    (sympy.exp(1000 * x) + 1, sympy.exp(1000 * x)),
    (sympy.exp(-10000), sympy.Integer(0)),
    (sympy.sqrt(x**2), x),
    (sympy.Abs(a + b), sympy.Abs(a) + sympy.Abs(b)),
    (sympy.floor(x), sympy.ceiling(x) - 1),
    (x + sympy.Rational(1, 10**30), x),
    (sympy.oo, -sympy.oo),
]


@pytest.mark.parametrize(('p', 'q'), EQUAL)
def test_equal(p, q):
    assert same_values(p, q)
    assert same_values(q, p)


@pytest.mark.parametrize(('p', 'q'), UNEQUAL)
def test_unequal(p, q):
    assert not same_values(p, q)
    assert not same_values(q, p)


def test_values_that_cannot_be_told_apart_are_not_equal():
    huge = sympy.exp(10**10)
    with pytest.raises(ArithmeticError, match='too large'):
        same_numbers(huge + 1, huge)
    assert not same_values(huge + 1, huge)


def test_is_rounded():
    assert is_rounded(sympy.Rational(1414, 1000), sympy.sqrt(2), '1.414')
    assert not is_rounded(sympy.Rational(141, 100), sympy.sqrt(2), '1.41')  # off by a 350th
    assert not is_rounded(sympy.Rational(1414, 1000), sympy.Rational(14142, 10000), '1.414')
