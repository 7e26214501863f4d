"""Equivalence of answers: pairs by hand, classes for votes, hostile answers, random numbers."""

import itertools
from fractions import Fraction

import pytest
from answer_pairs import RIGHT, WRONG
from hypothesis import given
from hypothesis import strategies as st

from grpo_jax.rewards import equivalence_classes, equivalent
from grpo_jax.rewards.verify import pool
from grpo_jax.rewards.verify.equivalence import compare, equivalent_pairs
from grpo_jax.rewards.verify.normal_form import normal_form

SAME = [
    # numbers
    (r'\frac{1}{2}', '0.5'),
    (r'\dfrac12', '1/2'),
    (r'\frac{-1}{2}', r'-\frac12'),
    (r'137 \frac{1}{2}', '137.5'),
    (r'10,\!236', '10236'),
    (r'\frac{12}{5,525}', '12/5525'),
    (r'50\%', '0.5'),
    ('3:1', '3/1'),
    # units, names, spelling
    (r'\$0.50', '0.5'),
    (r'18\text{ cm}^2', '18'),
    ('5 inches', '5'),
    (r'45^\circ', '45'),
    (r'2\sqrt{2}\text{ units}', r'2\sqrt{2}'),
    (r'\text{even}', 'Even'),
    (r'\text{(C)}', 'C'),
    (r'\text{Friday}', 'friday.'),
    ('x=5', '5'),
    ('5=x', '5'),
    ('x=10/2=5', '5'),
    ('1/2=0.5', '1/2'),
    ('(x,y)=(1,2)', '(1,2)'),
    ('f(x) = 2x', '2x'),
    (r'x\in[-2,7]', '[-2,7]'),
    ('443_5', '443_{5}'),
    ('443_5', '443'),
    # parts
    ('(1,2]', r'\left(1, 2\right]'),
    ('1,2', '2 and 1'),
    (r'\{1,2\}', '2,1'),
    ('(1,2)', '1,2'),
    ('(1,2)', 'x=1, y=2'),
    (r'\left( 3, \frac{\pi}{2} \right)', r'(3, \pi/2)'),
    (r'1\pm\sqrt{2}', r'1-\sqrt2, 1+\sqrt2'),
    ('(3,4),(5,6)', '(5,6),(3,4)'),
    (r'\begin{pmatrix}1\\2\end{pmatrix}', r'\begin{bmatrix} 1 \\ 2 \end{bmatrix}'),
    (r'(-\infty,2)\cup(3,\infty)', r'(3,\infty) \cup (-\infty,2)'),
    # expressions
    (r'\frac{\sqrt{3}}{2}', r'\sqrt{3}/2'),
    (r'\frac{\sqrt3}{3}', r'\frac{1}{\sqrt{3}}'),
    ('sqrt(2)/2', r'\frac{1}{\sqrt2}'),
    (r'5\sqrt{2}', '5√2'),
    ('x^2+2x+1', '(x+1)^2'),
    ('7x(x-1)(x-2)', '7x^3-21x^2+14x'),
    (r'\frac{x+1}{x-1}', '(x+1)/(x-1)'),
    ('y=2x+3', 'y=3+2x'),
    ('5x-7y+11z+4=0', '7y-5x-11z-4=0'),
    (r'\sin^2 x+\cos^2 x', '1'),
    (r'\sqrt{x^2}', '|x|'),
    (r'e^{i\pi}', '-1'),
    ('-12+15i', '15i-12'),
    (r'\log_2 8', '3'),
    (r'\sqrt{2}+\sqrt{3}', r'\sqrt{5+2\sqrt{6}}'),
    (r'\sqrt{2}+\sqrt{3}-\sqrt{5+2\sqrt{6}}', '0'),
    (r'\binom{5}{2}', '10'),
    ('3-2f(x)', '-2f(x)+3'),
    (r'4\pi', '12.566'),
    (r'\sqrt{2}', '1.414'),
    ('[-2,7]', r'-2\le x\le 7'),
    ('x>5', r'(5,\infty)'),
]
DIFFERENT = [
    ('116', '116.01'),
    ('5', ''),
    ('', ''),
    ('1 2', '12'),
    ('even', 'odd'),
    ('make', 'kema'),  # a word is no product of variables
    ('A', 'B'),
    ('443_5', '443_6'),
    ('443_5', '444'),
    ('-221_3', '-221_2'),
    ('0.0011_2', '0.0011_3'),
    ('(1,2)', '(2,1)'),
    ('(1,2)', '(1,2,3)'),
    ('[1,2]', '(1,2)'),
    ('1,1', '1,2'),
    ('9', '(9,0)'),
    (r'1\pm\sqrt2', r'1+\sqrt2'),
    (r'\begin{pmatrix}1\\2\end{pmatrix}', r'\begin{pmatrix}1&2\end{pmatrix}'),
    ('x', 'y'),
    ('3', '-x=3'),
    ('x=3', '-x=3'),
    ('5', 'x+y=5'),
    ('(1,2)', 'x=1, y=3'),
    ('x', '-x'),
    (r'\sqrt{x^2}', 'x'),
    ('2x+3', '2x-3'),
    (r'\frac{1}{2} ab', r'\frac{1}{2}'),
    (r'\sqrt2', '1.5'),
    (r'\sqrt{2}', r'\sqrt{3}'),
    (r'4\pi', '13'),
    (r'4\pi', '12'),
    ('e', '2.7'),
    (r'\infty', r'-\infty'),
    ('i', '-i'),
    ('3+4i', '4+3i'),
    ('5x-7y=0', '5x+7y=0'),
    ('x>5', 'x<5'),
    ('x>5', r'[5,\infty)'),
    ('[-2,7]', '-2<x<7'),
    (r'p\%+\frac12', '1/2'),
    ('2^{100}', '2^{101}'),
    ('10^{-40}', '10^{-41}'),
    ('0', '10^{-40}'),
]


