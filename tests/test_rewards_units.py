"""Units: dropped, kept where they are known, kept where they tell values apart."""

import pytest

from grpo_jax.rewards.verify.units import same_unit, split_known_unit, strip_units


@pytest.mark.parametrize(
    ('text', 'expected'),
    [
        (r'5\text{ cm}', r'5\unit{cm}'),
        ('5 centimeters', r'5\unit{cm}'),
        ('5cm', r'5\unit{cm}'),
        (r'5\text{ square inches}', r'5\unit{in^2}'),
        (r'5\mbox{ m}^3', r'5\unit{m^3}'),
        ('60 km/h', r'60\unit{km/h}'),
        ('18€', r'18\unit{euro}'),
        ('€18', r'18\unit{euro}'),
        ('x = -£5', r'x = -5\unit{gbp}'),
        ('＄5', r'5\unit{dollar}'),
        ('25 s', r'25\unit{s}'),
        ('25s', '25s'),
        ('x^2 m', 'x^2 m'),
        ('18 元', r'18\unit{yuan}'),
        (r'18\text{ eggs}', '18'),
        (r'6\text{ km north}', r'6\unit{north}'),
        (r'3\text{ cm}, 4\text{ cm}', r'3,  4\unit{cm}'),
        ('5x', '5x'),
        (r'x\text{-axis}', r'x\text{-axis}'),
        (r'3\mathbf{i}', r'3\mathbf{i}'),
        (r'3\text{ red}, 2\text{ blue}', r'3\text{ red}, 2\text{ blue}'),
        (r'3\text{ hours }20\text{ minutes}', r'3\text{ hours }20\text{ minutes}'),
    ],
)
def test_strip_units(text, expected):
    assert strip_units(text) == expected


def test_split_known_unit():
    assert split_known_unit(r'5\unit{cm}') == ('5', 'cm')
    assert split_known_unit('5') == ('5', '')


def test_same_unit():
    assert same_unit('cm', 'cm')
    assert same_unit('¥', 'yuan')
    assert same_unit('pound', 'gbp')
    assert same_unit('dollar', 'hkd')
    assert not same_unit('yuan', 'yen')
    assert not same_unit('usd', 'hkd')
    assert not same_unit('gbp', 'lb')
