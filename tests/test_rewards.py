"""Rewards: hand cases, round trips over random problems, every error, and real GSM8K answers."""

import asyncio
import json
import os
from decimal import Decimal
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from grpo_jax import rewards
from grpo_jax.rewards import (
    RewardError,
    Step,
    arithmetic_steps,
    chain_format,
    check_steps,
    exact_answer,
    extract_answer,
    gsm8k_answer,
    hash_format,
    normalize_number,
    resolve,
    score,
    statistics,
    think_format,
)

PROMPT = '37+58+21='
RIGHT = '37+58=95;95+21=116'


def one(reward, completion, prompt='', **columns):
    """The reward of a single row."""
    (value,) = reward([prompt], [completion], **{name: [v] for name, v in columns.items()})
    return value


def rights(prompt, completion):
    return [step.right for step in check_steps(prompt, completion)]


# Arithmetic chains


@pytest.mark.parametrize(
    ('completion', 'answer', 'expected'),
    [
        (RIGHT, '116', 1.0),
        (RIGHT, 116, 1.0),
        (RIGHT, np.int64(116), 1.0),
        (RIGHT + ' \n', ' 116', 1.0),
        ('37+58=85;85+21=106', '116', 0.0),
        ('nonsense=116', '116', 1.0),  # only the final answer is judged
        ('5-9=-4', '-4', 1.0),
        ('116', '116', 0.0),
        ('', '116', 0.0),
        (RIGHT + ';', '116', 0.0),
        ('95+21=0116', '116', 0.0),
        ('95+21=1 16', '116', 0.0),
    ],
)
def test_exact_answer(completion, answer, expected):
    assert one(exact_answer, completion, PROMPT, answer=answer) == expected


@pytest.mark.parametrize('answer', ['', 'x', '1.5', '007', None, True])
def test_exact_answer_refuses_a_column_without_whole_numbers(answer):
    with pytest.raises(ValueError, match=r'column answer, row 1: .* not a whole number'):
        exact_answer(['', ''], ['', ''], answer=['1', answer])


@pytest.mark.parametrize(
    ('prompt', 'completion', 'expected', 'share'),
    [
        (PROMPT, RIGHT, [True, True], 1.0),
        (PROMPT, '37+58=85;85+21=106', [False, True], 0.5),  # a dropped carry, then consistent
        (PROMPT, '37+58=85;95+21=116', [False, False], 0.0),  # does not follow from the 85
        (PROMPT, '37+58=95;95+21=115', [True, False], 0.5),
        (PROMPT, '37+58=95', [True], 0.5),  # omitted
        (PROMPT, '95+21=116', [False], 0.0),
        (PROMPT, '37+58=95;37+58=95;95+21=116', [True, False, False], 0.5),  # added
        (PROMPT, RIGHT + ';116+0=116', [True, True, False], 1.0),
        (PROMPT, '37+57=94;94+21=115', [False, True], 0.5),  # another operand than the prompt's
        (PROMPT, '58+37=95;95+21=116', [False, True], 0.5),  # another order
        (PROMPT, '37-58=-21;-21+21=0', [False, True], 0.5),  # another operation
        (PROMPT, 'hm;95+21=116', [False, False], 0.0),
        ('0+5+5=', 'hm;0+5=5', [False, False], 0.0),  # a malformed step states no result
        (PROMPT, ' 37+58=95 ;; 95+21=116 ', [True, True], 1.0),
        (PROMPT, '37+58=095;95+21=116', [False, False], 0.0),
        (PROMPT, '', [], 0.0),
        ('5-9-3=', '5-9=-4;-4-3=-7', [True, True], 1.0),
        ('5--9*-2=', '5--9=14;14*-2=-28', [True, True], 1.0),
        ('2+3*4=', '2+3=5;5*4=20', [True, True], 1.0),  # left to right
        ('2+3*4=', '3*4=12;2+12=14', [False, False], 0.0),
        ('7*8=', '7*8=56', [True], 1.0),
    ],
)
def test_arithmetic_steps(prompt, completion, expected, share):
    assert rights(prompt, completion) == expected
    assert one(arithmetic_steps, completion, prompt) == share


