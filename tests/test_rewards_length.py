"""Penalties on length, repetition and language: hand arithmetic."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from reward_cases import HOSTILE, one

from grpo_jax.rewards import language_mix, repetition, soft_overlong


@pytest.mark.parametrize(
    ('tokens', 'expected'),
    [
        (0, 0.0),
        (75, 0.0),
        (80, 0.0),
        (85, -0.25),
        (90, -0.5),
        (99, -0.95),
        (100, -1.0),
        (500, -1.0),
    ],
)
def test_soft_overlong_counts_tokens(tokens, expected):
    options = {'max_tokens': 100, 'cache_tokens': 20}
    result = soft_overlong(['p'], ['some text'], completion_ids=[[7] * tokens], **options)
    assert result == [pytest.approx(expected)]


@pytest.mark.parametrize(('most', 'cache'), [(10, 0), (10, 11), (0, 0), (10, -1)])
def test_soft_overlong_rejects_a_cache_that_does_not_fit(most, cache):
    with pytest.raises(ValueError, match=f'cache_tokens={cache} with max_tokens={most}'):
        soft_overlong([], [], completion_ids=[], max_tokens=most, cache_tokens=cache)


@pytest.mark.parametrize(
    ('ids', 'n', 'expected'),
    [
        ([1, 2, 1, 2, 1], 2, -0.5),
        ([1, 2, 3, 4], 2, 0.0),
        ([5] * 5, 1, -0.8),
        ([5] * 5, 4, -0.5),
        ([5] * 5, 5, 0.0),
        ([5] * 5, 6, 0.0),
        ([], 1, 0.0),
    ],
)
def test_repetition(ids, n, expected):
    assert one(repetition, 'x', completion_ids=ids) <= 0
    assert repetition([''], [''], completion_ids=[ids], n=n) == [pytest.approx(expected)]


def test_repetition_rejects_n():
    with pytest.raises(ValueError, match='n=0: n-grams have at least one token'):
        repetition([''], [''], completion_ids=[[]], n=0)


@given(st.lists(st.integers(0, 5), max_size=40), st.integers(1, 5))
def test_repetition_counts_every_gram_that_occurred_before(ids, n):
    grams = [tuple(ids[k : k + n]) for k in range(len(ids) - n + 1)]
    again = sum(gram in grams[:k] for k, gram in enumerate(grams))
    expected = -again / len(grams) if grams else 0.0
    assert repetition([''], [''], completion_ids=[ids], n=n) == [pytest.approx(expected)]


CHINESE = '小明有3个苹果，一共有多少个？'
ENGLISH = 'How many apples are there?'


@pytest.mark.parametrize(
    ('question', 'completion', 'expected'),
    [
        (CHINESE, '一共有三个', 0.0),
        (CHINESE, '一共有3个，答案是 $\\text{three} = 3$，即\\boxed{3}', 0.0),
        (CHINESE, 'x + ab = 3 cm', 0.0),  # variables and units are in no language
        (CHINESE, '<think>三</think><answer>3</answer>', 0.0),
        (CHINESE, '', 0.0),
        (CHINESE, 'there are three', -1.0),
        (CHINESE, '苹果 apples and more', -0.6),
        (ENGLISH, 'there are three', 0.0),
        (ENGLISH, 'there are 三个', -0.5),
        (ENGLISH, '三个', -1.0),
        ('1 + 1 = ?', 'two', None),
    ],
)
def test_language_mix(question, completion, expected):
    result = one(language_mix, completion, question)
    assert result == (expected if expected is None else pytest.approx(expected))


def test_language_of_the_question_not_of_the_template():
    prompt = f'User: {CHINESE}\n' + 'Please reason step by step, and put the answer in a box. ' * 2
    assert one(language_mix, '三个', prompt) == -1.0
    assert one(language_mix, '三个', prompt, question=CHINESE) == 0.0


def test_language_by_option():
    assert language_mix([ENGLISH], ['三个'], script='chinese') == [0.0]
    assert language_mix([CHINESE], ['三个'], script='latin') == [-1.0]
    with pytest.raises(ValueError, match="script='greek': use one of question, chinese, latin"):
        language_mix([], [], script='greek')


EXTRA = [
    '$' * 200_000,
    '```' * 60_000,
    '\\(' * 100_000,
    '\\(a' * 60_000,
    '<a' * 100_000,
    'é' * 200_000,
]


@pytest.mark.parametrize('text', [text for _, text in HOSTILE] + EXTRA, ids=lambda text: text[:8])
def test_hostile_text_ends(text):
    assert -1 <= one(language_mix, text, CHINESE) <= 0
