"""The final answer of a completion: hand cases, hostile texts, random texts."""

from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st
from reward_cases import HOSTILE

from grpo_jax.rewards import extract_answer, extract_chinese, extract_math, normalize_number


@pytest.mark.parametrize(
    ('text', 'expected'),
    [
        ('so 9 * 2 = $<<9*2=18>>18 a day.\n#### 18', '18'),
        ('#### 5\nQ: next?\n#### 6 and 7', '6'),
        ('#### $1,000.00 dollars in 3 days', '1000'),
        ('####-5', '-5'),
        ('#### **18**', '18'),
        ('#### Step 1\n7 then 8', '8'),  # a heading is no answer
        ('#### 1,0001 is not 7', None),  # unreadable where the answer belongs: no second guess
        ('#### 1/0', None),
        ('#### 3\nThe answer is 4, or \\boxed{5}', '3'),
        ('The answer is 4, or \\boxed{5}; not 6', '5'),
        ('\\boxed{1} then \\boxed{\\frac{1}{2}}', '0.5'),
        ('\\boxed{18 \\text{ m}^2}', '18'),
        ('\\boxed{\\text{none}} but 7', '7'),
        ('\\boxed{\\text{day } 5} of 7', '5'),
        ('\\boxed{12', '12'),
        ('The answer is 4. I checked it 2 times.', '4'),
        ('THE ANSWER IS: **$4.50** for 2', '4.5'),
        ('the answer is \\(-4\\) at 9', '-4'),
        ('The answer is found from 3 and 5: 3+5=8.', '8'),
        ('16-3', '3'),
        ('x = -3', '-3'),
        ('between 10-20', '20'),
        ('it costs 5%.', '5'),
        ('it is 18.', '18'),
        ('there are 1, 2, 3', '3'),
        ('no number', None),
        ('', None),
        ('\\boxed{3 \\times 6 = 18}', '18'),
        ('it has an area of 18 cm^2', '18'),
        ('<think>\\boxed{7}</think> It is 9.', '9'),
        ('<think>7</think><answer>8 eggs</answer> for 9', '8'),
        ('<think>7</think>', '7'),
    ],
)
def test_extract_answer(text, expected):
    assert extract_answer(text) == expected


@given(st.integers(-(10**9), 10**9), st.text('abc 0123456789.,$=-', max_size=30))
def test_extract_answer_finds_a_marked_number_after_any_text(number, before):
    for form in ('\n#### {:,}', ' \\boxed{{{}}}', ' The answer is {}.', ' or ${:,}.00'):
        assert extract_answer(before + form.format(number)) == str(number)


@pytest.mark.parametrize(
    ('text', 'expected'),
    [
        ('3×6=18，答案是18个。', '18'),
        ('答案：18元', '18'),
        ('所以答案应该是：$18$。验算 3×6', '18'),
        ('最终结果为 1/5。', '0.2'),
        ('3×6=18（包）\n答：3盒一共有18小包茶叶。\n再见 5', '18'),
        ('一共 １８ 包', '18'),
        ('共１，０００元', '1000'),
        ('有18，20', '20'),  # a full-width comma separates clauses, not thousands
        ('买了３．５千克', '3.5'),
        ('答案是3又1/2', '3.5'),
        ('因此\\boxed{18元}，不是 20', '18'),
        ('因此\\boxed{\\frac{1}{5}}', '0.2'),
        ('The answer is 4 (共5)', '4'),
        ('面积是 18 平方米', '18'),
        ('<think>先算 7</think>是 8', '8'),
        ('没有', None),
    ],
)
def test_extract_chinese(text, expected):
    assert extract_chinese(text) == expected


@pytest.mark.parametrize(
    ('text', 'expected'),
    [
        ('so \\boxed{1}, no: $\\boxed{\\frac{1}{2}}$.', '\\frac{1}{2}'),
        ('The answer is $\\frac{3}{4}$. I hope it is correct.', '\\frac{3}{4}'),
        ('The answer is \\(x^2+1\\).', 'x^2+1'),
        ('the final answer is:\n\\[ (1, 2] \\]\nDone in 5 steps.', '(1, 2]'),
        ('The answer is $\\$40$.', '\\$40'),
        ('**Answer:** 2\\sqrt{3}', '2\\sqrt{3}'),
        ('The answer is Evelyn. She ran 5 km.', 'Evelyn'),
        ('The answer is 3.5 and no more.', '3.5 and no more'),
        ('The answer is 18 dollars in 3 days.', '18'),
        ('The answer is not 3. The answer is 4.', '4'),
        ('The answer is found from 3 and 5 by adding the two numbers: 8', '8'),
        ('it has 1,000 or\nso 1,200 members', '1,200'),
        ('<think>\\boxed{7}</think> <answer>x + 1</answer>', 'x + 1'),
        ('<think>hm</think> <answer>so \\boxed{7}</answer>', '7'),
        ('<think>\\boxed{7}</think>', '7'),
        ('\\boxed{}, 5', '5'),
        ('\\boxed{12', '12'),
        ('nothing', None),
        ('', None),
    ],
)
def test_extract_math(text, expected):
    assert extract_math(text) == expected


@pytest.mark.parametrize('text', [text for _, text in HOSTILE], ids=[name for name, _ in HOSTILE])
def test_extraction_from_hostile_text_ends(text):
    for extract in (extract_answer, extract_chinese, extract_math):
        for form in ('{}', 'the answer is {}', '答案是{}', '<think>{}', '$x$ {} $'):
            result = extract(form.format(text))
            assert result is None or isinstance(result, str)


@given(st.text('#$%*-.,/0179 {}\\\\boxedfracansweris', max_size=80))
def test_whatever_is_extracted_is_in_canonical_spelling(text):
    result = extract_answer(text)
    assert result is None or (normalize_number(result) == result and str(Fraction(result)))
