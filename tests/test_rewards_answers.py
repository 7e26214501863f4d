"""Grades of completions by data set: small cases, and all references of the public data."""

import random
import re
from fractions import Fraction

import pytest
from reward_cases import real

from grpo_jax.rewards import Grades, grade_answers
from grpo_jax.rewards.verify.answers import reference_answer
from grpo_jax.rewards.verify.extraction import last_boxed


def test_numbers():
    assert grade_answers(
        'gsm8k', ['2+2=4\n#### 4', '1,000'], [['It is 4.0', '#### 5', 'none'], ['$1000']]
    ) == Grades([[True, False, False], [True]], [['4', '5', None], ['1000']], 0)
    assert grade_answers('svamp', ['145.0'], [['145 bananas']]).correct == [[True]]
    assert grade_answers('mawps', ['0.6666666667'], [['2/3', '0.667', '0.6']]).correct == [
        [True, True, False]
    ]
    assert grade_answers('cmath', ['1/5'], [['答案是0.2元', '答：5个']]) == Grades(
        [[True, False]], [['0.2', '5']], 0
    )


def test_math():
    completions = [r'so \boxed{2x}', r'so \boxed{3x}', r'\boxed{9^{9^{9^9}}}', 'no answer']
    assert grade_answers(
        'math', [r'Thus $\boxed{x+x}$.', 'x+x'], [completions, []], seconds=2.0
    ) == (Grades([[True, False, False, False], []], [['2x', '3x', '9^{9^{9^9}}', None], []], 1))


@pytest.mark.parametrize(
    ('dataset', 'references', 'completions', 'message'),
    [
        ('gsm', [], [], "unknown data set 'gsm': use one of cmath, gsm8k, math, mawps, svamp"),
        ('gsm8k', ['1'], [], '1 references for 0 problems'),
        ('gsm8k', ['1', 'many'], [[], []], "reference 1 of gsm8k, 'many', is not a number"),
        ('math', ['1', ' '], [[], []], "reference 1 of math, ' ', has no answer"),
    ],
)
def test_errors(dataset, references, completions, message):
    with pytest.raises(ValueError, match=message):
        grade_answers(dataset, references, completions)


# The public data


def graded(dataset, references, texts):
    grades = grade_answers(dataset, references, [[text] for text in texts], seconds=30.0)
    assert grades.timeouts == 0
    return [correct for (correct,) in grades.correct]


def misses(dataset, references, texts):
    right = graded(dataset, references, texts)
    return [
        pair for pair, ok in zip(zip(references, texts, strict=True), right, strict=True) if not ok
    ]


def test_gsm8k_solutions():
    rows = real('gsm8k/test.jsonl')
    assert len(rows) == 1319
    solutions = [row['answer'] for row in rows]
    answers = [text.split('####')[1].strip() for text in solutions]
    assert misses('gsm8k', answers, solutions) == []
    phrased = [text.replace('####', 'The answer is') + ' or so.' for text in solutions]
    assert misses('gsm8k', answers, phrased) == []


def test_math_solutions():
    rows = real('math/test.jsonl')
    assert len(rows) == 5000
    answers = [last_boxed(row['solution']) for row in rows]
    assert misses('math', answers, [row['solution'] for row in rows]) == []
    phrased = [f'As $x = 7$. The final answer is ${answer}$. It is done.' for answer in answers]
    assert misses('math', answers, phrased) == []


def test_math_solutions_against_answers_that_others_extracted():
    rows = real('math/test500.jsonl')
    assert len(rows) == 500
    answers, solutions = [row['answer'] for row in rows], [row['solution'] for row in rows]
    assert misses('math', answers, solutions) == []


def test_cmath_answers():
    rows = real('cmath/test.jsonl')
    assert len(rows) == 1098
    answers = [row['golden'] for row in rows]
    for form in (
        '{}',
        '3×5=8。答案是：{}个。',
        '先算7。\n答：一共有{}个小朋友。',
        '所以\\boxed{{{}}}',
    ):
        assert misses('cmath', answers, [form.format(answer) for answer in answers]) == []


@pytest.mark.parametrize(
    ('dataset', 'column', 'count'), [('svamp', 'Answer', 1000), ('mawps', 'target', 2065)]
)
def test_word_problems(dataset, column, count):
    answers = [str(row[column]) for row in real(f'{dataset}/test.jsonl')]
    assert len(answers) == count
    assert misses(dataset, answers, [f'So the answer is {answer}.' for answer in answers]) == []


def rewritten(answer):
    """The same answer, spelled so that equal text does not show it."""
    return [
        re.sub(r'(?<![\\A-Za-z]) ', '', answer.replace('\\frac', '\\dfrac')),
        f'\\left({answer}\\right)' if answer.replace('x', '').isalnum() else answer,
        f'{answer}.',
        f'{{{answer}}}',
        f'${answer}$',
        f'\\displaystyle {answer}',
    ]


@pytest.mark.slow
def test_rewritten_math_answers_are_right():
    answers = [last_boxed(row['solution']) for row in real('math/test.jsonl')]
    pairs = [(answer, text) for answer in answers for text in rewritten(answer)]
    texts = [f'\\boxed{{{text}}}' for _, text in pairs]
    assert misses('math', [answer for answer, _ in pairs], texts) == []


def value(answer):
    text = answer.replace(',', '').replace('$', '').removesuffix('%')
    return Fraction(text) if re.fullmatch(r'-?[0-9]*(\.[0-9]+|/[0-9]+)?', text) else None


def wrong(answer, others, rng):
    """Another problem's answer, or this one with the sign or a digit changed, or off by one."""
    digits = [k for k, character in enumerate(answer) if character in '0123456789']
    way = rng.randrange(4) if digits else 0
    if way == 0:
        return rng.choice(others)
    if way == 1:
        return answer[1:] if answer.startswith('-') else f'-{answer}'
    k = digits[-1] if way == 2 else rng.choice(digits)
    digit = (int(answer[k]) + (1 if way == 2 else rng.randrange(1, 10))) % 10
    return f'{answer[:k]}{digit}{answer[k + 1 :]}'


def wrongs(answers, count=1000):
    """Pairs of an answer and another one, unequal to Python where both are numbers."""
    rng = random.Random(0)
    pairs = []
    while len(pairs) < count:
        answer = rng.choice(answers)
        text = wrong(answer, answers, rng)
        if text != answer and (value(answer) is None or value(answer) != value(text)):
            pairs.append((answer, text))
    return pairs


@pytest.mark.parametrize(
    ('dataset', 'path', 'column'),
    [
        ('gsm8k', 'gsm8k/test.jsonl', 'answer'),
        ('cmath', 'cmath/test.jsonl', 'golden'),
        ('mawps', 'mawps/test.jsonl', 'target'),
    ],
)
def test_a_thousand_wrong_numbers_are_wrong(dataset, path, column):
    pairs = wrongs([reference_answer(row[column]) for row in real(path)])
    references, texts = zip(*pairs, strict=True)
    right = graded(dataset, references, [f'The answer is {text}.' for text in texts])
    assert [pair for pair, ok in zip(pairs, right, strict=True) if ok] == []


def test_a_thousand_wrong_answers_are_wrong():
    pairs = wrongs([last_boxed(row['solution']) for row in real('math/test.jsonl')])
    references, texts = zip(*pairs, strict=True)
    right = graded('math', references, [f'\\boxed{{{text}}}' for text in texts])
    assert [pair for pair, ok in zip(pairs, right, strict=True) if ok] == []