def test_pairs_by_hand():
    # All at once, so that the workers share them; a failed assertion shows the misses.
    results = equivalent_pairs(SAME + DIFFERENT, seconds=30.0)
    assert [pair for pair, same in zip(SAME, results, strict=False) if same is not True] == []
    assert [p for p, same in zip(DIFFERENT, results[len(SAME) :], strict=True) if same] == []
    swapped = equivalent_pairs([(b, a) for a, b in SAME + DIFFERENT], seconds=30.0)
    assert swapped == results


@pytest.fixture(scope='module')
def verdicts():
    """The results of all pairs in both orders, which the workers share."""
    pairs = [pair for a, b in [*RIGHT, *WRONG] for pair in ((a, b), (b, a))]
    return dict(zip(pairs, equivalent_pairs(pairs, seconds=30.0), strict=True))


@pytest.mark.parametrize(('reference', 'answer'), RIGHT)
def test_right_answers_are_accepted(verdicts, reference, answer):
    assert verdicts[reference, answer] is True
    assert verdicts[answer, reference] is True


@pytest.mark.parametrize(('reference', 'answer'), WRONG)
def test_wrong_answers_are_refused(verdicts, reference, answer):
    assert verdicts[reference, answer] is False
    assert verdicts[answer, reference] is False


FORMULAS = [  # that have values at some points only, or complex ones
    r'a^{\log_a x}', r'2^{\log_2 x}', 'x', '|x|', r'\sqrt{x^2}', r'\sqrt{-x}', r'\sqrt[3]{-x}',
    r'(-x)^{1/3}', r'\log_a(xy)', r'\log_a x+\log_a y', 'x^y', r'e^{y\ln x}', '(-1)^x',
    r'e^{i\pi x}', r'x^{\log_a y}', r'y^{\log_a x}',
]  # fmt: skip


def test_the_order_of_two_answers_does_not_matter():
    pairs = list(itertools.permutations(FORMULAS, 2))
    same = dict(zip(pairs, equivalent_pairs(pairs, seconds=30.0), strict=True))
    assert [pair for pair in pairs if same[pair] is not same[pair[::-1]]] == []
    assert same[r'a^{\log_a x}', 'x'] is True
    assert same['x', '|x|'] is False


