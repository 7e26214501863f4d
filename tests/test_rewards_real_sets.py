"""Descriptions of sets of real numbers."""

import pytest

from grpo_jax.rewards.verify.normal_form import normal_form
from grpo_jax.rewards.verify.real_sets import is_real_set, read_set

REALS = ['interval', r'-\infty', r'\infty', True, True]


@pytest.mark.parametrize(
    ('text', 'variable', 'description'),
    [
        ('x>=5', 'x', ['interval', '5', r'\infty', False, True]),
        ('5 < x', 'x', ['interval', '5', r'\infty', True, True]),
        (r'1<x\leqslant 2', 'x', ['interval', '1', '2', True, False]),
        (r'2\ge x>1', 'x', ['interval', '1', '2', True, False]),
        (r'x\in[0,1)', 'x', ['interval', '0', '1', False, True]),
        (r'\{x \mid x<3\}', '', ['interval', r'-\infty', '3', True, True]),
        (r'\{x\in\mathbb{R} : x<3\}', '', ['interval', r'-\infty', '3', True, True]),
        (r'\mathbb R', '', REALS),
        (r'x\ne3', 'x', ['minus', REALS, ['points', ['3']]]),
        (r'\mathbb{R}\setminus\{1,2\}', '', ['minus', REALS, ['points', ['1', '2']]]),
        (r'\emptyset', '', ['points', []]),
        ('2x+1>5', '', ['relation', '2x+1>5']),
        (r'\{x|x^2=4\}', '', ['relation', 'x^2=4']),
        (r'\{x\in\mathbb R | x^2=4\}', '', ['relation', 'x^2=4']),
        (
            r'\{x\in\mathbb{Z} : 1\le x\le 3\}',
            '',
            ['intersection', [['integers', r'-\infty'], ['interval', '1', '3', False, False]]],
        ),
        (
            r'\{x | x<3, x\in\mathbb{N}^{*}\}',
            '',
            ['intersection', [['integers', '1'], ['interval', r'-\infty', '3', True, True]]],
        ),
        (
            'x<1 or x>2',
            'x',
            [
                'union',
                [
                    ['interval', r'-\infty', '1', True, True],
                    ['interval', '2', r'\infty', True, True],
                ],
            ],
        ),
    ],
)
def test_read_set(text, variable, description):
    form = normal_form(text)
    assert is_real_set(form) or form.startswith(('[', '(', r'\{', r'x\in'))
    assert read_set(form) == (variable, description)


@pytest.mark.parametrize(
    'text',
    [
        '5',
        'x=5',
        '(1,2,3)',
        r'x<1\lory<2',
        r'\lor' * 100,
        r'\{z|z^2=-1\}',
        r'\{x|x=a\}',
        r'\{x\in\mathbb{Q}|x>1\}',
    ],
)
def test_read_set_refuses(text):
    assert read_set(text) is None


def test_points_and_finite_sets_are_not_only_sets_of_numbers():
    assert not is_real_set('(1,2)')
    assert not is_real_set(r'\{1,2\}')
