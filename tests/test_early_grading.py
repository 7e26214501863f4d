"""Grading while the rest is sampled: the same rewards, each completion graded once."""

import itertools
import os
import signal
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import hypothesis
import hypothesis.strategies as st
import jax
import numpy as np
import pytest
import tiny

from grpo_jax import data, rewards, sharding
from grpo_jax.algorithm.sample import sample_blocks
from grpo_jax.data import byte_tokenizer
from grpo_jax.rewards.verify import pool
from grpo_jax.run import early_grading, rollouts
from grpo_jax.run.grading import Grader
from grpo_jax.run.problems import Problems
from grpo_jax.types import Prompts, Rollout, Sampling

BYTES = byte_tokenizer()
ROWS = [{'question': f'{i}?', 'answer': str(i)} for i in range(8)]
TABLE = data.tokenize_prompts(ROWS, BYTES, template='{question}', prompt_length=2)
LENGTH = 8
WAIT = 30  # seconds after which a test fails that would hang


def make_grader(*functions, stops=(), **options):
    named = {function.__name__: function for function in functions or (apart,)}
    return Grader(Problems(ROWS, TABLE, BYTES, stops), named, dict.fromkeys(named, 0.5), **options)


def apart(prompts, completions, answer, completion_ids, **columns):
    """Compares the completions of a prompt, so that a group has to come whole."""
    assert [prompt[:-1] for prompt in prompts] == list(answer)
    longest = {}
    for prompt, ids in zip(prompts, completion_ids, strict=True):
        longest[prompt] = max(longest.get(prompt, 0), len(ids))
    pairs = zip(prompts, completions, completion_ids, strict=True)
    return [longest[prompt] - len(ids) + len(text) / 8 for prompt, text, ids in pairs]


def seldom(prompts, completions, **columns):
    return [None if len(text) % 2 else -1.0 for text in completions]


def pieces(prompts, completions, **columns):
    """A step for each letter."""
    return [[(i + 1, float(i)) for i in range(len(text))] for text in completions]


def grow(lengths, seed=0, block=2):
    """A rollout after each block; lengths [B, G], those above LENGTH have no end."""
    lengths = np.array(lengths)
    rng = np.random.default_rng(seed)
    made = rng.choice(np.frombuffer(b'abc', np.uint8), (*lengths.shape, LENGTH)).astype(np.int32)
    index = rng.permutation(len(ROWS))[: len(lengths)].astype(np.int32)
    prompts = Prompts(TABLE.tokens[index], TABLE.length[index], index)
    for width in range(block, LENGTH + block, block):
        mask = np.arange(LENGTH) < np.minimum(lengths, width)[..., None]
        ended = lengths <= min(width, LENGTH)
        yield Rollout(prompts, np.where(mask, made, 0), mask, -made / 9 * mask, ended)
        if ended.all():
            return


def collect(blocks, grader):
    return rollouts.collect_rollout(
        blocks,
        lambda number: [],
        lambda rollout, early: grader.grade(rollout, 1.0, early),
        grader.grade_early,
    )


def check_equal(ours, theirs):
    """Everything that `collect` returns except times."""
    assert tiny.same(ours.rollout, theirs.rollout)
    for name in ('prompts', 'completions'):
        assert getattr(ours.rewards.texts, name) == getattr(theirs.rewards.texts, name)
    scores = ours.rewards.texts.scores, theirs.rewards.texts.scores
    assert scores[0].timeouts == scores[1].timeouts
    arrays = [
        (s.total, s.parts, *x.rewards[1:]) for s, x in zip(scores, (ours, theirs), strict=True)
    ]
    assert jax.tree.structure(arrays[0]) == jax.tree.structure(arrays[1])
    assert tiny.same(*arrays)
    assert ours.metrics.keys() == theirs.metrics.keys()
    metrics = [rollouts.reward_metrics(x.rewards, 'apart') for x in (ours, theirs)]
    assert metrics[0] == metrics[1]


LENGTHS = st.tuples(st.integers(1, 5), st.integers(1, 3)).flatmap(
    lambda shape: st.lists(
        st.lists(st.integers(1, LENGTH + 1), min_size=shape[1], max_size=shape[1]),
        min_size=shape[0],
        max_size=shape[0],
    )
)


# The same rewards


