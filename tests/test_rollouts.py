"""Dynamic sampling against plain loops, and what is recorded of a step."""

import json

import numpy as np
import pytest

from grpo_jax import rewards
from grpo_jax.run import rollouts
from grpo_jax.run.graded_texts import GradedTexts
from grpo_jax.run.rollout_rewards import RolloutRewards
from grpo_jax.types import Prompts, Rollout

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


def make_rewards(rollout, total):
    """The rewards of a rollout, with texts that name prompt and completion."""
    total = np.asarray(total, np.float32)
    rows = [(i, g) for i in np.asarray(rollout.prompts.index) for g in range(total.shape[1])]
    texts = GradedTexts(
        [f'{i}?' for i, _ in rows],
        [f'{i}.{g}' for i, g in rows],
        rewards.Scores(total.reshape(-1), {'half': total.reshape(-1) / 2}),
    )
    return RolloutRewards(texts, total, None, None)


def collect(batches, informative):
    """Collects B prompts of `batches`, in which those in `informative` have different rewards."""
    sampled = []

    def sample(number):
        sampled.append((number, batches[number]))
        return [draw(make_prompts(batches[number]))]

    def grade(rollout, early):
        index = np.asarray(rollout.prompts.index)
        return make_rewards(rollout, [DIFFERENT if i in informative else EQUAL for i in index])

    refill = len(batches) - 1
    return sampled, rollouts.collect_rollout(sample(0), sample, grade, tuple, refill=refill)


# Dynamic sampling


BATCHES = [[0, 1, 2], [3, 4, 5], [6, 7, 8], [9, 10, 11]]


@pytest.mark.parametrize(
    ('informative', 'used', 'chosen', 'ratio'),
    [
        ({0, 1, 2, 3}, 1, [0, 1, 2], 1.0),  # nothing to replace
        ({1, 2, 5, 8}, 2, [1, 2, 5], 1.0),
        ({2, 3, 4, 5, 6}, 2, [2, 3, 4], 1.0),  # in the order of sampling; the rest is not used
        ({0, 4, 8, 9}, 3, [0, 4, 8], 1.0),
        ({2, 11}, 4, [2, 11, 0], 2 / 3),  # bounded: filled up by others, again in order
        (set(), 4, [0, 1, 2], 0.0),
    ],
)
def test_refill(informative, used, chosen, ratio):
    sampled, collected = collect(BATCHES, informative)
    assert sampled == list(enumerate(BATCHES[:used]))
    assert collected.batches == used
    rollout, graded, metrics = collected.rollout, collected.rewards, collected.metrics
    assert rollout.prompts.index.tolist() == chosen
    expected = draw(make_prompts(chosen))
    for name in ('tokens', 'mask', 'logprobs', 'ended'):
        np.testing.assert_array_equal(getattr(rollout, name), getattr(expected, name))
    rows = [DIFFERENT if i in informative else EQUAL for i in chosen]
    np.testing.assert_array_equal(graded.total, rows)
    np.testing.assert_array_equal(graded.texts.scores.total, np.ravel(rows))
    np.testing.assert_array_equal(graded.texts.scores.parts['half'], np.ravel(rows) / 2)
    assert graded.texts.prompts == [f'{i}?' for i in chosen for _ in range(GROUP)]
    assert graded.texts.completions == [f'{i}.{g}' for i in chosen for g in range(GROUP)]
    assert metrics.keys() == {
        'timing/sample', 'timing/reward', 'refill/batches', 'refill/informative_ratio',
    }  # fmt: skip
    assert metrics['refill/batches'] == used
    assert metrics['refill/informative_ratio'] == pytest.approx(ratio)


@pytest.mark.parametrize('seed', range(20))
def test_refill_against_a_loop(seed):
    informative = set(np.flatnonzero(np.random.default_rng(seed).random(12) < 0.4).tolist())
    used, pool = 0, []
    while used < len(BATCHES) and sum(i in informative for i in pool) < 3:
        pool += BATCHES[used]
        used += 1
    ordered = [i for i in pool if i in informative] + [i for i in pool if i not in informative]
    sampled, collected = collect(BATCHES, informative)
    assert (len(sampled), collected.rollout.prompts.index.tolist()) == (used, ordered[:3])
    assert collected.batches == collected.metrics['refill/batches'] == used


def test_without_refill_a_batch_is_used_as_it_is():
    sampled, collected = collect([[4, 2]], {2})
    assert sampled == [(0, [4, 2])]
    assert collected.batches == 1
    assert collected.rollout.prompts.index.tolist() == [4, 2]
    np.testing.assert_array_equal(collected.rewards.total, [EQUAL, DIFFERENT])
    assert collected.metrics.keys() == {'timing/sample', 'timing/reward'}


# The position in the data


def test_a_position_is_restored_from_json():
    position = rollouts.Position(3, 7, frozenset({'a1', 'b2'}))
    assert rollouts.Position.from_json(json.loads(json.dumps(position.to_json()))) == position


