"""Generated answers: no wrong one is accepted, right ones are accepted in any spelling.

The default suite checks a sample of each kind. The full proof, some 30,000 wrong and 30,000 right
pairs, takes a quarter of an hour on two cores:
    GRPO_JAX_DATA_DIR=… pytest -m slow tests/test_rewards_generated_pairs.py
"""

import pytest
from answer_generators import differ, generated_pairs
from reference_pairs import Unreadable, read, right_pairs, wrong_pairs
from reward_cases import real

from grpo_jax.rewards.verify.equivalence import equivalent_pairs
from grpo_jax.rewards.verify.extraction import last_boxed


def misjudged(pairs, right):
    results = equivalent_pairs([pair[-2:] for pair in pairs], seconds=30.0)
    return [pair for pair, same in zip(pairs, results, strict=True) if same is not right]


def references():
    return [last_boxed(row['solution']) for row in real('math/test.jsonl')]


def test_wrong_answers_are_refused():
    assert misjudged(generated_pairs(250, right=False, seed=1), False) == []


def test_right_answers_are_accepted():
    assert misjudged(generated_pairs(250, right=True, seed=1), True) == []


def test_changed_references_are_refused():
    assert misjudged(wrong_pairs(references(), 200, seed=1), False) == []


def test_rewritten_references_are_accepted():
    assert misjudged(right_pairs(references(), 200, seed=1), True) == []


@pytest.mark.slow
def test_all_wrong_answers_are_refused():
    assert misjudged(generated_pairs(20_000, right=False), False) == []


@pytest.mark.slow
def test_all_right_answers_are_accepted():
    assert misjudged(generated_pairs(20_000, right=True), True) == []


@pytest.mark.slow
def test_all_changed_references_are_refused():
    assert misjudged(wrong_pairs(references(), 10_000), False) == []


@pytest.mark.slow
def test_all_rewritten_references_are_accepted():
    assert misjudged(right_pairs(references(), 10_000), True) == []


# The generators themselves


def test_generated_pairs_are_the_same_every_time():
    assert generated_pairs(50, right=True) == generated_pairs(50, right=True)
    assert generated_pairs(50, right=False) != generated_pairs(50, right=False, seed=7)
    kinds = {kind for kind, _, _ in generated_pairs(400, right=False)}
    assert len(kinds) == 14


def test_trees_have_the_values_of_arithmetic():
    one, x = ('num', 1), ('var', 'x')
    assert differ(('add', [x, one]), ('mul', [x, one]))
    assert not differ(('pow', ('add', [x, one]), 2), ('mul', [('add', [one, x])] * 2))
    assert differ(('pow', x, 100), ('add', [('pow', x, 100), one]))


@pytest.mark.parametrize(
    ('text', 'kind', 'values'),
    [
        (r'\frac{1}{2}+3', 'value', [3.5]),
        (r'2^{10}-\sqrt{16}', 'value', [1020]),
        (r'\left(1, \tfrac12\right]', '(]', [1, 0.5]),
        (r'\begin{pmatrix} 1 & -2 \\ 3 & 4 \end{pmatrix}', 'matrix [2, 2]', [1, -2, 3, 4]),
        (r'-2(3)/4', 'value', [-1.5]),
    ],
)
def test_reader_of_references(text, kind, values):
    assert read(text) == (kind, values)


@pytest.mark.parametrize('text', [r'\text{red}', r'2\frac{1}{2}', '1 2', 'x=5', r'\frac{1}{0}'])
def test_reader_refuses_what_it_may_misread(text):
    with pytest.raises(Unreadable):
        read(text)