@pytest.mark.parametrize('prompt', ['', '37', '37=', '37+58', '37+x=', '37+058=', 'What is 1+1=?'])
def test_arithmetic_steps_do_not_apply_to_other_prompts(prompt):
    assert check_steps(prompt, RIGHT) is None
    assert one(arithmetic_steps, RIGHT, prompt) is None


def test_spans_of_steps():
    completion = '37+58=95; 95+21=116 ;;x'
    steps = check_steps(PROMPT, completion)
    assert steps == [Step(0, 8, True), Step(10, 19, True), Step(22, 23, False)]
    assert [completion[s.start : s.end] for s in steps] == ['37+58=95', '95+21=116', 'x']


@st.composite
def chains(draw):
    """A prompt, the numbers and symbols behind it, and its running results."""
    count = draw(st.integers(2, 5))
    numbers = draw(st.lists(st.integers(-99, 99), min_size=count, max_size=count))
    symbols = draw(st.lists(st.sampled_from('+-*'), min_size=count - 1, max_size=count - 1))
    prompt = str(numbers[0])
    results = [numbers[0]]
    for symbol, number in zip(symbols, numbers[1:], strict=True):
        prompt += f'{symbol}{number}'
        a = results[-1]
        results.append({'+': a + number, '-': a - number, '*': a * number}[symbol])
    return prompt + '=', numbers, symbols, results


def written(numbers, symbols, lefts, results):
    """The step texts: lefts[k] symbols[k] numbers[k + 1] = results[k]."""
    rows = zip(lefts, symbols, numbers[1:], results, strict=True)
    return [f'{left}{symbol}{number}={result}' for left, symbol, number, result in rows]


@given(chains(), st.data())
def test_random_chains(chain, data):
    prompt, numbers, symbols, results = chain
    steps = written(numbers, symbols, results[:-1], results[1:])
    n = len(steps)
    k = data.draw(st.integers(0, n - 1), label='step that changes')

    def share(some):
        return one(arithmetic_steps, ';'.join(some), prompt)

    assert rights(prompt, ';'.join(steps)) == [True] * n
    assert share(steps) == 1.0
    assert one(exact_answer, ';'.join(steps), prompt, answer=results[-1]) == 1.0
    assert one(chain_format, ';'.join(steps), prompt) == 1.0
    # Truncation loses exactly the steps that are missing, and no number of additions wins any.
    assert share(steps[:k]) == k / n
    extra = data.draw(st.sampled_from([*steps, '1+1=2', 'x', f'{results[-1]}+0={results[-1]}']))
    assert share([*steps, extra, extra]) == 1.0
    assert k / n <= share([*steps[:k], 'x', *steps[k:]]) <= (n - 1) / n
    # One slip: wrong alone if carried on, and the next step too if the text returns to the truth.
    slipped = results[k + 1] + data.draw(st.integers(-9, 9).filter(bool), label='slip')
    alone = [*steps[:k], f'{steps[k].rpartition("=")[0]}={slipped}', *steps[k + 1 :]]
    assert rights(prompt, ';'.join(alone)) == [j not in (k, k + 1) for j in range(n)]
    carried = [*results[: k + 1], slipped]
    for symbol, number in zip(symbols[k + 1 :], numbers[k + 2 :], strict=True):
        a = carried[-1]
        carried.append({'+': a + number, '-': a - number, '*': a * number}[symbol])
    carried = written(numbers, symbols, carried[:-1], carried[1:])
    assert rights(prompt, ';'.join(carried)) == [j != k for j in range(n)]
    assert share(carried) == (n - 1) / n