def test_a_position_follows_the_entropy_of_its_last_step_once():
    """From 0.5 up where the entropy is at most 2, else down and without a bonus."""
    options = {'start': 0.5, 'target': 2.0, 'step': 0.125}
    position = rollouts.Position(1, 1)
    seen = []
    for entropy in (2.0, 3.0, 1.0):
        position = position.follow(entropy, **options)
        assert position.follow(0.0, **options) == position
        assert rollouts.Position.from_json(json.loads(json.dumps(position.to_json()))) == position
        seen.append(position.entropy[:2])
        position = position._replace(entropy=position.entropy._replace(known=False))
    assert seen == [(0.625, 0.625), (0.5, 0.0), (0.625, 0.625)]


def test_the_tokens_of_a_run_are_counted():
    """As TRL counts them: all so far, the prompt of a group for each completion."""
    rollout = draw(make_prompts([3, 4]))
    rollout.mask[0, 1, 1:] = False
    assert rollouts.count_tokens(rollout) == 2 * 2 * 2 + 3 + 1 + 3 + 3
    position = rollouts.Position(4, 7, frozenset({'a1'}), 100)
    following = position.next_step(rollout, next_batch=9)
    assert following == rollouts.Position(5, 9, frozenset({'a1'}), 118)
    older = {'step': 4, 'next_batch': 7, 'trained': []}  # of a checkpoint without the count
    assert rollouts.Position.from_json(older) == rollouts.Position(4, 7)


def test_the_rewards_of_each_function():
    graded = make_rewards(draw(make_prompts([3, 4])), [[1.0, 0.0], [0.5, 2.0]])
    graded.texts.scores.parts['whole'] = np.float32([1, 2, np.nan, 4])
    weights = {'whole': 3.0, 'half': 2.0}
    values, tiled = rollouts.function_rewards(graded, weights, 0.5)
    half, whole = [[0.5, 0], [0.25, 1]], [[1, 2], [np.nan, 4]]
    np.testing.assert_array_equal(values, np.stack([half, whole], -1))
    np.testing.assert_array_equal(tiled, [[2, 3], [2, 3]])
    scored = graded._replace(model_scores=np.float32([4, 3, 2, 1]))
    values, tiled = rollouts.function_rewards(scored, weights, 0.5)
    np.testing.assert_array_equal(values[..., 2], [[4, 3], [2, 1]])
    np.testing.assert_array_equal(tiled[0], [2, 3, 0.5])


def test_batches_are_made_once_also_when_prefetched():
    made = []
    batches = rollouts.PrefetchedBatches(lambda number: made.append(number) or number)
    assert batches(0) == 0
    batches.prefetch(1)
    batches.prefetch(1)
    assert made == [0, 1]
    assert [batches(1), batches(2), batches(2)] == [1, 2, 2]
    assert made == [0, 1, 2, 2]


# Records


def test_completion_records():
    rollout = draw(make_prompts([3, 4]))
    graded = make_rewards(rollout, [[1.0, 0.0], [0.5, 2.0]])
    graded.texts.scores.parts['half'][1] = np.nan
    records = rollouts.completion_records(graded, 3)
    assert records == [
        {'prompt': '3?', 'completion': '3.0', 'reward': 1.0, 'rewards': {'half': 0.5}},
        {'prompt': '3?', 'completion': '3.1', 'reward': 0.0, 'rewards': {'half': None}},
        {'prompt': '4?', 'completion': '4.0', 'reward': 0.5, 'rewards': {'half': 0.25}},
    ]
    assert len(rollouts.completion_records(graded, 99)) == 4
    scored = graded._replace(model_scores=np.array([4.0, 3.0, 2.0, 1.0], np.float32))
    record = rollouts.completion_records(scored, 1)[0]
    assert record['rewards'] == {'half': 0.5, 'reward_model': 4.0}


def test_reward_metrics():
    graded = make_rewards(draw(make_prompts([3, 4])), [[1.0, 0.0], [0.5, 2.0]])
    metrics = rollouts.reward_metrics(graded, 'half')
    assert metrics == pytest.approx({
        'rewards/half/mean': 0.4375,
        'rewards/half/std': np.std([0.5, 0.0, 0.25, 1.0], ddof=1),
        'accuracy': 0.25,
    })  # fmt: skip
    baselined = graded._replace(baseline=np.float32([1, np.nan]))
    assert rollouts.reward_metrics(baselined, 'half') == metrics | {'reward_greedy': 1.0}
    scored = graded._replace(model_scores=np.array([4.0, 3.0, 2.0, 1.0], np.float32))
    metrics = rollouts.reward_metrics(scored, 'none')
    assert 'accuracy' not in metrics
    assert metrics['rewards/reward_model/mean'] == 2.5
    assert metrics['rewards/reward_model/std'] == pytest.approx(np.std([4, 3, 2, 1], ddof=1))
