"""The final answer of a completion: hand cases, hostile texts, random texts."""

from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st
from reward_cases import HOSTILE

from grpo_jax.rewards import (
    extract_answer,
    extract_chinese,
    extract_math,
    gsm8k_answer,
    math_answer,
    normalize_number,
)


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


@pytest.mark.parametrize(
    ('text', 'expected'),
    [
        # mixed numbers
        ('\\boxed{2\\frac12}', '2.5'),
        ('The answer is 2 1/2.', '2.5'),
        ('The answer is 2 and 1/2 cups.', '2.5'),
        ('It takes 2½ hours', '2.5'),
        ('The answer is ½.', '0.5'),
        ('\\boxed{-2\\tfrac{1}{2}}', '-2.5'),
        ('so 2\\,\\frac{1}{2}', '2.5'),
        ('\\boxed{2~1/2}', '2.5'),
        # powers of ten
        ('1.5 \\times 10^3', '1500'),
        ('The answer is $1.5\\times10^{3}$ m in 2 days', '1500'),
        ('\\boxed{1.5 \\cdot 10^{-3}}', '0.0015'),
        ('it is 1.5×10³', '1500'),
        ('#### 1.5e-3', '0.0015'),
        ('3e8', '300000000'),
        ('3*10^8', '300000000'),
        ('2.5 x 10^4', '25000'),
        ('\\boxed{2^{10}}', '1024'),
        ('The answer is 10^6.', '1000000'),
        # separators of thousands
        ('70\\,000', '70000'),
        ('\\boxed{70\\ 000}', '70000'),
        ('The answer is 70 000.', '70000'),
        ('70\u202f000', '70000'),
        ('1\xa0234\xa0567', '1234567'),
        ("1'234'567", '1234567'),
        ('\\boxed{70{,}000}', '70000'),
        ('\\boxed{1\\;234.5}', '1234.5'),
        # a sign that stands apart
        ('\\boxed{- 18}', '-18'),
        ('The answer is - 18.', '-18'),
        ('$x = - 18$', '-18'),
        ('\\boxed{-\\ 18}', '-18'),
        ('\\boxed{−18}', '-18'),
        ('\\boxed{–18}', '-18'),
        ('#### - 18', '-18'),
        ('-$5.50', '-5.5'),
        ('The answer is -€5', '-5'),
        # fractions
        ('\\cfrac{3}{4}', '0.75'),
        ('\\frac34', '0.75'),
        ('\\frac 3 4', '0.75'),
        ('\\frac{ 3 }{ 4 }', '0.75'),
        ('-\\frac{3}{4}', '-0.75'),
        ('\\frac{-3}{4}', '-0.75'),
        ('\\boxed{\\frac{3}{-4}}', '-0.75'),
        ('\\frac3{20}', '0.15'),
        ('\\boxed{\\frac{1{,}500}{3}}', '500'),
        ('The answer is 3 / 4.', '0.75'),
        ('3⁄4', '0.75'),
        ('\\boxed{\\dfrac{1.5}{4}}', '0.375'),
        # a part of something else
        ('$x=\\frac{1+\\sqrt5}{2}$', None),
        ('\\boxed{\\frac{\\sqrt{3}}{2}}', None),
        ('The answer is 2\\sqrt{3}.', None),
        ('\\boxed{3\\pi}', None),
        ('\\boxed{5 + 3}', None),
        ('\\boxed{3, 4}', None),
        ('\\boxed{10-20}', None),
        ('The answer is 10-20.', None),
        ('The answer is 10 to 20 days.', None),
        ('The answer is 3, 4 and 5.', None),
        ('so 12.05.2024', None),
        ('The answer is 12/25/2024.', None),
        ('The answer is 3:30 pm.', None),
        ('The answer is 2024-05-12', None),
        ('The ratio is 3:4', '0.75'),
        ('The answer is 1.000.000', None),
        ('\\boxed{0.\\overline{3}}', None),
        ('\\boxed{x^2}', None),
        ('version 2.0.1', None),
        ('It costs $3 million', '3'),
        ('It dropped to –3°C', '-3'),
        ('\\boxed{x_1 = 5}', '5'),
        ('443_5', None),
        ('\\boxed{5!}', None),
        ('\\boxed{2x}', None),
        # other phrases
        ('Final Answer: 18\nIn 3 steps', '18'),
        ('**Answer:** **18** of 20', '18'),
        ('answer: **18** in 3', '18'),
        ('The answer is approximately 18.5 in 3', '18.5'),
        ('The answer is $\\approx 5$ of 6', '5'),
        ('the answer should be 18, not 20', '18'),
        ('The answer is x = 5, by step 3', '5'),
        ('answer = 18 by rule 2', '18'),
        ('The final answer is therefore **$18**. 2 steps', '18'),
        # an equation after the phrase
        ('The answer is 16 - 3 = 13. I used 2 numbers.', '13'),
        ('The answer is 5 apples + 3 apples = 8 apples. 2 steps', '8'),
        ('#### 5+3=8', '8'),
        ('The answer is 5, because 2+3=5.', '5'),
        ('The answer is 5 because 2+3 = 5, ok 7', '5'),
        ('The answer is 5 x 3 = 15. or 2', '15'),
        # boxes and choices
        ('\\fbox{42} of 50', '42'),
        ('\\boxed {5} of 6', '5'),
        ('$\\boxed 5$ of 6', '5'),
        ('\\boxed{\\boxed{5}} of 6', '5'),
        ('\\text{so \\boxed{5}} of 6', '5'),
        ('\\boxed{\\textbf{(E)}\\ 15}', '15'),
        ('The answer is (E) 15. 2 steps', '15'),
        ('\\boxed{\\$18.00}', '18'),
        ('\\boxed{18\\text{ dollars in 3 days}}', '18'),
        ('\\boxed{\\mathbf{18}}', '18'),
        ('\\boxed{18^\\circ}', '18'),
        ('\\boxed{x \\approx 3.14}', '3.14'),
        ('\\boxed{\\text{day } 5 \\text{ of } 7}', '5'),
        # currencies, full-width digits, emphasis, words
        ('18€', '18'),
        ('€18 now', '18'),
        ('US$18', '18'),
        ('The answer is Rs. 18 for 2', '18'),
        ('１８', '18'),
        ('#### １，０００', '1000'),
        ('50 %', '50'),
        ('The answer is 5th of 6', '5'),
        ('a 5-foot pole', '5'),
        ('**18**', '18'),
        ('*18*', '18'),
        ('_18_', '18'),
        ('{"answer": 18}', '18'),
        ('Step 1: 5 apples', '5'),
        ('w/ 5 apples', '5'),
        ('- 5 apples', '5'),
        ('16-3', '3'),
        # signs, powers and fractions in other commands
        ('\\boxed{3 \\times {10}^{2}}', '300'),
        ('\\boxed{-~7}', '-7'),
        ('\\boxed{-(7)}', '-7'),
        ('\\boxed{\\sfrac{5}{8}}', '0.625'),
        ('\\boxed{\\nicefrac{5}{8}}', '0.625'),
        ('\\boxed{{5 \\over 8}}', '0.625'),
        ('\\boxed{3 \\colon 4}', '0.75'),
        # a part of a formula, of a relation, of several values
        ('the value is $2^{x}$', None),
        ('the 5^{th} of 6^{th}', '6'),
        ('so $y = 3x + 2$', None),
        ('so $n^2+5$', None),
        ('the answer is $5!$', None),
        ('The answer is 42!', '42'),
        ('\\boxed{42\\text{ and }43}', None),
        ('The answer is 5 or 7.', None),
        ('\\boxed{x > 2}', None),
        ('\\boxed{x \\leq 2}', None),
        ('\\boxed{\\pm 3}', None),
        ('\\boxed{3\\pm1}', None),
        ('pay 1.234,50 €', None),
        ('on 2024-05-03', None),
        ('\\boxed{0.\\dot{3}}', None),
        # environments and tags
        ('\\begin{align*}x&=3\\\\&=18\\end{align*}', '18'),
        ('(a) 5 (b) -6', '-6'),
        ('<answer>- 18</answer>', '18'),
        # absolute values, but no columns of a table
        ('The answer is |-3|.', '3'),
        (r'\boxed{\left|-3.5\right|}', '3.5'),
        (r'\boxed{\lvert -3\rvert}', '3'),
        ('The answer is |5-8|.', None),
        ('| total | -3 |', '-3'),
        ('|x|-3|', '-3'),
        # 2-1/2 may be a mixed number or a difference
        ('The answer is 2-1/2.', None),
        ('2-1/2', None),
        ('8 - 1/4', None),
        ('The answer is 2-1/2 cups', None),
        ('10 - 2/4 = 9.5', '9.5'),
    ],
)
def test_a_number_is_read_whole_or_not_at_all(text, expected):
    assert extract_answer(text) == expected


