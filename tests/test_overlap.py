"""What is judged while the rest is sampled: the same verdicts, each completion asked about once."""

import itertools
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

from grpo_jax import collect, data, overlap, rewards, sharding, tokens
from grpo_jax.sample import blocks
from grpo_jax.setup import Problems
from grpo_jax.types import Prompts, Rollout, Sampling
from grpo_jax.verdicts import Judge

BYTES = tokens.byte_tokenizer()
ROWS = [{'question': f'{i}?', 'answer': str(i)} for i in range(8)]
TABLE = data.tokenize_prompts(ROWS, BYTES, template='{question}', prompt_length=2)
LENGTH = 8
WAIT = 30  # seconds after which a test fails that would hang


def make_judge(*functions, stops=(), **options):
    named = {function.__name__: function for function in functions or (apart,)}
    return Judge(Problems(ROWS, TABLE, BYTES, stops), named, dict.fromkeys(named, 0.5), **options)


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


def gather(batch, judge, **options):
    return collect.gather(
        batch, None, lambda rollout, early: judge(rollout, 1.0, early), judge.early, **options
    )


def check_equal(ours, theirs):
    """Of what `gather` gives all but times."""
    assert tiny.same(ours[0], theirs[0])
    for name in ('prompts', 'completions'):
        assert getattr(ours[1].judged, name) == getattr(theirs[1].judged, name)
    scores = ours[1].judged.scores, theirs[1].judged.scores
    assert scores[0].timeouts == scores[1].timeouts
    kept = [(s.total, s.parts, *v[1][1:]) for s, v in zip(scores, (ours, theirs), strict=True)]
    assert jax.tree.structure(kept[0]) == jax.tree.structure(kept[1])
    assert tiny.same(*kept)
    assert ours[2].keys() == theirs[2].keys()
    assert collect.statistics(ours[1], 'apart') == collect.statistics(theirs[1], 'apart')


LENGTHS = st.tuples(st.integers(1, 5), st.integers(1, 3)).flatmap(
    lambda shape: st.lists(
        st.lists(st.integers(1, LENGTH + 1), min_size=shape[1], max_size=shape[1]),
        min_size=shape[0],
        max_size=shape[0],
    )
)


# The same verdicts


@pytest.mark.parametrize('kind', ['rules', 'scored', 'steps'])
@hypothesis.given(lengths=LENGTHS, seed=st.integers(0, 99), block=st.integers(1, 8))
def test_groups_that_end_early_are_judged_as_all_at_once(kind, lengths, seed, block):
    options = {
        'rules': {'stops': ('ab', 'c')},
        'scored': {'scorer': lambda factor, x: factor * x.logprobs.sum(-1), 'score_weight': 0.5},
        'steps': {'step_rewards': ('pieces', pieces, 2.0)},
    }
    judge = make_judge(apart, seldom, **options[kind])
    *_, whole = grown = list(grow(lengths, seed, block))
    expected = gather([[whole]], judge)
    check_equal(gather([grown], judge), expected)
    each = judge.early(grown[:-1])  # above, the newest at most
    check_equal((whole, judge(whole, 1.0, each), expected[2]), expected)


