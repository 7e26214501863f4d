"""What the parser gets to read."""

import pytest

from grpo_jax.rewards.verify.expression import expression, scientific


@pytest.mark.parametrize(
    ('form', 'expected'),
    [
        ('(1+r)^T', '(1+r)^{(T)}'),
        (r'2\frac{1}{2}', r'(2+\frac{1}{2})'),
        ('2(3)', r'2\cdot (3)'),
        ('(2)(3)', r'(2)\cdot (3)'),
        ('x(y+1)', r'x\cdot (y+1)'),
        (r'\sin x\cdot y', r'\sin(x)\cdot y'),
        ('abc+1', 'abc+1'),
        (r'50%', r'50\%'),
        (r'\coth^2(x+1)', r'(\frac{1}{\tanh(x+1)})^2'),
        (r'\sgn x', r'(\frac{x}{|x|})'),
        (r'\sech\frac{x}{2}', r'(\frac{1}{\cosh(\frac{x}{2})})'),
        ('[x][2y]', r'\lfloor x\rfloor \lfloor 2y\rfloor '),
        ('[x+1]', r'\lfloor x+1\rfloor '),
        ('2[x+1]', '2[x+1]'),  # brackets that group
        ('[xy]^2', '[xy]^2'),
        ('[5]', '[5]'),
        (r'\sqrt[3]{x}', r'\sqrt[3]{x}'),
    ],
)
def test_expression(form, expected):
    assert expression(form) == expected


@pytest.mark.parametrize(
    'form',
    [
        '3red',
        r'\angleABC',
        '3 4',
        '1:2:3',
        '5!!',
        r'\int_0^1x',
        'A→B',
        r'\frac{dy}{dx}',
        "5'",
        'f(x',
    ],
)
def test_opaque_forms(form):
    assert expression(form) is None


def test_functions_and_primes_are_symbols_of_their_own():
    forms = ['f(x)', 'f(y)', 'g(x)', "f'(x)", "f''(x)", 'f^{-1}(x)', 'f(x+1)', 'f', "x'", 'x']
    texts = [expression(form) for form in forms]
    assert len(set(texts)) == len(forms)
    assert expression('2f(x)+1') == f'2{texts[0]}+1'


def test_scientific():
    assert scientific('1.5e-3') == r'(1.5\cdot10^{-3})'
    assert scientific('3E8') == r'(3\cdot10^{8})'
    assert scientific('2e^3') == '2e^3'
    assert scientific('1e3x') == r'(1\cdot10^{3})x'
    assert scientific('2e-3x') == '2e-3x'