@pytest.mark.parametrize(
    ('text', 'expected'),
    [
        ('答案是-5度', '-5'),
        ('答案是－5度', '-5'),
        ('答案是负5', '-5'),
        ('气温是零下5度', '-5'),
        ('答案是负五度', '-5'),
        ('零下十度', '-10'),
        ('温度是负二十度', '-20'),
        ('答案是3万', '3'),
        ('第十八名', None),
        ('答案是十八个', '18'),
        ('答：一共有三十五个小朋友。', '35'),
        ('答案是三分之二', '2/3'),
        ('答案是3分之2', '2/3'),
        ('百分之五十', '50'),
        ('占百分之50', '50'),
        ('答案是3又2分之1', '3.5'),
        ('答案是3万5千元', '35000'),
        ('一共1亿2000万人', '120000000'),
        ('答案是15万元', '15'),
        ('5千米', '5'),
        ('一共5千克', '5'),
        ('答案是一百二十', '120'),
        ('答案是二〇二四', '2024'),
        ('答案是三点五', '3.5'),
        ('答案是两个数的和，18', '18'),
        ('答案是一样的，都是18', '18'),
        ('结果等于18。用了3步', '18'),
        ('答案是约18个，不是20', '18'),
        ('答案：3×6=18。共2步', '18'),
        ('答案是２½', '2.5'),
        ('答案是3：4', '0.75'),
        ('答案是10～20', None),
        ('答：有十二个', '12'),
        ('他有三个苹果，一共十二个', '12'),
        ('没有', None),
        ('答案是1.5×10³米', '1500'),
        ('答案是70 000', '70000'),
        ('因此\\boxed{-5度}', '-5'),
        ('答：最后剩下-5。', '-5'),
        ('\\boxed{三十}', '30'),
        ('答案是二又三分之一', '7/3'),
        ('答案是一又二分之一', '1.5'),
        ('答案是三千五', '3500'),
        ('答案是三千零五', '3005'),
        ('答案是一百五', '150'),
        ('答案是三万五', '35000'),
        ('答案是三百二十', '320'),
        ('答案是十五', '15'),
        ('答案是12点30分', None),
        ('答案是（18）', '18'),
        ('答案为：18。', '18'),
        ('答案是一亿二千万', '120000000'),
        ('答案是1千5百', '1500'),
        ('答案是1千五', '1500'),
        ('答案是2千零5', '2005'),
        ('答案是2万3千4百', '23400'),
        ('答案是1万5', '15000'),
        ('答案是3千5百米', '3500'),
        ('答案是3千米', '3'),
        ('答案是-3千5百', '-3500'),
        ('答案是2万5千分之1', '0.00004'),
        ('答案是3千分之1', '1/3000'),
        ('答案是十五元五角', '15.5'),
        ('答案是15元5角', '15.5'),
        ('答：五元五分', '5.05'),
        ('答案是12元05分', '12.05'),
        ('答案是3元5角2分', '3.52'),
        ('答案是三块五毛', '3.5'),
        ('每支2元5角，答案是3支', '3'),
        ('答：用了3元，还剩5角。', '5'),
        ('答案是壹佰贰拾叁', '123'),
        ('答案是叁万伍仟元整', '35000'),
        ('答案是贰仟零伍', '2005'),
        ('答案是叁元', '3'),
        ('答案是廿五', '25'),
        ('答案是卅', '30'),
        ('收拾了3个', '3'),
        ('在大陆住了5天', '5'),
        ('答案是|-3|', '3'),
    ],
)
def test_a_chinese_number_is_read_whole_or_not_at_all(text, expected):
    assert extract_chinese(text) == expected


