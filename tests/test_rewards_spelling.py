"""The passes that rewrite spellings: every rewrite does what its example says."""

import pytest
from answer_pairs import RIGHT, WRONG

from grpo_jax.rewards.verify.spelling import PASSES, one_spelling, plain_characters

REWRITES = [(name, rewrite) for name, rewrites in PASSES.items() for rewrite in rewrites]
IDS = [f'{name}: {rewrite.before}' for name, rewrite in REWRITES]


@pytest.mark.parametrize(('name', 'rewrite'), REWRITES, ids=IDS)
def test_every_example(name, rewrite):
    assert rewrite(rewrite.before) == rewrite.after


@pytest.mark.parametrize(('name', 'rewrite'), REWRITES, ids=IDS)
def test_text_before_and_after_have_one_spelling(name, rewrite):
    assert one_spelling(rewrite.before).split() == one_spelling(rewrite.after).split()


@pytest.mark.parametrize(('name', 'rewrite'), REWRITES, ids=IDS)
def test_every_match_contains_what_the_rewrite_needs(name, rewrite):
    texts = {text for pair in RIGHT + WRONG for text in pair}
    without = [text for text in texts if rewrite.needs not in text]
    assert [text for text in without if rewrite.pattern.search(text)] == []


def test_every_example_is_another():
    assert len({rewrite.before for _, rewrite in REWRITES}) == len(REWRITES)


@pytest.mark.parametrize(
    ('text', 'expected'),
    [
        ('3，500', '3,500'),
        ('3，5', '3, 5'),
        ('x≤½', r'x\le \frac{1}{2}'),
        ('ℤ', r'\mathbb{Z}'),
    ],
)
def test_plain_characters(text, expected):
    assert plain_characters(text) == expected


def test_a_line_break_separates_values_outside_of_environments():
    assert one_spelling(r'x=1\\y=2') == 'x=1, y=2'
    assert one_spelling(r'\begin{cases}1\\2\end{cases}') == r'\begin{cases}1\\2\end{cases}'
