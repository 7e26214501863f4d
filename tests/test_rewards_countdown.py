"""Countdown: hand cases and random equations against Python's own arithmetic."""

import inspect
import json
import sys
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st
from reward_cases import HOSTILE, one

from grpo_jax.rewards import countdown_answer


def reward(equation, numbers=(3, 7, 25), target=46, form='<think>hm</think><answer>{}</answer>'):
    return one(countdown_answer, form.format(equation), numbers=numbers, target=target)


@pytest.mark.parametrize(
    'equation',
    [
        '25 + 7 * 3',
        '25+3*7 = 46',
        '(7*3)+25=46',
        '25 - -7 × 3',
        '((25)) + (7·3)',
        '\n25 + 3 * 7\n',
    ],
)
def test_right(equation):
    assert reward(equation) == 1.0


@pytest.mark.parametrize(
    'equation',
    [
        '46',
        '25 + 21',
        '25 + 7 + 7 + 7',  # 7 thrice
        '25 + 3*7 + 0',
        '25 + 3',
        '3 + 7 + 25',
        '25 + 3*7 = 45',
        '25 + 3*7 = 46 = 46',
        '(25 + 3*7',
        '25 + 3*7)',
        '25 + * 3 7',
        '25 3 7',
        '25 + 3**7',
        '25 + 7//3',
        '25 + 3.0*7',
        'int("25") + 3*7',
        '__import__("os")',
        '25 + 3*7 ok',
        '',
        '()',
        '-',
    ],
)
def test_wrong(equation):
    assert reward(equation) == 0.0


def test_arithmetic_is_exact():
    assert reward('8/(3-8/3)', (3, 3, 8, 8), 24) == 1.0
    assert reward('1/3*3', (1, 3, 3), 1) == 1.0
    assert reward('3/(1-1)', (1, 1, 3), 0) == 0.0
    assert reward('10*(1/10+1/5)', (1, 1, 5, 10, 10), 3) == 1.0


def test_only_the_last_answer_counts():
    assert reward('25+3*7', form='{}') == 0.0
    assert reward('25+3*7', form='<answer>{}</answer> or <answer>1</answer>') == 0.0
    assert reward('25+3*7', form='<answer>1</answer> or <answer>{}</answer>') == 1.0


def test_columns_as_texts():
    assert reward('25+3*7', '[3, 7, 25]', '46') == 1.0
    assert reward('25+3*7', json.dumps([3, 7, 26]), '46') == 0.0


@pytest.mark.parametrize('numbers', [[5, -3], '[5, -3]', '5 −3', ['5', '-3'], (5.0, -3.0)])
def test_negative_numbers_are_used_with_their_sign(numbers):
    assert reward('5 + -3', numbers, 2) == 1.0
    assert reward('5 - (-3)', numbers, 8) == 1.0
    assert reward('-3 + 5', numbers, 2) == 1.0
    assert reward('5 - 3', numbers, 2) == 0.0  # that is 3
    assert reward('5 + 3', numbers, 8) == 0.0
    assert reward('5 * -3', numbers, '-15') == 1.0


@pytest.mark.parametrize(
    ('numbers', 'target', 'message'),
    [
        ('[2.5, 7]', 46, "column numbers, row 0: '2.5' is not a whole number like 7 or -3"),
        ([2.5, 7], 46, 'column numbers, row 0: 2.5 is not a whole number'),
        ('3 or 7', 46, "column numbers, row 0: 'or' is not a whole number"),
        ([3, 7], 46.5, 'column target, row 0: 46.5 is not a whole number'),
        ([3, 7], 'many', "column target, row 0: 'many' is not a whole number"),
    ],
)
def test_a_column_without_whole_numbers_is_an_error(numbers, target, message):
    with pytest.raises(ValueError, match=message):
        reward('3+7', numbers, target)


def test_nesting_beyond_the_stack_is_wrong():
    def call(depth):
        return call(depth - 1) if depth else reward('(' * 140 + '1' + ')' * 140, [1], 1)

    limit = sys.getrecursionlimit()
    assert call(limit - 250 - len(inspect.stack())) == 0.0


@st.composite
def equations(draw):
    numbers = draw(st.lists(st.integers(1, 99), min_size=2, max_size=5))
    text = str(numbers[0])
    for number in numbers[1:]:
        operator = draw(st.sampled_from('+-*/'))
        text = draw(st.sampled_from(['{}{}{}', '({}{}{})', '({}) {} {}'])).format(
            text, operator, number
        )
    return text, numbers


@given(equations(), st.data())
def test_random_equations(equation, data):
    text, numbers = equation
    wrapped = text
    for number in sorted(set(numbers), reverse=True):
        wrapped = wrapped.replace(str(number), f'<{number}>')
    value = eval(
        __import__('re').sub('[0-9]+', lambda m: f'Fraction({m.group()})', text),
        {'Fraction': Fraction},
    )
    shuffled = data.draw(st.permutations(numbers))
    target = int(value)
    assert reward(text, shuffled, target) == float(value == target)
    assert reward(text, shuffled, target + 1) == 0.0
    assert reward(text, [*shuffled, 5], target) == 0.0
    assert reward(text, shuffled[1:], target) == 0.0


@pytest.mark.parametrize('text', [text for _, text in HOSTILE], ids=[name for name, _ in HOSTILE])
def test_hostile_text_ends(text):
    assert reward(text) == 0.0
    assert reward('(' * 140 + '1' + ')' * 140, [1], 1) in (0.0, 1.0)
    assert reward('-' * 290 + '1', [1], 1) in (0.0, 1.0)
