"""Arithmetic chains: hand cases and random problems."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from reward_cases import HOSTILE, PROMPT, RIGHT, one

from grpo_jax.rewards import Step, arithmetic_steps, chain_format, check_steps, exact_answer


def rights(prompt, completion):
    return [step.right for step in check_steps(prompt, completion)]


@pytest.mark.parametrize(
    ('completion', 'answer', 'expected'),
    [
        (RIGHT, '116', 1.0),
        (RIGHT, 116, 1.0),
        (RIGHT, np.int64(116), 1.0),
        (RIGHT + ' \n', ' 116', 1.0),
        ('37+58=85;85+21=106', '116', 0.0),
        ('nonsense=116', '116', 1.0),  # only the final answer counts
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
def test_exact_answer_rejects_a_column_without_whole_numbers(answer):
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
    """A prompt, its numbers and symbols, and its running results."""
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

    def share(written_steps):
        return one(arithmetic_steps, ';'.join(written_steps), prompt)

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
    correct = rights(prompt, text)
    assert one(arithmetic_steps, text, prompt) == sum(correct) / len(symbols) <= 1
    assert not any(correct[len(symbols) :])
    assert all(0 <= s.start < s.end <= len(text) for s in check_steps(prompt, text))


@pytest.mark.parametrize('text', [text for _, text in HOSTILE], ids=[name for name, _ in HOSTILE])
def test_hostile_text_ends(text):
    assert 0 <= one(arithmetic_steps, text, PROMPT) <= 1
    one(arithmetic_steps, RIGHT, text)
    assert one(exact_answer, text, PROMPT, answer='116') == 0.0
