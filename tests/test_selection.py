"""Which completions are trained on, and pairs of preferences, by hand."""

import itertools

import numpy as np
import pytest

from grpo_jax.run.selection import DROPS, select_completions, select_pairs
from grpo_jax.types import Prompts, Rollout

LENGTH = 3


def make_rollout(index, group_size):
    """Tokens that name their prompt, completion and place."""
    index = np.array(index, np.int32)
    prompts = Prompts(np.stack([index, index], 1), np.full(len(index), 2, np.int32), index)
    shape = (len(index), group_size, LENGTH)
    rows = 100 * index[:, None, None] + 10 * np.arange(group_size)[None, :, None]
    tokens = (rows + np.arange(LENGTH)).astype(np.int32)
    return Rollout(prompts, tokens, np.ones(shape, bool), -tokens / 7, np.ones(shape[:2], bool))


# Rejected completions


TOTAL = np.array([[1.0, 0.0, 0.5], [-1.0, 2.0, 2.0]], np.float32)
TEXTS = ['a', 'b', 'a', 'a', 'c', 'c']  # the 'a' of another prompt is no duplicate
ENDED = np.array([[True, True, False], [False, True, True]])
KEPT = {
    'wrong': [[True, False, True], [False, True, True]],
    'duplicates': [[True, True, False], [True, True, False]],
    'truncated': ENDED,
}


@pytest.mark.parametrize('drop', [d for n in range(4) for d in itertools.combinations(DROPS, n)])
def test_dropped_completions(drop):
    rollout = make_rollout([0, 1], 3)._replace(ended=ENDED)
    kept, trained = select_completions(rollout, TEXTS, TOTAL, drop)
    assert kept.dtype == bool
    expected = np.logical_and.reduce([np.ones((2, 3), bool), *(KEPT[name] for name in drop)])
    np.testing.assert_array_equal(kept, expected)
    assert len(trained) == (kept.sum() if 'duplicates' in drop else 0)


def test_a_completion_is_trained_on_once_in_a_run():
    """By prompt and text; what was dropped for another reason was not trained on."""
    drop = ('wrong', 'duplicates')
    good, bad = np.ones((2, 2), np.float32), np.array([[1, 0], [1, 1]], np.float32)
    batches = [
        ([5, 6], ['a', 'b', 'a', 'a'], bad, [[1, 0], [1, 0]]),  # 'b' is wrong
        ([6, 5], ['a', 'c', 'b', 'a'], good, [[0, 1], [1, 0]]),
        ([5, 5], ['d', 'b', 'd', 'e'], good, [[1, 0], [0, 1]]),  # a prompt twice in a batch
        ([7, 5], ['', 'a', '', ''], good, [[1, 1], [1, 0]]),
    ]
    trained = frozenset()
    for index, texts, rewards, expected in batches:
        rollout = make_rollout(index, 2)
        before = trained
        kept, trained = select_completions(rollout, texts, rewards, drop, trained)
        np.testing.assert_array_equal(kept, np.array(expected, bool))
        assert len(trained) == len(before) + kept.sum()
        assert trained > before


def test_texts_that_are_no_unicode():
    texts = ['\ud800', '\ud800', '\ud801']
    rollout = make_rollout([0], 3)
    kept, _ = select_completions(rollout, texts, np.ones((1, 3), np.float32), ('duplicates',))
    assert kept.tolist() == [[True, False, True]]


# Pairs


@pytest.mark.parametrize(
    ('total', 'rows'),
    [
        ([[0.0, 1.0]], [[1, 0]]),  # the preferred one comes first
        ([[1.0, 0.0]], [[0, 1]]),
        ([[1.0, 1.0]], [[0, 1]]),  # no preference, but two different rows
        ([[0.5, 2.0, -1.0, 0.0]], [[1, 2]]),
        ([[0.0, 1.0, 1.0, 0.0]], [[1, 3]]),  # the first of the best, the last of the worst
        ([[3.0, 3.0, 3.0]], [[0, 2]]),
        ([[0.0, 1.0, 2.0], [2.0, 1.0, 0.0]], [[2, 0], [0, 2]]),
    ],
)
def test_pairs(total, rows):
    total = np.array(total, np.float32)
    rollout = make_rollout(range(5, 5 + len(total)), total.shape[1])
    rollout.ended[0, 0] = False
    pairs, rewards = select_pairs(rollout, total)
    assert pairs.prompts is rollout.prompts
    for group, pair in enumerate(rows):
        np.testing.assert_array_equal(rewards[group], total[group][pair])
        for name in ('tokens', 'mask', 'logprobs', 'ended'):
            ours, theirs = getattr(pairs, name)[group], getattr(rollout, name)[group][pair]
            np.testing.assert_array_equal(ours, theirs)
