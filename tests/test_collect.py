"""What a step learns from: refilled groups, dropped rows and pairs, against plain loops."""

import itertools

import numpy as np
import pytest

from grpo_jax import collect, rewards
from grpo_jax.judging import Judged
from grpo_jax.types import Prompts, Rollout
from grpo_jax.verdicts import Verdict

GROUP, LENGTH = 2, 3
DIFFERENT, EQUAL = (0.0, 1.0), (1.0, 1.0)


def make_prompts(index):
    index = np.array(index, np.int32)
    tokens = np.stack([index, index], 1)
    return Prompts(tokens, np.full(len(index), 2, np.int32), index)


def draw(prompts, group_size=GROUP):
    """Tokens that name their prompt, completion and place."""
    shape = (len(prompts.index), group_size, LENGTH)
    rows = 100 * prompts.index[:, None, None] + 10 * np.arange(group_size)[None, :, None]
    tokens = (rows + np.arange(LENGTH)).astype(np.int32)
    mask = np.ones(shape, bool)
    return Rollout(prompts, tokens, mask, -tokens / 7, np.ones(shape[:2], bool))


def make_verdict(rollout, total):
    """What a judge says that gives these rewards."""
    total = np.asarray(total, np.float32)
    rows = [(i, g) for i in np.asarray(rollout.prompts.index) for g in range(total.shape[1])]
    judged = Judged(
        [f'{i}?' for i, _ in rows],
        [f'{i}.{g}' for i, g in rows],
        rewards.Scores(total.reshape(-1), {'half': total.reshape(-1) / 2}),
    )
    return Verdict(judged, total, None, None)


def gather(batches, different, part=None):
    """Gathers B prompts of `batches`, of which those in `different` are told apart."""
    asked = []

    def sample(number):
        """A batch in parts."""
        rows = batches[number]
        cuts = range(0, len(rows), part or len(rows))
        parts = [rows[start : start + (part or len(rows))] for start in cuts]
        asked.extend((number, rows) for rows in parts)
        return [[draw(make_prompts(rows))] for rows in parts]

    def judge(rollout, early):
        index = np.asarray(rollout.prompts.index)
        return make_verdict(rollout, [DIFFERENT if i in different else EQUAL for i in index])

    parts = len(batches[0]) // (part or len(batches[0]))
    found = collect.gather(sample(0), sample, judge, tuple, parts=parts, refill=len(batches) - 1)
    return asked, *found


# Refill


BATCHES = [[0, 1, 2], [3, 4, 5], [6, 7, 8], [9, 10, 11]]


@pytest.mark.parametrize(
    ('different', 'used', 'chosen', 'ratio'),
    [
        ({0, 1, 2, 3}, 1, [0, 1, 2], 1.0),  # nothing to replace
        ({1, 2, 5, 8}, 2, [1, 2, 5], 1.0),
        ({2, 3, 4, 5, 6}, 2, [2, 3, 4], 1.0),  # in the order of sampling, the rest is left over
        ({0, 4, 8, 9}, 3, [0, 4, 8], 1.0),
        ({2, 11}, 4, [2, 11, 0], 2 / 3),  # bounded: others fill up, again in order
        (set(), 4, [0, 1, 2], 0.0),
    ],
)
def test_refill(different, used, chosen, ratio):
    asked, rollout, verdict, metrics = gather(BATCHES, different)
    assert asked == list(enumerate(BATCHES[:used]))
    assert rollout.prompts.index.tolist() == chosen
    expected = draw(make_prompts(chosen))
    for name in ('tokens', 'mask', 'logprobs', 'ended'):
        np.testing.assert_array_equal(getattr(rollout, name), getattr(expected, name))
    rows = [DIFFERENT if i in different else EQUAL for i in chosen]
    np.testing.assert_array_equal(verdict.total, rows)
    np.testing.assert_array_equal(verdict.judged.scores.total, np.ravel(rows))
    np.testing.assert_array_equal(verdict.judged.scores.parts['half'], np.ravel(rows) / 2)
    assert verdict.judged.prompts == [f'{i}?' for i in chosen for _ in range(GROUP)]
    assert verdict.judged.completions == [f'{i}.{g}' for i in chosen for g in range(GROUP)]
    assert metrics.keys() == {
        'timing/sample', 'timing/reward', 'refill/batches', 'refill/informative_ratio',
    }  # fmt: skip
    assert metrics['refill/batches'] == used
    assert metrics['refill/informative_ratio'] == pytest.approx(ratio)


