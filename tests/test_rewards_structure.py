"""The structure of normal forms: names, elements, brackets."""

import pytest

from grpo_jax.rewards.verify.structure import (
    named_values,
    same_name,
    split_name,
    split_outside,
    split_parts,
    tuple_names,
)


@pytest.mark.parametrize(
    ('text', 'name', 'value'),
    [
        ('x=5', 'x', '5'),
        ('5=x', 'x', '5'),
        ('x=10/2=5', 'x', '5'),
        ('2+3=5', '', '5'),
        ('x+y=5', '', 'x+y=5'),
        ('-x=3', '', '-x=3'),
        (r'S_n=\sum_{k=1}^nk', 'S_n', r'\sum_{k=1}^nk'),  # an equals sign in braces
        (r'P(X=3)=\frac{1}{8}', 'P(X=3)', r'\frac{1}{8}'),
        (r'x\in[0,1)', 'x', '[0,1)'),
        ('BA=5', 'AB', '5'),
        (r'\overline{AB}=5', 'AB', '5'),
        (r'\sum_{k=1}^{10}k=55', r'\sum_k=1^10k', '55'),
        ('area=5', '', '5'),
        ('5!=120', '', '120'),
        ('5=120', '', '5=120'),  # a false equation has no value
        ('x=5=6', '', 'x=5=6'),
        (r'\frac{1}{3}=0.33', '', '0.33'),
        ('x=1,y=2', '', 'x=1,y=2'),
        ('5', '', '5'),
    ],
)
def test_split_name(text, name, value):
    assert split_name(text) == (name, value)


def test_same_name():
    assert same_name('x', 'x')
    assert same_name('x', '')
    assert same_name('f(x)', 'y')
    assert not same_name('x', 'y')
    assert not same_name('f(x)', 'g(x)')


@pytest.mark.parametrize(
    ('text', 'kind', 'elements'),
    [
        ('1,2', 'list', ('1', '2')),
        ('32;349', 'list', ('32', '349')),
        ('(1,f(2,3))', '()', ('1', 'f(2,3)')),
        ('[1,2)', '[)', ('1', '2')),
        (r'\{1\}', r'\{\}', ('1',)),
        (r'0,\pm2', 'list', ('0', '2', '-2')),
        (r'\begin{pmatrix}1&2\\3&4\end{pmatrix}', 'matrix 2x2x2', ('1', '2', '3', '4')),
        (r'(\begin{array}{c}1\\2\end{array})', 'matrix 2x1x1', ('1', '2')),
        (r'\begin{vmatrix}1\\2\end{vmatrix}', 'determinant 2x1x1', ('1', '2')),
        (r'\begin{cases}x=1\\y=2\end{cases}', 'cases 2x1x1', ('x=1', 'y=2')),
        (
            r'\begin{cases}1,&ifx>0\\0,&else\end{cases}',
            'cases 2x2x2',
            ('1&x>0', '0&otherwise'),
        ),
        ('1&x>0', 'row', ('1', 'x>0')),
        ('[[1,2],[3,4]]', 'matrix 2x2x2', ('1', '2', '3', '4')),
        ('[[1,2,3]]', 'matrix 1x3', ('1', '2', '3')),
        ('[[1,2],[3]]', '[]', ('[1,2]', '[3]')),
    ],
)
def test_split_parts(text, kind, elements):
    assert split_parts(text) == (kind, elements)


@pytest.mark.parametrize('text', ['5', '(x+1)(x-2)', '(5)', 'f(1,2)', ')(', ''])
def test_one_value_has_no_parts(text):
    assert split_parts(text) is None


def test_named_values():
    assert named_values(split_parts('x=1,y=2')) == {'x': '1', 'y': '2'}
    assert named_values(split_parts('x=1,x=2')) is None
    assert named_values(split_parts('x=1,2')) is None
    assert named_values(tuple_names('(y,x)=(1,2)')) == {'y': '1', 'x': '2'}
    assert tuple_names('(x,y)=(1,2,3)') is None


def test_split_outside_needs_matching_brackets():
    assert split_outside('a=b_{c=d}', '=') == ['a', 'b_{c=d}']
    assert split_outside('a)=(b', '=') == []