@given(chains(), st.text('0123456789+-*=; ', max_size=60))
def test_any_text_scores_a_share_of_the_needed_steps(chain, text):
    prompt, _, symbols, _ = chain
    verdicts = rights(prompt, text)
    assert one(arithmetic_steps, text, prompt) == sum(verdicts) / len(symbols) <= 1
    assert not any(verdicts[len(symbols) :])
    assert all(0 <= s.start < s.end <= len(text) for s in check_steps(prompt, text))


# Numbers and answers


@pytest.mark.parametrize(
    ('text', 'expected'),
    [
        ('18', '18'),
        (' 1,000 ', '1000'),
        ('1,234,567.50', '1234567.5'),
        ('$1,000.50.', '1000.5'),
        ('-$5', '-5'),
        ('$-5', '-5'),
        ('\\$5', '5'),
        ('$18$', '18'),
        ('50%', '50'),
        ('50\\%.', '50'),
        ('+7', '7'),
        ('−7', '-7'),
        ('007', '7'),
        ('-0.0', '0'),
        ('.5', '0.5'),
        ('0.125', '0.125'),
        ('1/2', '0.5'),
        ('-3/8', '-0.375'),
        ('6/3', '2'),
        ('2/6', '1/3'),
        ('1.5/4', '0.375'),
        ('\\frac{1}{2}', '0.5'),
        ('-\\dfrac{2}{6}', '-1/3'),
        ('\\tfrac{1}{4}', '0.25'),
        ('2\\frac{1}{2}', None),
        ('10{,}000', '10000'),
        ('1,\\!000', '1000'),
        ('1,2', None),
        ('1,0001', None),
        ('1000,000', None),
        ('1/0', None),
        ('1.2.3', None),
        ('1 2', None),
        ('18 eggs', None),
        ('٣', None),
        ('.', None),
        ('', None),
        ('1' * 101, None),
    ],
)
def test_normalize_number(text, expected):
    assert normalize_number(text) == expected


@given(st.decimals(-(10**12), 10**12, places=4), st.sampled_from(['{:,}', '{}', '{:,}.', '{}%']))
def test_spellings_of_a_decimal_agree(value, spelling):
    canonical = normalize_number(spelling.format(value))
    assert Decimal(canonical) == value
    assert canonical == normalize_number(canonical)
    assert not ('.' in canonical and canonical.endswith('0'))


@given(st.integers(-999, 999), st.integers(1, 999), st.integers(1, 99))
def test_equal_fractions_have_one_spelling(p, q, factor):
    canonical = normalize_number(f'{p}/{q}')
    assert Fraction(canonical) == Fraction(p, q)
    assert canonical == normalize_number(f'{p * factor}/{q * factor}')


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
    ],
)
def test_extract_answer(text, expected):
    assert extract_answer(text) == expected


@given(st.integers(-(10**9), 10**9), st.text('abc 0123456789.,$=-', max_size=30))
def test_extract_answer_finds_a_marked_number_behind_any_text(number, before):
    for form in ('\n#### {:,}', ' \\boxed{{{}}}', ' The answer is {}.', ' or ${:,}.00'):
        assert extract_answer(before + form.format(number)) == str(number)


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


def test_gsm8k_answer_compares_to_the_last_number_behind_hashes():
    assert one(gsm8k_answer, '18', answer='#### 3\n#### 18') == 1.0


@pytest.mark.parametrize('answer', ['18', '#### many', ''])
def test_gsm8k_answer_does_not_apply_without_a_reference_number(answer):
    assert one(gsm8k_answer, '#### 18', answer=answer) is None


@pytest.mark.parametrize(('split', 'rows'), [('train', 7473), ('test', 1319)])
def test_gsm8k_reference_answers(split, rows):
    folder = Path(os.environ.get('GRPO_JAX_DATA_DIR', ''))
    file = folder / 'gsm8k' / f'{split}.jsonl'
    if not file.is_file():
        pytest.skip(f'real data absent: GRPO_JAX_DATA_DIR should hold gsm8k/{split}.jsonl')
    answers = [json.loads(line)['answer'] for line in file.read_text().splitlines()]
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