@pytest.mark.parametrize('seed', range(20))
def test_refill_against_a_loop(seed):
    different = set(np.flatnonzero(np.random.default_rng(seed).random(12) < 0.4).tolist())
    used, pool = 0, []
    while used < len(BATCHES) and sum(i in different for i in pool) < 3:
        pool += BATCHES[used]
        used += 1
    ordered = [i for i in pool if i in different] + [i for i in pool if i not in different]
    asked, rollout, _, metrics = gather(BATCHES, different)
    assert (len(asked), rollout.prompts.index.tolist()) == (used, ordered[:3])
    assert metrics['refill/batches'] == used


def test_without_refill_a_batch_is_taken_as_it_is():
    asked, rollout, verdict, metrics = gather([[4, 2]], {2})
    assert asked == [(0, [4, 2])]
    assert rollout.prompts.index.tolist() == [4, 2]
    np.testing.assert_array_equal(verdict.total, [EQUAL, DIFFERENT])
    assert metrics.keys() == {'timing/sample', 'timing/reward'}


def test_parts_of_refilled_batches():
    batches = [[0, 1, 2, 3], [4, 5, 6, 7]]
    asked, rollout, verdict, _ = gather(batches, {1, 3, 4, 6}, part=2)
    assert asked == [(0, [0, 1]), (0, [2, 3]), (1, [4, 5]), (1, [6, 7])]
    assert rollout.prompts.index.tolist() == [1, 3, 4, 6]
    assert verdict.judged.completions[::GROUP] == ['1.0', '3.0', '4.0', '6.0']
    np.testing.assert_array_equal(rollout.tokens, draw(make_prompts([1, 3, 4, 6])).tokens)


# Rows that are not learnt from


TOTAL = np.array([[1.0, 0.0, 0.5], [-1.0, 2.0, 2.0]], np.float32)
TEXTS = ['a', 'b', 'a', 'a', 'c', 'c']  # the 'a' of another prompt is no duplicate
ENDED = np.array([[True, True, False], [False, True, True]])
KEPT = {
    'wrong': [[True, False, True], [False, True, True]],
    'duplicates': [[True, True, False], [True, True, False]],
    'truncated': ENDED,
}


@pytest.mark.parametrize(
    'drop', [d for n in range(4) for d in itertools.combinations(collect.DROPS, n)]
)
def test_kept_rows(drop):
    rollout = draw(make_prompts([0, 1]), 3)._replace(ended=ENDED)
    kept = collect.kept_rows(rollout, TEXTS, TOTAL, drop)
    assert kept.dtype == bool
    expected = np.logical_and.reduce([np.ones((2, 3), bool), *(KEPT[name] for name in drop)])
    np.testing.assert_array_equal(kept, expected)


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
def test_pick_pairs(total, rows):
    total = np.array(total, np.float32)
    rollout = draw(make_prompts(range(5, 5 + len(total))), total.shape[1])
    rollout.ended[0, 0] = False
    pairs, given = collect.pick_pairs(rollout, total)
    assert pairs.prompts is rollout.prompts
    for group, pair in enumerate(rows):
        np.testing.assert_array_equal(given[group], total[group][pair])
        for name in ('tokens', 'mask', 'logprobs', 'ended'):
            ours, theirs = getattr(pairs, name)[group], getattr(rollout, name)[group][pair]
            np.testing.assert_array_equal(ours, theirs)


# What is written down


def test_completion_rows():
    rollout = draw(make_prompts([3, 4]))
    verdict = make_verdict(rollout, [[1.0, 0.0], [0.5, 2.0]])
    verdict.judged.scores.parts['half'][1] = np.nan
    rows = collect.completion_rows(verdict, 3)
    assert rows == [
        {'prompt': '3?', 'completion': '3.0', 'reward': 1.0, 'rewards': {'half': 0.5}},
        {'prompt': '3?', 'completion': '3.1', 'reward': 0.0, 'rewards': {'half': None}},
        {'prompt': '4?', 'completion': '4.0', 'reward': 0.5, 'rewards': {'half': 0.25}},
    ]
    assert len(collect.completion_rows(verdict, 99)) == 4
    scored = verdict._replace(scores=np.array([4.0, 3.0, 2.0, 1.0], np.float32))
    assert collect.completion_rows(scored, 1)[0]['rewards'] == {'half': 0.5, 'reward_model': 4.0}