@pytest.mark.parametrize('kind', ['functions', 'scored', 'steps'])
@hypothesis.given(lengths=LENGTHS, seed=st.integers(0, 99), block=st.integers(1, 8))
def test_groups_that_end_early_get_the_same_rewards(kind, lengths, seed, block):
    options = {
        'functions': {'stops': ('ab', 'c')},
        'scored': {'scorer': lambda factor, x: factor * x.logprobs.sum(-1), 'score_weight': 0.5},
        'steps': {'step_rewards': ('pieces', pieces, 2.0)},
    }
    grader = make_grader(apart, seldom, **options[kind])
    *_, whole = grown = list(grow(lengths, seed, block))
    expected = collect([whole], grader)
    check_equal(collect(grown, grader), expected)
    each = grader.grade_early(grown[:-1])  # above, it may see only the newest
    graded = grader.grade(whole, 1.0, each)
    check_equal(expected._replace(rollout=whole, rewards=graded), expected)


@hypothesis.settings(max_examples=25)
@hypothesis.given(lengths=LENGTHS, seed=st.integers(0, 99))
def test_whole_groups_and_each_completion_once(lengths, seed):
    """Those that end with the last block are graded in one call."""
    calls = []

    def watching(prompts, completions, answer, **columns):
        calls.append((prompts, completions))
        return [0.0] * len(prompts)

    texts = collect(list(grow(lengths, seed)), make_grader(watching)).rewards.texts
    size = len(lengths[0])
    for prompts, _ in calls:
        assert all(n % size == 0 for n in Counter(prompts).values()), 'half a group'
    graded = [pair for call in calls for pair in zip(*call, strict=True)]
    assert Counter(graded) == Counter(zip(texts.prompts, texts.completions, strict=True))
    blocks_of_last = {-(-min(max(group), LENGTH) // 2) for group in lengths}
    assert 1 <= len(calls) <= len(blocks_of_last)


# While the rest is decoded


@pytest.fixture(scope='module')
def sampled():
    """Blocks of a model that knows bytes; every other one ends a completion."""
    model = tiny.make_model(vocab_size=len(BYTES), layers=1)
    params = tiny.make_params(model)
    index = np.arange(4)
    mesh = sharding.make_mesh()

    def sampler(**options):
        return sample_blocks(
            model,
            params,
            sharding.put_groups(Prompts(TABLE.tokens[index], TABLE.length[index], index), mesh),
            **{'seed': 0, 'step': 0, 'sampling': Sampling(), 'group_size': 2, 'max_tokens': LENGTH},
            eos_ids=np.arange(0, len(BYTES), 2),
            mesh=mesh,
            **options,
        )

    return sampler


def test_blocks_of_the_sampler(sampled):
    """Each holds what the one before holds, and rewards do not depend on the blocks."""
    grown = jax.device_get(list(sampled(block=3)))
    (whole,) = sampled()
    assert len(grown) > 2
    early = [rollout.ended.all(1) for rollout in grown[:-1]]
    assert 0 < np.sum(early[0]) < len(early[0])
    for before, after in itertools.pairwise(grown):
        assert (after.ended >= before.ended).all()
        assert not before.ended.all()
        for name in ('tokens', 'mask', 'logprobs'):
            ours, theirs = (getattr(x, name)[before.ended] for x in (before, after))
            np.testing.assert_array_equal(ours, theirs, name)
    ours, theirs = (collect(x, make_grader(apart, seldom)) for x in (sampled(block=3), [whole]))
    # The last bits of log-probs depend on the blocks.
    check_equal(*(x._replace(rollout=x.rollout._replace(logprobs=0)) for x in (ours, theirs)))


def test_a_group_is_graded_while_the_rest_is_decoded(sampled):
    """A reward is asked for before the second block ends, in the main thread.

    There a library's own alarms work, and an interrupt ends a reward.
    """
    graded, in_time, threads = threading.Event(), [], []

    def drawn():
        for n, rollout in enumerate(sampled(block=3)):
            yield rollout
            if n == 1:
                in_time.append(graded.wait(WAIT))

    def watching(prompts, completions, **columns):
        threads.append(threading.current_thread())
        graded.set()
        return [0.0] * len(prompts)

    collect(drawn(), make_grader(watching))
    assert in_time == [True]
    assert len(threads) > 1
    assert set(threads) == {threading.main_thread()}


def test_no_block_is_read_before_the_next_is_dispatched():
    """Reading waits for a block, and would keep the next one from being dispatched."""
    dispatched, read = [], []

    class Ended:
        def __init__(self, number, value):
            self.number, self.value = number, value

        def __array__(self, dtype=None, copy=None):
            read.append(self.number in dispatched[:-1])
            return self.value

    def drawn():
        for number, rollout in enumerate(grow([[1], [3], [9]])):
            time.sleep(0.05)  # to be caught
            dispatched.append(number)
            yield rollout._replace(ended=Ended(number, rollout.ended))

    grader = make_grader()
    growing = early_grading.GrowingRollout()
    with ThreadPoolExecutor(1) as thread:
        thread.submit(growing.sample, drawn())
        assert [part.groups.tolist() for part in grader.grade_early(growing)] == [[0], [1]]
    assert read
    assert all(read)


def test_a_slow_reward_keeps_no_block_waiting():
    """It ends after the last dispatch; groups that end meanwhile are graded together."""
    dispatched, calls, in_time = threading.Event(), [], []

    def drawn():
        for rollout in grow([[1], [3], [5], [9]]):
            yield rollout
            if len(calls) == 0 and rollout.ended[:2].all():
                assert asked.wait(WAIT)  # so that the first call is about one group
        dispatched.set()

    def slow(prompts, completions, **columns):
        calls.append(len(prompts))
        asked.set()
        in_time.append(dispatched.wait(WAIT))
        return [0.0] * len(prompts)

    asked = threading.Event()
    collect(drawn(), make_grader(slow))
    assert all(in_time)
    assert calls == [1, 2, 1]


def test_the_first_block_is_dispatched_at_once():
    dispatched = []

    def blocks():
        for n in range(3):
            dispatched.append(n)
            yield n

    lazy = early_grading.dispatch_first(blocks())
    assert dispatched == [0]
    assert list(lazy) == dispatched == [0, 1, 2]


def test_comparisons_without_result_are_counted_once():
    """Over all calls of a step, early ones and the last."""

    def hanging(prompts, completions, **columns):
        pool.shared().timeouts += 1
        return [0.0] * len(prompts)

    grader = make_grader(hanging)
    grown = list(grow([[1], [3], [9]]))
    early = grader.grade_early(grown[:-1])
    assert len(early) == 2
    assert grader.grade(grown[-1], None, early).texts.scores.timeouts == 3


# Failures


@pytest.mark.parametrize('error', [ZeroDivisionError, KeyboardInterrupt])
def test_grading_that_fails_early(monkeypatch, error):
    """The error is raised once; sampling ends, and no thread is left."""
    growing, yielded = [], []

    class Watched(early_grading.GrowingRollout):
        def __init__(self):
            super().__init__()
            growing.append(self)

    def drawn():
        for width, rollout in enumerate(grow([[1], [9]])):
            yielded.append(width)
            yield rollout
            end = time.monotonic() + WAIT
            while width == 1 and not growing[-1].whole.cancelled() and time.monotonic() < end:
                time.sleep(0.001)

    def failing(prompts, completions, **columns):
        raise error('of the reward')

    monkeypatch.setattr(early_grading, 'GrowingRollout', Watched)
    before = set(threading.enumerate())
    raised = KeyboardInterrupt if error is KeyboardInterrupt else rewards.RewardError
    with pytest.raises(raised, match='of the reward') as caught:
        collect(drawn(), make_grader(failing))
    assert yielded == [0, 1, 2]
    assert set(threading.enumerate()) == before
    if raised is rewards.RewardError:
        assert "'failing'" in str(caught.value)
        assert 'raised ZeroDivisionError: of the reward' in str(caught.value)


@pytest.mark.parametrize('where', [0, 1, 2])
def test_a_sampler_that_fails(where):
    """While grading waits for blocks that never come."""

    def drawn():
        for n, rollout in enumerate(grow([[1], [9]])):
            if n == where:
                raise MemoryError('the device is full')
            yield rollout

    before = set(threading.enumerate())
    with pytest.raises(MemoryError, match='the device is full') as caught:
        collect(drawn(), make_grader(apart))
    assert caught.value.__context__ is None
    assert set(threading.enumerate()) == before


@pytest.mark.usefixtures('interruptible')
def test_an_interrupt_while_the_sampler_is_busy():
    """It reaches the main thread, which waits for the rollout, and ends sampling."""
    yielded = []

    def drawn():
        for n, rollout in enumerate(grow([[9], [9]], block=1)):
            yielded.append(n)
            if n == 1:
                os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.1)
            yield rollout

    before = set(threading.enumerate())
    with pytest.raises(KeyboardInterrupt):
        collect(drawn(), make_grader(apart))
    assert len(yielded) < LENGTH
    assert set(threading.enumerate()) == before
