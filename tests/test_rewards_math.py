"""Rewards for the final answer: hand cases, and every reference of the public data sets."""

import pytest
from reward_cases import HOSTILE, one, real

from grpo_jax.rewards import cmath_answer, extract_answer, gsm8k_answer, hash_format, math_answer
from grpo_jax.rewards.verify.answers import reference_answer


@pytest.mark.parametrize(
    ('completion', 'expected'),
    [
        ('9*2=18\n#### 18', 1.0),
        ('18.0', 1.0),
        ('$18', 1.0),
        ('#### 17 or 18', 0.0),
        ('eighteen', 0.0),
        ('-18', 0.0),
    ],
)
def test_gsm8k_answer(completion, expected):
    assert one(gsm8k_answer, completion, answer='2 eggs\n#### 18') == expected


def test_gsm8k_answer_compares_to_the_last_number_after_hashes():
    assert one(gsm8k_answer, '18', answer='#### 3\n#### 18') == 1.0


@pytest.mark.parametrize('answer', ['many', '#### many', '1, 2', ''])
def test_gsm8k_answer_does_not_apply_without_a_reference_number(answer):
    assert one(gsm8k_answer, '#### 18', answer=answer) is None


@pytest.mark.parametrize('answer', ['18', '18.0', '$18', '2 eggs\n#### 18', '\\boxed{18}', 18])
def test_gsm8k_answer_takes_the_reference_alone_or_in_a_solution(answer):
    assert one(gsm8k_answer, 'so #### 18', answer=answer) == 1.0
    assert one(gsm8k_answer, 'so #### 19', answer=answer) == 0.0


def test_gsm8k_answer_ignores_percent_signs():
    assert one(gsm8k_answer, 'it is 60%', answer='60') == 1.0
    assert one(gsm8k_answer, 'it is 60', answer='60%') == 1.0
    assert one(gsm8k_answer, 'it is 0.6', answer='60%') == 0.0


def test_cmath_answer():
    assert one(cmath_answer, '答案是１８个', answer='18') == 1.0
    assert one(cmath_answer, '答：有5个', answer='18') == 0.0
    assert one(cmath_answer, '等于 1/5', answer='0.2') == 1.0
    assert one(cmath_answer, '没有', answer='没有') is None


def test_math_answer():
    def row(completion, answer):
        return one(math_answer, completion, answer=answer)

    assert row('so \\boxed{0.5}', '\\frac{1}{2}') == 1.0
    assert row('so \\boxed{\\frac{\\sqrt{3}}{3}}', '\\frac{1}{\\sqrt3}') == 1.0
    assert row('so \\boxed{\\sqrt{3}}', '\\frac{1}{\\sqrt3}') == 0.0
    assert row('no idea', '5') == 0.0
    assert row('\\boxed{5}', '') is None
    assert row('\\boxed{5}', 'Thus $\\boxed{5}$.') == 1.0


def test_math_answer_of_several_boxes():
    def row(completion, answer, **options):
        (reward,) = math_answer([''], [completion], answer=[answer], **options)
        return reward

    two = r'$x = \boxed{1}$ or $x = \fbox{2}$'
    assert row(two, '1, 2', boxes='all') == 1.0
    assert row(two, '2, 1', boxes='all') == 1.0
    assert row(two, '2', boxes='all') == 0.0
    assert row(two, r'either \boxed{1} or \boxed{2}', boxes='all') == 1.0
    assert row(two, '2') == 1.0
    assert row(two, '1, 2') == 0.0
    assert row(r'\boxed{5}, so \boxed{5}', '5', boxes='all') == 1.0


@pytest.mark.parametrize('choice', ['The answer is (E) 15.', r'so \boxed{\textbf{(E)}\ 15}'])
def test_a_choice_is_its_letter_or_its_value(choice):
    assert one(math_answer, choice, answer='E') == 1.0
    assert one(math_answer, choice, answer='15') == 1.0
    assert one(math_answer, choice, answer='D') == 0.0
    assert one(gsm8k_answer, choice, answer='15') == 1.0


def test_math_answer_counts_what_takes_too_long_as_wrong():
    assert math_answer(
        ['', ''], ['\\boxed{9^{9^{9^9}}}', '\\boxed{2x}'], ['x+x', 'x+x'], seconds=1.0
    ) == [0.0, 1.0]


@pytest.mark.parametrize(
    ('text', 'expected'),
    [
        ('18', '18'),
        ('x\n#### 18', '18'),
        ('a $\\boxed{x^2}$.', 'x^2'),
        (' (1, 2) ', '(1, 2)'),
        ('so \\fbox{42}', '42'),
        ('so \\boxed {5}', '5'),
        (7, '7'),
    ],
)
def test_reference_answer(text, expected):
    assert reference_answer(text) == expected


@pytest.mark.parametrize('text', [text for _, text in HOSTILE], ids=[name for name, _ in HOSTILE])
def test_hostile_text_ends(text):
    for reward in (gsm8k_answer, cmath_answer):
        assert one(reward, text, answer='#### 116') == 0.0
        assert one(reward, '2', answer='####' + text) in (None, 0.0)
        assert one(reward, '2', answer=text) in (None, 0.0)


@pytest.mark.parametrize(
    ('split', 'rows'), [pytest.param('train', 7473, marks=pytest.mark.slow), ('test', 1319)]
)
def test_gsm8k_reference_answers(split, rows):
    answers = [row['answer'] for row in real(f'gsm8k/{split}.jsonl')]
    assert len(answers) == rows
    numbers = [int(answer.split('####')[1].replace(',', '')) for answer in answers]
    assert [extract_answer(answer) for answer in answers] == [str(number) for number in numbers]
    assert gsm8k_answer(answers, answers, answer=answers) == [1.0] * rows
    others = [
        f'{answer.split("####")[0]}#### {number + 1}'
        for answer, number in zip(answers, numbers, strict=True)
    ]
    assert gsm8k_answer(answers, others, answer=answers) == [0.0] * rows
    assert hash_format(answers, answers) == [1.0] * rows