# Formats


@pytest.mark.parametrize(
    ('completion', 'expected'),
    [
        (RIGHT, 1.0),
        ('1+1=3', 1.0),  # the form only
        (f' {RIGHT}\n', 1.0),
        ('-4--3=-1', 1.0),
        (RIGHT + ';', 0.0),
        ('1+1=2; 2+2=4', 0.0),
        ('1+1=02', 0.0),
        ('1+1=-0', 0.0),
        ('1+1', 0.0),
        ('1+1+1=3', 0.0),
        ('1/1=1', 0.0),
        ('', 0.0),
    ],
)
def test_chain_format(completion, expected):
    assert one(chain_format, completion) == expected


@pytest.mark.parametrize(
    ('completion', 'expected'),
    [
        ('9*2=18\n#### 18', 1.0),
        ('#### -1,000\n', 1.0),
        ('x #### 18', 0.0),
        ('####18', 0.0),
        ('##### 18', 0.0),
        ('#### 18 eggs', 0.0),
        ('#### 18\nmore', 0.0),
        ('#### 17\n#### 18', 0.0),
        ('18', 0.0),
        ('', 0.0),
    ],
)
def test_hash_format(completion, expected):
    assert one(hash_format, completion) == expected


@pytest.mark.parametrize(
    ('completion', 'expected'),
    [
        ('<think>hm</think><answer>18</answer>', 1.0),
        (' <think>\nhm\n</think>\n<answer>\n18\n</answer>\n', 1.0),
        ('<think>hm</think> so <answer>18</answer>', 0.0),
        ('<think>hm</think><answer>18</answer>!', 0.0),
        ('Well <think>hm</think><answer>18</answer>', 0.0),
        ('<think> </think><answer>18</answer>', 0.0),
        ('<think>hm</think><answer></answer>', 0.0),
        ('<think>hm</think>', 0.0),
        ('<think>a</think><think>b</think><answer>18</answer>', 0.0),
        ('<answer>18</answer><think>hm</think>', 0.0),
        ('<think>hm<answer>18</answer></think>', 0.0),
        ('<think>hm<answer></think>18</answer>', 0.0),
        ('', 0.0),
    ],
)
def test_think_format(completion, expected):
    assert one(think_format, completion, 'Q') == expected


def test_think_format_behind_a_prompt_that_opens_the_thought():
    assert one(think_format, 'hm</think><answer>18</answer>', 'Assistant: <think>\n') == 1.0
    assert one(think_format, '<think>hm</think><answer>18</answer>', '<think>\n') == 0.0


# Hostile text: each would run for hours or overflow where matching backtracks or restarts


HOSTILE = [
    ('digits', '7' * 200_000),
    ('spaces', ' ' * 200_000),
    ('hashes', '#' * 200_000),
    ('minus signs', '-' * 200_000),
    ('braces', '\\boxed{' + '{' * 200_000),
    ('boxes', '\\boxed{' * 30_000),
    ('boxes with numbers', '\\boxed{1}' * 20_000),
    ('thousands', '1' + ',000' * 50_000 + '0'),
    ('commas', '1,' * 100_000),
    ('dots', '1.' * 100_000),
    ('divisions', '1/' * 100_000),
    ('zero divisors', '1/0 ' * 50_000),
    ('fractions', '\\frac{1' * 30_000),
    ('fraction', '\\frac{' + '1' * 200_000),
    ('marker and spaces', '####' + ' ' * 200_000 + 'x'),
    ('markers', '#### ' * 40_000),
    ('markers with numbers', '#### 1,0001 ' * 15_000),
    ('phrases', 'answer is ' * 20_000),
    ('phrase and filler', 'answer is' + '$*( ' * 50_000),
    ('semicolons', ';' * 200_000),
    ('equals signs', '=' * 200_000),
    ('steps', '37+58=95;' * 20_000),
    ('half a step', '37+' * 60_000),
    ('long result', '37+58=' + '9' * 200_000 + ';' + '9' * 200_000 + '+21=1'),
    ('long product', '9' * 100_000 + '*' + '9' * 100_000 + '='),
    ('tags', '<think>' * 30_000),
    ('closing tags', '<think>' + '</think>' * 25_000 + '<answer>'),
]


