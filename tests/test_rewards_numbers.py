"""Numbers in text: one canonical spelling, and when two written numbers are the same answer."""

from decimal import Decimal
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from grpo_jax.rewards import normalize_number
from grpo_jax.rewards.verify.numbers import parse_number, same_number


@pytest.mark.parametrize(
    ('text', 'expected'),
    [
        ('18', '18'),
        (' 1,000 ', '1000'),
        ('1,234,567.50', '1234567.5'),
        ('$1,000.50.', '1000.5'),
        ('-$5', '-5'),
        ('$-5', '-5'),
        ('\\$5', '5'),
        ('$18$', '18'),
        ('50%', '50'),
        ('50\\%.', '50'),
        ('+7', '7'),
        ('−7', '-7'),
        ('007', '7'),
        ('-0.0', '0'),
        ('.5', '0.5'),
        ('0.125', '0.125'),
        ('1/2', '0.5'),
        ('-3/8', '-0.375'),
        ('6/3', '2'),
        ('2/6', '1/3'),
        ('1.5/4', '0.375'),
        ('\\frac{1}{2}', '0.5'),
        ('-\\dfrac{2}{6}', '-1/3'),
        ('\\tfrac{1}{4}', '0.25'),
        ('2\\frac{1}{2}', None),
        ('10{,}000', '10000'),
        ('1,\\!000', '1000'),
        ('1,2', None),
        ('1,0001', None),
        ('1000,000', None),
        ('1/0', None),
        ('1.2.3', None),
        ('1 2', None),
        ('18 eggs', None),
        ('٣', None),
        ('.', None),
        ('', None),
        ('1' * 101, None),
    ],
)
def test_normalize_number(text, expected):
    assert normalize_number(text) == expected


@given(st.decimals(-(10**12), 10**12, places=4), st.sampled_from(['{:,}', '{}', '{:,}.', '{}%']))
def test_spellings_of_a_decimal_agree(value, spelling):
    canonical = normalize_number(spelling.format(value))
    assert Decimal(canonical) == value
    assert canonical == normalize_number(canonical)
    assert not ('.' in canonical and canonical.endswith('0'))


@given(st.integers(-999, 999), st.integers(1, 999), st.integers(1, 99))
def test_equal_fractions_have_one_spelling(p, q, factor):
    canonical = normalize_number(f'{p}/{q}')
    assert Fraction(canonical) == Fraction(p, q)
    assert canonical == normalize_number(f'{p * factor}/{q * factor}')


@pytest.mark.parametrize(
    ('text', 'value', 'places', 'percent'),
    [
        ('1,234.50', '1234.5', 2, False),
        ('-7', '-7', 0, False),
        ('.5', '0.5', 1, False),
        ('1/3', '1/3', None, False),
        ('50\\%', '50', 0, True),
        ('12.5%', '12.5', 1, True),
        ('\\frac{-1}{2}', '-1/2', None, False),
        ('-\\dfrac{1}{-2}', '1/2', None, False),
        ('2\\frac{1}{2}', '5/2', None, False),
        ('-2 \\frac{1}{2}', '-5/2', None, False),
        ('2 1/2', '5/2', None, False),
        ('$3.', '3', 0, False),
        ('1.5e-3', '0.0015', 4, False),
        ('3e8', '300000000', 0, False),
        (r'1.50\times10^{3}', '1500', 0, False),
        (r'1.5\cdot10^{-1}', '0.15', 2, False),
        ('2^{10}', '1024', 0, False),
        ('3 / 4', '3/4', None, False),
        ('3/4.5', '2/3', None, False),
        ('3:4', '3/4', None, False),
        (r'70\,000', '70000', 0, False),
        ('1 234.5', '1234.5', 1, False),
        ("1'000", '1000', 0, False),
        ('２½', '5/2', None, False),
        ('-½', '-1/2', None, False),
        (r'\cfrac34', '3/4', None, False),
        (r'\mathbf{18}', '18', 0, False),
        ('€5', '5', 0, False),
    ],
)
def test_parse_number(text, value, places, percent):
    assert parse_number(text) == (Fraction(value), places, percent)


@pytest.mark.parametrize(
    'text',
    [
        '',
        '1,0001',
        '1/0',
        '\\frac{1}{0}',
        '18 eggs',
        '2 3',
        'x',
        '%',
        '1' * 500,
        '1.2.3',
        '3:40',
        '1/2/3',
        '12 34',
        '1,000,00',
        '2.5 1/2',
        '9^{999}',
        '1e999',
        '0^{-1}',
        '3:0',
        '1-2',
    ],
)
def test_parse_number_rejects_other_text(text):
    assert parse_number(text) is None


SAME = [
    ('116', '116.0'),
    ('1,000', '1000'),
    ('0.5', '1/2'),
    ('2\\frac{1}{2}', '2.5'),
    ('3.14', '3.14159'),  # rounded
    ('0.333', '1/3'),  # exactly 1e-3 off
    ('0.666', '2/3'),  # truncated
    ('0.667', '2/3'),
    ('50%', '50'),  # the sign left out
    ('50%', '0.5'),
    ('12.5%', '0.125'),
    ('33.3%', '1/3'),
]
DIFFERENT = [
    ('116', '116.01'),  # a whole number is exact
    ('116', '115.9999'),
    ('0.33', '1/3'),  # off by more than 1e-3
    ('105.25', '105.26'),  # as many places, other digits
    ('3.14', '3.15'),
    ('1/3', '333/1000'),  # fractions are exact
    ('2.5', '2.504'),  # rounded to one place, but off by more than 1e-3
    ('105.50', '105.54'),
    ('5', '500'),  # no percent sign, no factor of 100
    ('50%', '5%'),
    ('50%', '5000'),
    ('7', '-7'),
    ('0', '0.0001'),
]


@pytest.mark.parametrize(('a', 'b'), SAME)
def test_same_numbers(a, b):
    assert same_number(parse_number(a), parse_number(b))
    assert same_number(parse_number(b), parse_number(a))


@pytest.mark.parametrize(('a', 'b'), DIFFERENT)
def test_different_numbers(a, b):
    assert not same_number(parse_number(a), parse_number(b))
    assert not same_number(parse_number(b), parse_number(a))


@given(st.decimals(-(10**6), 10**6, places=6), st.integers(0, 5))
def test_a_rounded_decimal_is_the_same_up_to_a_thousandth(value, places):
    rounded = round(value, places)
    exact, short = parse_number(f'{value:f}'), parse_number(f'{rounded:f}')
    whole = value == int(value) or rounded == int(rounded)
    near = abs(value - rounded) * 1000 <= max(abs(value), abs(rounded))
    assert same_number(exact, short) == (value == rounded or (near and not whole))