def test_equal_texts_and_numbers_need_no_worker(monkeypatch):
    def fail():
        raise AssertionError('used a worker')

    monkeypatch.setattr(pool, 'shared', fail)
    for a, b, same in [
        (r'\frac{\sqrt3}{2}', r'\dfrac{ \sqrt{3} }{2}', True),
        ('(1, 2)', '(1,2.0)', True),
        ('18', '19', False),
        (r'\text{no}', r'\text{yes}', False),
        ('(1,2)', '3', False),
        ('{' * 100_000, '7', False),
    ]:
        assert equivalent(a, b) is same
    assert equivalence_classes(['1', None, '1.0', '2', '1/2', '0.5']) == [0, None, 0, 1, 2, 2]


@given(st.fractions(-99, 99, max_denominator=50), st.fractions(-99, 99, max_denominator=50))
def test_fractions_are_equal_where_python_says_so(a, b):
    texts = (rf'\frac{{{a.numerator}}}{{{a.denominator}}}', f'{b.numerator}/{b.denominator}')
    assert compare(*map(normal_form, texts)) is (a == b)
    assert compare(normal_form(texts[0]), normal_form(str(Fraction(a)))) is True


@given(st.text('{}[]()\\,.^_ $%&=<>|+-*/0129xyzpiabcdefrt', max_size=40))
def test_any_text_has_a_normal_form_and_is_itself(text):
    form = normal_form(text)
    assert compare(form, form) is bool(form)
    assert isinstance(compare(form, normal_form('7')), bool | list)


def test_classes_vote_in_order_of_appearance():
    answers = ['x', r'\frac12', None, '0.5', r'2^{1/2}', 'x', '7', r'\sqrt{2}', '50%', '  x ']
    assert equivalence_classes(answers, seconds=30.0) == [0, 1, None, 1, 2, 0, 3, 2, 1, 0]
    assert equivalence_classes([]) == []
    assert equivalence_classes([None, None]) == [None, None]


def test_an_answer_that_cannot_be_parsed_in_time_is_a_class_of_its_own():
    shared = pool.shared()
    before = shared.timeouts + shared.crashes
    answers = [r'\sqrt{2}', '9^{9^{9^9}}', '2^{1/2}', '9^{9^{9^9}}', r'\sqrt{3}']
    assert equivalence_classes(answers, seconds=2.0) == [0, 1, 0, 1, 2]
    assert shared.timeouts + shared.crashes == before + 1  # not once for each comparison


HOSTILE = [
    '9**9**9**9',
    '9^{9^{9^9}}',
    '{' * 1_000_000,
    '{' * 500_000 + '}' * 500_000,
    '10000000000!',
    '(10^{10})!',
    r'\frac{1}{' * 100 + 'x' + '}' * 100,
    r'\sqrt{' * 150 + '2' + '}' * 150,
    '(' * 450 + 'x' + ')' * 450,
    r'\{\{' * 100 + 'x' + r'\}\}' * 100,
    ','.join(['9^{9^{9^9}}'] * 60),
    r'\{' + ','.join(['9^{9^{9^9}}'] * 12) + r'\}',
    r'\sum_{n=1}^{10^{10}} \frac{1}{n}',
    '(x+y+z+1)^{1000}',
    r'\tan(10^{10^{10}})',
    'x_' * 300,
    '|' * 300,
    '5' + '!' * 60,
    r'\cup'.join(['(1,x)'] * 100),
    r'\text{' * 150,
    ' and '.join(['x'] * 150),
]


@pytest.mark.slow
@pytest.mark.parametrize('reference', ['7', r'\frac{\sqrt{3}}{2}x', r'\{1,x\}'])
def test_hostile_answers_end_as_wrong(reference):
    assert not any(equivalent_pairs([(reference, text) for text in HOSTILE], seconds=1.0))
    assert equivalent(r'\sqrt{4}x', '2x', seconds=30.0)