@pytest.mark.parametrize('text', [text for _, text in HOSTILE], ids=[name for name, _ in HOSTILE])
def test_hostile_text_ends(text):
    for reward in (arithmetic_steps, chain_format, hash_format, think_format):
        assert 0 <= one(reward, text, PROMPT) <= 1
        one(reward, RIGHT, text)
    assert one(exact_answer, text, PROMPT, answer='116') == 0.0
    assert one(gsm8k_answer, text, answer='#### 116') == 0.0
    assert one(gsm8k_answer, '1', answer='####' + text) in (None, 0.0)
    assert one(gsm8k_answer, '1', answer=text) in (None, 0.0)


@given(st.text('#$%*-.,/0179 {}\\boxedfracansweris', max_size=80))
def test_whatever_is_extracted_is_in_canonical_spelling(text):
    found = extract_answer(text)
    assert found is None or (normalize_number(found) == found and str(Fraction(found)))


# Finding rewards by name


def test_resolve_built_in_and_paths():
    assert resolve('exact_answer') is exact_answer
    assert resolve('grpo_jax.rewards:exact_answer') is exact_answer
    assert resolve('grpo_jax.rewards.math.gsm8k_answer') is gsm8k_answer
    assert resolve('math:gcd') is not None


def test_every_reward_of_the_package_is_built_in():
    names = [name for name in rewards.__all__ if name.endswith(('answer', 'steps', 'format'))]
    helpers = {'extract_answer', 'check_steps'}
    assert [resolve(name).__name__ for name in names if name not in helpers] == [
        'arithmetic_steps',
        'chain_format',
        'exact_answer',
        'gsm8k_answer',
        'hash_format',
        'think_format',
    ]


@pytest.mark.parametrize(
    ('name', 'message'),
    [
        ('exct_answer', r"unknown reward 'exct_answer', did you mean 'exact_answer'\?"),
        ('extract_answer', r"unknown reward 'extract_answer', did you mean 'exact_answer'\?"),
        ('gsm8k', r"did you mean 'gsm8k_answer'\?.*package.module:function"),
        ('score', 'unknown reward'),
        ('math', 'unknown reward'),
        ('', 'unknown reward'),
        ('grpo_jax.no_such:f', 'importing grpo_jax.no_such raised ModuleNotFoundError'),
        ('grpo_jax.rewards:exct_answer', "has no 'exct_answer', did you mean 'exact_answer'"),
        ('grpo_jax.rewards:__doc__', 'cannot be called'),
        ('grpo_jax.rewards:', 'not of the form'),
        ('.rewards.f', 'not of the form'),
        ('a:b:c', 'not of the form'),
    ],
)
def test_resolve_errors(name, message):
    with pytest.raises(RewardError, match=message):
        resolve(name)


# Scores


def run(functions, weights=None, n=2, **kwargs):
    arguments = {
        'prompts': [f'p{i}' for i in range(n)],
        'completions': [f'c{i}' for i in range(n)],
        'columns': {'answer': [str(i) for i in range(n)]},
    }
    weights = dict.fromkeys(functions, 1.0) if weights is None else weights
    return score(functions, weights, **{**arguments, **kwargs})


def constant(*values):
    return lambda **_: list(values)


