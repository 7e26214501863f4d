"""Decimal commas: where only they can be meant."""

import pytest

from grpo_jax.rewards.verify.decimal_commas import (
    commas_in_braces_to_points,
    decimal_commas_to_points,
)


@pytest.mark.parametrize(
    ('text', 'expected'),
    [
        ('25,00 €', '25.00 €'),
        ('€ 12,50', '€ 12.50'),
        ('1.000,50 €', '1000.50 €'),
        ('-25,05', '-25.05'),
        ('1.234.567,8', '1234567.8'),
        ('(0,5;2)', '(0.5;2)'),
        ('(-0,5; 1,25)', '(-0.5; 1.25)'),
        ('(0,125;2)', '(0.125;2)'),
        ('[0,5;2]', '[0.5;2]'),
        (']0,5;1,5[', ']0.5;1.5['),
        (r'\{0,5;1,5\}', r'\{0.5;1.5\}'),
        ('A=(0,5;2)', 'A=(0.5;2)'),
    ],
)
def test_decimals(text, expected):
    assert decimal_commas_to_points(text) == expected


@pytest.mark.parametrize(
    'text',
    [
        '1,000',
        '0,5',  # or the list of 0 and 5
        '3,14',
        '1,0',
        '25,000 €',
        '25,5 €',
        r'\$25,50',
        '1.000,50',
        '(1,000;2)',
        '(1,2,3;4)',
        '(1, 2; 3)',
        '[1,2;3,4]',  # or a matrix
        'f(1,2;3)',
        'x=1,y=2;x=3,y=4',
        '1,2;3,4',
        '(0.5;2)',
    ],
)
def test_other_commas_are_left(text):
    assert decimal_commas_to_points(text) == text


@pytest.mark.parametrize(
    ('text', 'expected'),
    [
        ('0{,}5', '0.5'),
        ('3{,}1416', '3.1416'),
        ('0{,}125', '0.125'),
        ('1{,}000', '1{,}000'),
        ('12{,}345{,}678', '12{,}345{,}678'),
        ('10{,}236', '10{,}236'),
        ('x=1{,}5y', 'x=1.5y'),
    ],
)
def test_commas_in_braces(text, expected):
    assert commas_in_braces_to_points(text) == expected