@hypothesis.settings(max_examples=25)
@hypothesis.given(lengths=LENGTHS, seed=st.integers(0, 99), count=st.integers(1, 3))
def test_whole_groups_and_each_completion_once(lengths, seed, count):
    """However many parts; those that end with the last block, in one call."""
    calls = []

    def watching(prompts, completions, answer, **columns):
        calls.append((prompts, completions))
        return [0.0] * len(prompts)

    parts = [list(grow(lengths, seed + n)) for n in range(count)]
    judge = make_judge(watching)
    _, verdict, _ = gather(parts, judge, parts=count)
    size = len(lengths[0])
    for prompts, _ in calls:
        assert all(n % size == 0 for n in Counter(prompts).values()), 'half a group'
    asked = [pair for call in calls for pair in zip(*call, strict=True)]
    judged = zip(verdict.judged.prompts, verdict.judged.completions, strict=True)
    assert Counter(asked) == Counter(judged)
    blocks_of_last = {-(-min(max(group), LENGTH) // 2) for group in lengths}
    if len(blocks_of_last) == 1:
        assert len(calls) == count
    assert count <= len(calls) <= count * len(blocks_of_last)


def test_what_other_hosts_hold_is_not_looked_at():
    class Ended(np.ndarray):
        is_fully_addressable = False

    *_, whole = grow([[1], [9]])
    there = whole._replace(ended=whole.ended.view(Ended))
    assert [len(make_judge().early([rollout])) for rollout in (whole, there)] == [1, 0]


# While the rest is decoded


@pytest.fixture(scope='module')
def sampled():
    """Blocks of a model that knows bytes; every other one ends a completion."""
    model = tiny.make_model(vocab_size=len(BYTES), layers=1)
    params = tiny.make_params(model)
    index = np.arange(4)
    mesh = sharding.make_mesh()

    def sampler(**options):
        return blocks(
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
    """Each has what the one before has, and what the verdict is of does not depend on them."""
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
    ours, theirs = (gather([x], make_judge(apart, seldom)) for x in (sampled(block=3), [whole]))
    noted = [x[0]._replace(logprobs=0) for x in (ours, theirs)]  # their last bits depend on blocks
    check_equal((noted[0], *ours[1:]), (noted[1], *theirs[1:]))


@pytest.mark.parametrize('count', [1, 2])
def test_a_group_is_judged_while_the_rest_is_decoded(sampled, count):
    """No second block ends before a reward has been asked for, in the main thread if it may."""
    judged, in_time, threads = threading.Event(), [], []

    def drawn():
        for n, rollout in enumerate(sampled(block=3)):
            yield rollout
            if n == 1:
                in_time.append(judged.wait(WAIT))

    def watching(prompts, completions, **columns):
        threads.append(threading.current_thread())
        judged.set()
        return [0.0] * len(prompts)

    gather([drawn() for _ in range(count)], make_judge(watching), parts=count)
    assert in_time == [True] * count
    assert len(threads) > count
    assert {thread is threading.main_thread() for thread in threads} == {count == 1}


def test_no_block_is_read_before_the_next_is_dispatched():
    """Whoever reads waits for it, and so would what is dispatched behind."""
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

    judge = make_judge()
    growing = overlap._Growing()
    with ThreadPoolExecutor(1) as thread:
        thread.submit(growing.fill, drawn())
        assert [part.groups.tolist() for part in judge.early(growing)] == [[0], [1]]
    assert read
    assert all(read)


def test_a_slow_reward_keeps_no_block_waiting():
    """It ends behind the last dispatch; groups that end meanwhile are asked about together."""
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
    gather([drawn()], make_judge(slow))
    assert all(in_time)
    assert calls == [1, 2, 1]


def test_a_part_is_judged_while_the_next_is_sampled():
    judged = threading.Event()

    def watching(prompts, completions, **columns):
        judged.set()
        return [0.0] * len(prompts)

    def drawn():
        yield grow([[9], [9]])
        assert judged.wait(WAIT)
        yield grow([[1], [9]], seed=1)

    rollout, verdict, _ = gather(drawn(), make_judge(watching), parts=2)
    assert rollout.ended.tolist() == [[False], [False], [True], [False]]
    assert verdict.total.shape == (4, 1)


def test_the_first_block_is_dispatched_at_once():
    made = []

    def part(n):
        for block in range(2):
            made.append((n, block))
            yield n, block

    parts = overlap.eager_first(part(n) for n in range(2))
    assert made == [(0, 0)]
    assert [list(some) for some in parts] == [[(0, 0), (0, 1)], [(1, 0), (1, 1)]]
    assert made == [(0, 0), (0, 1), (1, 0), (1, 1)]


# Failures


@pytest.mark.parametrize('count', [1, 3])
def test_a_reward_that_fails_early(monkeypatch, count):
    """The error is the usual one; no block is sampled that nobody waits for, no thread is left."""
    made, asked = [], []

    class Growing(overlap._Growing):
        def __init__(self):
            super().__init__()
            made.append(self)

    def drawn():
        for width, rollout in enumerate(grow([[1], [9]])):
            asked.append(width)
            yield rollout
            end = time.monotonic() + WAIT
            while width == 1 and not made[-1].whole.cancelled() and time.monotonic() < end:
                time.sleep(0.001)

    def failing(prompts, completions, **columns):
        return 1 / 0

    monkeypatch.setattr(overlap, '_Growing', Growing)
    before = set(threading.enumerate())
    with pytest.raises(
        rewards.RewardError, match=r"'failing'.* raised ZeroDivisionError: division"
    ):
        gather([drawn() for _ in range(count)], make_judge(failing), parts=count)
    assert asked == [0, 1, 2]
    assert set(threading.enumerate()) == before


@pytest.mark.parametrize('count', [1, 3])
@pytest.mark.parametrize('where', [0, 1, 2])
def test_a_sampler_that_fails(count, where):
    """While parts wait that will never come."""

    def drawn():
        for n, rollout in enumerate(grow([[1], [9]])):
            if n == where:
                raise MemoryError('the device is full')
            yield rollout

    before = set(threading.enumerate())
    with pytest.raises(MemoryError, match='the device is full'):
        gather([drawn() for _ in range(count)], make_judge(apart), parts=count)
    assert set(threading.enumerate()) == before
