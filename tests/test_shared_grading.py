"""Grading in shares, by threads in the place of processes: each has its number and its barrier."""

import threading

import numpy as np
import pytest

from grpo_jax import rewards
from grpo_jax.run import hosts
from grpo_jax.run.graded_texts import GradedTexts
from grpo_jax.run.problems import untokenized
from grpo_jax.run.shared_grading import grade_in_shares, in_shares
from grpo_jax.types import Prompts, Rollout, StepRewards

B, G, T = 5, 2, 3


def decode(tokenizer, tokens, *others, **options):
    return ['p' if len(row) == 1 else str(row[0]) for row in tokens]


@pytest.fixture
def in_processes(monkeypatch):
    """Calls a function in n threads that are processes to `hosts`; returns results and errors."""
    own = threading.local()

    def run(n, function):
        barrier, board, found = threading.Barrier(n), [None] * n, [None] * n

        def share_with_all(value, what):
            board[own.index] = value
            barrier.wait(20)
            values = list(board)
            barrier.wait(20)
            return values

        for module in (hosts, hosts.agreement, hosts.arrays):
            monkeypatch.setattr(module, 'count', lambda: n)
            monkeypatch.setattr(module, 'index', lambda: own.index)
        monkeypatch.setattr(hosts, 'gather', share_with_all)
        monkeypatch.setattr(hosts, 'exchange', share_with_all)
        monkeypatch.setattr(hosts.agreement, 'exchange', share_with_all)
        monkeypatch.setattr('grpo_jax.run.graded_texts.completion_texts', decode)

        def thread(index):
            own.index = index
            try:
                found[index] = function()
            except Exception as error:
                found[index] = error

        threads = [threading.Thread(target=thread, args=(i,)) for i in range(n)]
        for each in threads:
            each.start()
        for each in threads:
            each.join()
        return found

    return run


def make_rollout():
    ids = np.arange(B, dtype=np.int32)
    prompts = Prompts(ids[:, None], np.ones(B, np.int32), ids)
    shape = (B, G, T)
    return Rollout(
        prompts, np.arange(B * G * T, dtype=np.int32).reshape(shape) // T, np.ones(shape, bool),
        np.zeros(shape, np.float32), np.ones((B, G), bool),
    )  # fmt: skip


def grade(share, *, logs=False):
    """Rewards that tell which completion they are of; NaN and steps too."""
    numbers = (np.asarray(share)[:, None] * G + np.arange(G)).reshape(-1).astype(np.float32)
    part = np.where(numbers == 3, np.nan, numbers)
    kept = rewards.Logs({}, {})
    if logs:
        kept = rewards.Logs({'m': [float(share[0])]}, {'column': [int(x) for x in numbers]})
    timeouts = int(4 in share)
    scores = rewards.Scores(numbers / 2, {'a': part}, timeouts, kept)
    shape = (len(share), G, T)
    steps = StepRewards(
        np.broadcast_to(numbers.reshape(shape[:2])[..., None], shape).astype(np.float32),
        np.ones(shape, bool),
    )
    return GradedTexts(['p'] * len(numbers), [str(int(x)) for x in numbers], scores), steps


def graded(function):
    return grade_in_shares(
        make_rollout(), untokenized([{}]), function, functions={'a': len}, has_steps=True
    )


@pytest.mark.parametrize('n', [2, 3, 7])
def test_all_processes_get_what_one_would(in_processes, n):
    expected, steps = graded(grade)
    for texts, found_steps in in_processes(n, lambda: graded(grade)):
        assert list(texts.completions) == expected.completions
        assert texts.prompts == expected.prompts
        np.testing.assert_array_equal(texts.scores.total, expected.scores.total)
        np.testing.assert_array_equal(texts.scores.parts['a'], expected.scores.parts['a'])
        assert texts.scores.total.dtype == np.float32
        assert texts.scores.timeouts == 1
        for ours, theirs in zip(found_steps, steps, strict=True):
            np.testing.assert_array_equal(ours, theirs)
            assert ours.dtype == theirs.dtype


def test_a_process_decodes_no_text_that_it_does_not_read(in_processes, monkeypatch):
    decoded = []

    def count(tokenizer, tokens, *others, **options):
        decoded.extend(row[0] for row in tokens if len(row) > 1)
        return decode(tokenizer, tokens)

    found = in_processes(2, lambda: graded(grade)[0].completions)
    monkeypatch.setattr('grpo_jax.run.graded_texts.completion_texts', count)
    texts = found[1]
    assert len(texts) == B * G
    assert decoded == []
    assert [texts[3], texts[-1], texts[3], *texts[2:4]] == ['3', '9', '3', '2', '3']
    assert decoded == [3, 9, 2]
    with pytest.raises(IndexError):
        texts[B * G]


def test_what_functions_log_is_joined_in_order(in_processes):
    for texts, _ in in_processes(2, lambda: graded(lambda share: grade(share, logs=True))):
        assert texts.scores.logs.metrics == {'m': [0.0, 2.0]}
        assert texts.scores.logs.extra == {'column': list(range(B * G))}


def test_an_error_in_one_process_is_raised_in_all(in_processes):
    def fails(share):
        if 4 in share:
            raise rewards.RewardError('reward a: no\nsuch answer')
        return grade(share)

    errors = in_processes(3, lambda: graded(fails))
    assert {str(error) for error in errors} == {'process 2: reward a: no such answer'}
    for error in errors:
        assert isinstance(error, rewards.RewardError)
        assert hosts.is_in_all_processes(error)


def test_an_error_of_all_processes_is_not_named_thrice(in_processes):
    def fails(share):
        raise rewards.RewardError('no reward')

    assert {str(error) for error in in_processes(3, lambda: graded(fails))} == {'no reward'}


def test_an_unexpected_error_tells_its_class(in_processes, capsys):
    def fails(share):
        if 0 in share:
            raise KeyError('a')
        return grade(share)

    errors = in_processes(2, lambda: graded(fails))
    assert {str(error) for error in errors} == {"process 0: KeyError: 'a'"}
    assert 'Traceback' in capsys.readouterr().err


def test_shares_without_groups(in_processes):
    """Seven processes and two groups: five have nothing to do."""
    empty = np.zeros((0, 2), np.float64)

    def compute(share):
        return np.stack([share, share + 0.1], 1).astype(np.float64), ''

    for arrays, texts in in_processes(7, lambda: in_shares(2, compute, empty)):
        np.testing.assert_array_equal(arrays, [[0, 0.1], [1, 1.1]])
        assert texts == [''] * 7
