"""Determinants in normal forms."""

import itertools

import numpy as np
import pytest

from grpo_jax.rewards.verify.determinants import expand_determinants


def matrix(rows, begin=r'\begin{vmatrix}', end=r'\end{vmatrix}'):
    return begin + r'\\'.join('&'.join(map(str, row)) for row in rows) + end


@pytest.mark.parametrize(
    ('form', 'expected'),
    [
        (r'\begin{vmatrix}a&b\\c&d\end{vmatrix}', r'((a)\cdot(d)-(b)\cdot(c))'),
        (r'2\det\begin{pmatrix}0&x\\y&0\end{pmatrix}+1', r'2(-(x)\cdot(y))+1'),
        (r'\det(\begin{array}{cc}1&2\\0&3\end{array})', r'((1)\cdot(3)-(2)\cdot(0))'),
        (r'|\begin{matrix}1&0\\5&3\end{matrix}|', r'((1)\cdot(3))'),
        (r'\begin{vmatrix}0&0\\1&2\end{vmatrix}', '(0)'),
    ],
)
def test_expansion(form, expected):
    assert expand_determinants(form) == expected


@pytest.mark.parametrize(
    'form',
    [
        r'\begin{vmatrix}1\\2\end{vmatrix}',  # not square
        r'\begin{vmatrix}1&2\\3&\end{vmatrix}',
        r'\begin{pmatrix}1&2\\3&4\end{pmatrix}',
        r'|\begin{pmatrix}1\\2\end{pmatrix}|',  # the length of a vector
        matrix(np.eye(5, dtype=int)),
    ],
)
def test_other_forms_are_left(form):
    assert expand_determinants(form) == form


@pytest.mark.parametrize('size', [1, 2, 3, 4])
def test_value_is_that_of_numpy(size):
    for seed in range(5):
        rows = np.random.default_rng(seed).integers(-3, 4, (size, size))
        text = expand_determinants(matrix(rows)).replace(r'\cdot', '*')
        assert eval(text) == round(np.linalg.det(rows))


def test_an_exchange_of_rows_changes_the_sign():
    rows = [[2, 1, 0], [1, 3, 1], [0, 1, 4]]
    values = {
        order: eval(expand_determinants(matrix([rows[k] for k in order])).replace(r'\cdot', '*'))
        for order in itertools.permutations(range(3))
    }
    assert values[0, 1, 2] == 18
    assert values[1, 0, 2] == values[0, 2, 1] == -18