def test_score_adds_weighted_parts_over_the_functions_that_apply():
    functions = {'a': constant(1.0, None, 3), 'b': constant(True, 5, None)}
    scores = run(functions, {'a': 2, 'b': -0.5}, 3)
    np.testing.assert_array_equal(scores.total, np.array([1.5, -2.5, 6], np.float32))
    np.testing.assert_array_equal(scores.parts['a'], np.array([1, np.nan, 3], np.float32))
    np.testing.assert_array_equal(scores.parts['b'], np.array([1, 5, np.nan], np.float32))
    assert scores.total.dtype == scores.parts['a'].dtype == np.float32
    assert list(scores.parts) == ['a', 'b']


def test_statistics_over_rows_that_apply():
    parts = {'a': np.array([1, np.nan, 3], np.float32), 'none': np.full(3, np.nan, np.float32)}
    metrics = statistics(rewards.Scores(np.zeros(3, np.float32), parts))
    assert metrics == {'rewards/a/mean': 2.0, 'rewards/a/std': 1.0}
    assert all(type(value) is float for value in metrics.values())


def test_score_of_no_rows():
    scores = run({'a': constant()}, n=0)
    assert scores.total.shape == scores.parts['a'].shape == (0,)
    assert statistics(scores) == {}


@pytest.mark.parametrize(
    'returned',
    [(0.5, 2), np.array([0.5, 2]), np.array([0.5, 2], np.float32), [np.float32(0.5), np.array(2)]],
)
def test_score_takes_lists_tuples_and_arrays(returned):
    np.testing.assert_array_equal(run({'a': lambda **_: returned}).total, [0.5, 2])


def test_functions_of_the_trl_form_run_unmodified():
    def overlong(completion_ids, **kwargs):
        return [min(0.0, (2 - len(ids)) / 2) for ids in completion_ids]

    def names_its_column(completions, answer, **kwargs):
        return [float(c.endswith(a)) for c, a in zip(completions, answer, strict=True)]

    class Instance:
        def __call__(self, prompts, completions, completion_ids, **kwargs):
            assert sorted(kwargs) == ['answer', 'level']
            return [None if level == 'hard' else 1.0 for level in kwargs['level']]

    scores = run(
        {'overlong': overlong, 'column': names_its_column, 'instance': Instance()},
        columns={'answer': ['0', 'x'], 'level': ['easy', 'hard']},
        completion_ids=[[5, 6, 7], [5]],
    )
    np.testing.assert_array_equal(scores.total, [-0.5 + 1 + 1, 0 + 0])


def test_completion_ids_are_left_out_where_there_are_none():
    run({'a': lambda prompts, completions, answer: [1, 2]})
    with pytest.raises(RewardError, match='called with prompts, completions, answer, raised TypeE'):
        run({'a': lambda completion_ids, **_: [1, 2]})


def test_a_function_cannot_change_what_another_one_sees():
    def vandal(prompts, completions, answer):
        completions.clear()
        answer[0] = 'x'
        return [0, 0]

    def reader(prompts, completions, answer):
        return [float(completions == ['c0', 'c1']), float(answer == ['0', '1'])]

    np.testing.assert_array_equal(run({'v': vandal, 'r': reader}).total, [1, 1])


def test_async_functions_run_together_even_inside_an_event_loop():
    async def whole():
        # Each waits for the other, so neither could end if they ran one after the other.
        state = {}

        def waiting(mine, other):
            async def reward(completions, **_):
                state[mine] = True
                while other not in state:
                    await asyncio.sleep(0)
                return [1.0] * len(completions)

            return reward

        functions = {'a': waiting('a', 'b'), 'sync': constant(1, 2), 'b': waiting('b', 'a')}
        return run(functions, {'a': 1, 'sync': 10, 'b': 100})

    scores = asyncio.run(whole())
    np.testing.assert_array_equal(scores.total, [111, 121])
    assert list(scores.parts) == ['a', 'sync', 'b']


async def async_failure(**_):
    raise KeyError('gone')


async def async_narrow(prompts):
    return [1, 2]


def failure(**_):
    raise KeyError('gone')