@pytest.mark.parametrize(
    ('text', 'expected'),
    [
        # reasons, units and currencies
        ('The answer is 5, because 2+3=5.', '5'),
        ('The answer is 5 because 2+3=5.', '5'),
        ('The answer is $x+1$, since 2.', 'x+1'),
        ('The answer is x+1, because 2+3=5.', 'x+1'),
        ('The answer is 5, which is prime.', '5'),
        ('The answer is 5 (since 2+3=5).', '5'),
        ('The answer is 18€.', '18'),
        ('The answer is 18 元.', '18'),
        ('The answer is 18元，对。', '18'),
        ('The answer is €18.', '18'),
        ('The answer is 18 dollars in 3 days.', '18'),
        ('The answer is 1.5e-3.', '0.0015'),
        ('The answer is 3e8', '300000000'),
        ('The answer is $3\\times10^8$', '3\\times10^8'),
        ('The answer is 3 \\times 10^8.', '300000000'),
        ('The answer is 2 1/2.', '5/2'),
        ('The answer is 2½ cups', '5/2'),
        # choices, boxes, formulas
        ('The answer is (E) 15', '(E) 15'),
        ('so \\boxed{\\textbf{(E)}\\ 15}', '\\textbf{(E)}\\ 15'),
        ('The answer is (E).', '(E)'),
        ('so \\fbox{42}', '42'),
        ('so \\boxed {5}', '5'),
        ('so $\\boxed 5$.', '5'),
        ('Thus $x=\\frac{1+\\sqrt5}{2}$.', '\\frac{1+\\sqrt5}{2}'),
        ('Thus x = \\frac{1+\\sqrt5}{2}.', '\\frac{1+\\sqrt5}{2}'),
        ('The length is 2\\sqrt{3} units.', '2\\sqrt{3}'),
        ('It is $\\frac{\\pi}{4}$ in all', '\\frac{\\pi}{4}'),
        ('\\[ x = \\frac{-b}{2a} \\]', '\\frac{-b}{2a}'),
        ('There are 5 values of $x$.', '5'),
        ('costs $5 and $6.', '6'),
        ('The vertex is (3, 4).', '(3, 4)'),
        ('so $P(X=3)=\\frac18$', '\\frac18'),
        ('so $\\sum_{k=1}^{3} k = 6$', '6'),
        ('The answer is $5$ and $6$.', '5, 6'),
        ('The answer is $x=3$ or $x=5$.', 'x=3, x=5'),
        ('The answer is $18 and he saved $5.', '$18 and he saved $5'),
        ('The answer is 2x+3.', '2x+3'),
        ('The answer is 3i', '3i'),
        ('The answer is 2\\pi.', '2\\pi'),
        ('The answer is 5 feet 3 inches.', '5 feet 3 inches'),
        ('The answer is 18 dollars and 5 cents.', '18 dollars and 5 cents'),
        ('The answer is 10-20.', '10-20'),
        ('The answer is 3:4.', '3/4'),
        ('The answer is (3;4).', '(3;4)'),
        ('The answer is 50%.', '50%'),
        ('The answer is 45°.', '45'),
        ('The answer is 1, 2, 3.', '1, 2, 3'),
        ('The answer is 70\\,000.', '70,000'),
        ('The answer is 70 000 people.', '70,000'),
        ('it has 1,000 or\nso 1,200 members', '1,200'),
        ('\\begin{align*} x &= 3+5 \\\\ &= 8 \\end{align*}', '8'),
        ('\\[\\begin{aligned} x &= 3+5 \\\\ &= 2\\sqrt{8} \\end{aligned}\\]', '2\\sqrt{8}'),
        ('so $x = 5, y = 6$.', 'x = 5, y = 6'),
        ('so it is 5 - 3', '5 - 3'),
        ('therefore 3e8 m', '300000000'),
        ('hence -\\frac{3}{4}', '-3/4'),
        ('The answer is - 18.', '-18'),
        ('The answer is \\frac{3}{4}, since 1', '3/4'),
        ('The answer is 5 km.', '5'),
        ('The answer is 18 cm^2.', '18'),
        ('\\boxed{A} or 5', 'A'),
        ('so $y = 2x+3$', '2x+3'),
        ('so $x \\ge 5$.', 'x \\ge 5'),
        ('the interval is $[2, 5)$', '[2, 5)'),
        ('The answer is Paris, because 2.', 'Paris'),
        ('thus, $f(3) = 18\\text{ cm}$.', '18\\text{ cm}'),
        ('so 5 apples cost $18.50.', '18.50'),
        ('answer is\n\\boxed{7', '7'),
        ('The correct option is (C). It has 5.', '(C)'),
        ('Answer: `x+1`', 'x+1'),
    ],
)
def test_an_answer_in_mathematics_is_read_whole(text, expected):
    assert extract_math(text) == expected


def test_several_boxes():
    text = r'\boxed{1} and \fbox{2}, so \framebox{\boxed{3}}, \boxed{1}, \boxed{4'
    assert extract_math(text, boxes='all') == '1, 2, 3'
    assert extract_math(r'\boxed{1} and \boxed{2}') == '2'
    assert extract_math(r'no box but 5', boxes='all') == '5'
    with pytest.raises(ValueError, match="boxes is 'first': use 'last' or 'all'"):
        extract_math(text, boxes='first')


def test_a_formula_is_the_answer_that_it_equals():
    completion = r'Therefore $x=\frac{1+\sqrt5}{2}$.'
    (reward,) = math_answer([''], [completion], answer=[r'\frac{1+\sqrt5}{2}'])
    assert reward == 1.0
    (reward,) = math_answer([''], [completion], answer=['2'])
    assert reward == 0.0
    assert gsm8k_answer([''], [completion], answer=['2']) == [0.0]


@given(st.integers(0, 999), st.integers(1, 98), st.integers(0, 3), st.booleans())
def test_spellings_of_a_mixed_number_agree(whole, top, k, negative):
    fraction, sign = f'{top}/99', '-' if negative else ''
    expected = Fraction(whole * 99 + top, 99) * (-1 if negative else 1)
    spelling = [
        f'{sign}{whole} {fraction}',
        rf'{sign}{whole}\frac{{{top}}}{{99}}',
        rf'{sign}{whole}\,\dfrac{{{top}}}{{99}}',
        rf'{sign} {whole} \tfrac{{{top}}}{{99}}',
    ][k]
    for form in (r'\boxed{{{}}}', 'The answer is {}.', '#### {}', r'so it is $= {}$'):
        assert Fraction(extract_answer(form.format(spelling))) == expected


@given(st.decimals(1, 9, places=2), st.integers(-9, 9), st.integers(0, 4))
def test_spellings_of_a_power_of_ten_agree(value, k, spelling):
    text = [
        f'{value}e{k}',
        rf'{value} \times 10^{{{k}}}',
        rf'{value}\cdot10^{{{k}}}',
        f'{value} × 10^{k}',
        f'{value}*10**{k}',
    ][spelling]
    for form in (r'\boxed{{{}}}', 'The answer is {} m.', '#### {}', 'it is {}.'):
        assert Fraction(extract_answer(form.format(text))) == Fraction(value) * Fraction(10) ** k


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