@pytest.mark.parametrize(
    ('function', 'message'),
    [
        (failure, "reward 'bad'.* raised KeyError: 'gone'"),
        (async_failure, "reward 'bad'.* raised KeyError: 'gone'"),
        (async_narrow, "reward 'bad'.* raised TypeError: .*unexpected keyword"),
        (constant(1), "reward 'bad' returned 1 values for 2 completions"),
        (constant(1, 2, 3), "reward 'bad' returned 3 values for 2 completions"),
        (constant(), "reward 'bad' returned 0 values"),
        (lambda **_: None, "reward 'bad' returned None, a NoneType"),
        (lambda **_: 1.0, "reward 'bad' returned 1.0, a float"),
        (lambda **_: np.array(1.0), "reward 'bad' returned array.* a ndarray"),
        (lambda **_: {0: 1.0, 1: 2.0}, "reward 'bad' returned {0: 1.0, 1: 2.0}, a dict"),
        (lambda **_: '12', "reward 'bad' returned '12', a str"),
        (lambda **_: iter([1, 2]), "reward 'bad' returned <list_iterator"),
        (constant(1, 'x'), "reward 'bad' returned 'x' for row 1 .prompt 'p1', completion 'c1'"),
        (constant(float('nan'), 1), "reward 'bad' returned nan for row 0"),
        (constant(1, -np.inf), "reward 'bad' returned -inf for row 1"),
        (lambda **_: np.array([1, np.nan]), "reward 'bad' returned nan for row 1"),
        (constant(1e39, 1), "reward 'bad' returned 1e[+]39 for row 0"),
        (constant(10**400, 1), "reward 'bad' returned 1000.* for row 0"),
        (constant(1, [2]), "reward 'bad' returned .2. for row 1"),
        (lambda **_: np.ones((2, 1)), r"reward 'bad' returned \[1.0\] for row 0"),
        (constant(1j, 1), "reward 'bad' returned 1j for row 0"),
        (constant(None, None), '2 of 2 rows have no reward, first row 0 .*: bad returned None'),
    ],
)
def test_score_names_the_function_that_is_wrong(function, message):
    with pytest.raises(RewardError, match=message):
        run({'bad': function})


def test_score_names_the_row_without_a_reward():
    with pytest.raises(RewardError, match=r"1 of 2 rows .* row 1 \(prompt 'p1'.*: a, b return"):
        run({'a': constant(1, None), 'b': constant(None, None)})


@pytest.mark.parametrize(
    ('weights', 'message'),
    [
        ({}, r"\['a'\] and weights \[\] differ"),
        ({'a': 1, 'b': 1}, r"weights \['a', 'b'\] differ"),
        ({'a': float('nan')}, "weight of reward 'a' is nan"),
        ({'a': '1'}, "weight of reward 'a' is '1'"),
        ({'a': 3e38}, 'weighted sum for row 1 .* does not fit float32'),
    ],
)
def test_score_refuses_weights(weights, message):
    with pytest.raises(RewardError, match=message):
        run({'a': constant(1, 2)}, weights)


@pytest.mark.parametrize(
    ('kwargs', 'message'),
    [
        ({'completions': ['c']}, 'completions has 1 rows, prompts 2'),
        ({'columns': {'answer': ['1', '2', '3']}}, 'answer has 3 rows, prompts 2'),
        ({'completion_ids': [[1]]}, 'completion_ids has 1 rows, prompts 2'),
        ({'columns': {'prompts': ['1', '2']}}, "column 'prompts' is the name of a reward argument"),
        ({'columns': {'completion_ids': [[1], [2]]}}, "column 'completion_ids' is the name"),
    ],
)
def test_score_refuses_inputs_that_do_not_fit(kwargs, message):
    with pytest.raises(RewardError, match=message):
        run({'a': constant(1, 2)}, **kwargs)


def test_score_without_functions():
    with pytest.raises(RewardError, match='no reward functions'):
        run({})
