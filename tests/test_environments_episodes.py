"""The episodes of a rollout: threads, deadlines, and environments that fail in every way."""

import asyncio
import contextlib
import os
import sys
import threading
import time
from typing import ClassVar

import pytest

from grpo_jax import environments, plugins
from grpo_jax.environments import EndedTurn, build, episodes
from grpo_jax.environments.turns import LONGEST_REPLY

HERE = plugins.import_file(__file__)  # what paths of this file lead to
WAIT = 20.0  # seconds, at most, for what has no deadline of its own


def find(name):
    return f'{__file__}:{name}'


@contextlib.contextmanager
def started(name, *columns, **options):
    """Episodes 0, 1, ... with these columns."""
    limits = {'turns': 3, 'seconds': WAIT} | options
    environment = build(find(name), limits.pop('options', {}), **limits)
    with environment.episodes() as found:
        for number, row in enumerate(columns):
            found.start(number, f'prompt {number}', row)
        yield found


def answers(found, *texts):
    """The answers to a turn of episodes 0, 1, ...; None: no turn."""
    found.submit([EndedTurn(n, text) for n, text in enumerate(texts) if text is not None])
    got = []
    while len(got) < sum(text is not None for text in texts):
        part = found.ready(WAIT)
        assert part, 'no answer came'
        got += part
    return sorted(got)


def contents(got):
    return [m and [x['content'] for x in m] for m in (answer.messages for answer in got)]


seen = []


def batch(prompts, completions, turns, number, **columns):
    seen.append((prompts, completions, turns, number))
    return [
        None if text == 'stop' else f'{text} {n}'
        for text, n in zip(completions, number, strict=True)
    ]


def test_a_function_gets_all_turns_of_a_submit_at_once():
    seen = HERE.seen
    seen.clear()
    with started('batch', {'number': 5}, {'number': 6}, {'number': 7}) as found:
        first = answers(found, 'a', 'b', 'stop')
        assert contents(first) == [['a 5'], ['b 6'], None]
        assert [a.outcome for a in first] == ['reply', 'reply', 'end']
        assert first[0].messages[0]['role'] == 'user'
        second = answers(found, None, 'c')
    assert contents(second) == [['c 6']]
    assert seen[0][0] == ['prompt 0', 'prompt 1', 'prompt 2']
    assert seen[0][1:] == (['a', 'b', 'stop'], [[], [], []], [5, 6, 7])
    assert seen[1][2] == [[('b', 'b 6')]]


def test_the_last_turn_has_no_reply():
    with started('batch', {'number': 5}, {'number': 6}, turns=2) as found:
        answers(found, 'a', 'a')
        last = answers(found, 'b', 'stop')
        assert contents(last) == [None, None]
        assert [a.outcome for a in last] == ['turn_limit', 'end']
        with pytest.raises(ValueError, match='a turn of episode 0, which is over'):
            found.submit([EndedTurn(0, 'c')])
        assert found.ready() == []


class Stateful:
    closed: ClassVar = []

    def reset(self, start, prompt, **columns):
        self.total = start

    def reply(self, text):
        self.total += int(text)
        return None if self.total > 9 else str(self.total)

    def get_reward(self):
        return self.total / 10

    def close(self):
        self.closed.append(self.total)


def test_a_class_has_an_object_for_each_episode():
    HERE.Stateful.closed.clear()
    with started('Stateful', {'start': 1}, {'start': 5}, {'start': 0}) as found:
        first = answers(found, '2', '2')
        assert contents(first) == [['3'], ['7']]
        second = answers(found, '1', '3')
        assert contents(second) == [['4'], None]
        assert [a.reward for a in second] == [0.4, 1.0]
        assert [a.outcome for a in second] == ['reply', 'end']
    assert sorted(HERE.Stateful.closed) == [4, 10]  # the third was never reset


class Asynchronous:
    async def reset(self):
        await asyncio.sleep(0)

    async def reply(self, text):
        await asyncio.sleep(60 if text == 'slow' else 0)
        if text == 'exit':
            os._exit(3)
        return threading.current_thread().name

    async def close(self):
        await asyncio.sleep(0)


def test_coroutines_run_in_one_loop_that_survives_them():
    with started('Asynchronous', {}, {}, {}, seconds=1.0) as found:
        first = answers(found, 'a', 'exit', 'slow')
        assert [a.outcome for a in first] == ['reply', 'error', 'timeout']
        assert contents(first)[1:] == [['error: SystemExit: 3'], None]
        second = answers(found, 'b', 'b')
        assert contents(first)[0] == contents(second)[0] == contents(second)[1]


# What a tool can do wrong, and what becomes of it.


def nothing():
    """A generator that has ended."""
    return
    yield


class Unprintable(Exception):
    def __str__(self):
        raise KeyboardInterrupt


FAULTS = {
    'value': lambda: int('x'),
    'stop': lambda: next(nothing()),
    'exit': lambda: sys.exit(0),
    'interrupt': lambda: (_ for _ in ()).throw(KeyboardInterrupt()),
    'unprintable': lambda: (_ for _ in ()).throw(Unprintable()),
    'leave': lambda: os._exit(0),
    'recursion': lambda: FAULTS['recursion'](),
    'spin': lambda: [None for _ in iter(int, 1)],
    'sleep': lambda: time.sleep(6),
    'bytes': lambda: b'\xff',
    'number': lambda: 3.5,
    'list': lambda: ['a'],
    'object': object,
    'generator': nothing,
    'surrogate': lambda: 'a\ud800b\ud83d\ude00',
    'megabytes': lambda: 'x' * 3_000_000,
    'empty': lambda: '',
    'print': lambda: print('\x1b[2Jnoise' * 10_000) or 'printed',
}
EXPECTED = {
    'value': ('error', "ValueError: invalid literal for int() with base 10: 'x'"),
    'stop': ('error', 'StopIteration'),
    'exit': ('error', 'SystemExit: 0'),
    'interrupt': ('error', 'KeyboardInterrupt'),
    'unprintable': ('error', 'Unprintable: (its message cannot be made: KeyboardInterrupt)'),
    'leave': ('error', 'SystemExit: 0'),
    'recursion': ('error', 'RecursionError: '),
    'spin': ('timeout', 'it did not return within its deadline of 1 s'),
    'sleep': ('timeout', 'it did not return within its deadline of 1 s'),
    'bytes': ('not_text', 'it returned a value of type bytes: return a text'),
    'object': ('not_text', 'it returned a value of type object: return a text'),
    'generator': ('not_text', 'it returned a value of type generator: return a text'),
}
NOT_TEXT = {'number': 'float', 'list': 'list'}  # which a tool writes as JSON


class Faulty:
    def reply(self, text):
        return FAULTS[text]()


def faulty(prompts, completions, turns):
    return [FAULTS[text]() for text in completions]


def faulty_tool(kind: str) -> str:
    """Do something wrong.

    Args:
        kind: What to do.
    """
    return FAULTS[kind]()


@pytest.mark.parametrize('name', ['Faulty', 'faulty', 'faulty_tool'])
def test_every_fault_is_an_outcome_of_its_turn_alone(name, capfd):
    tool = name == 'faulty_tool'
    stream = type(sys.stdout)
    expected = EXPECTED if tool else EXPECTED | {
        kind: ('not_text', f'it returned a value of type {cls}') for kind, cls in NOT_TEXT.items()
    }  # fmt: skip
    texts = [f"faulty_tool('{kind}')" if tool else kind for kind in FAULTS]
    with started(name, *[{}] * len(FAULTS), seconds=1.0) as found:
        got = dict(zip(FAULTS, answers(found, *texts), strict=True))
        said = {k: a.messages and a.messages[0]['content'] for k, a in got.items()}
        for kind, (outcome, text) in expected.items():
            assert got[kind].outcome == outcome, kind
            assert got[kind].detail.removeprefix('faulty_tool: ').startswith(text), kind
            if outcome == 'timeout' and name == 'Faulty':
                assert said[kind] is None  # its object is in use
            else:
                assert said[kind].startswith(f'error: {text}'), kind
        for kind in FAULTS.keys() - expected.keys():
            assert got[kind].outcome == 'reply', kind
        assert said['surrogate'] == 'a\ufffdb\U0001f600'
        assert 'surrogates' in got['surrogate'].detail
        assert said['megabytes'] == 'x' * LONGEST_REPLY
        assert f'cut from 3000000 to {LONGEST_REPLY} characters' in got['megabytes'].detail
        assert (said['empty'], said['print']) == ('', 'printed')
        if tool:
            assert (said['number'], said['list']) == ('3.5', '["a"]')
        alive = [None if a.messages is None else 'empty' for a in got.values()]
        again = answers(found, *[t and ("faulty_tool('empty')" if tool else t) for t in alive])
        assert {a.outcome for a in again} == {'reply'}
    printed = capfd.readouterr().out
    assert '\x1b' not in printed
    assert len(printed) < 30_000
    assert 'prints more, which is left out' in printed
    assert type(sys.stdout) is stream


class Wandering:
    def reply(self, text):
        os.chdir('/')
        return os.getcwd()

    def close(self):
        os._exit(3)


def test_the_folder_is_restored_and_the_program_goes_on(tmp_path, monkeypatch, caplog):
    monkeypatch.chdir(tmp_path)
    with started('Wandering', {}) as found:
        assert contents(answers(found, 'x')) == [['/']]
    assert os.getcwd() == str(tmp_path)
    assert 'close: SystemExit: 3' in caplog.text
    assert os._exit.__module__ != 'grpo_jax.rewards.guards'


def test_a_failure_can_end_the_episode():
    with started('faulty', {}, {}, on_error='end') as found:
        got = answers(found, 'value', 'empty')
        assert contents(got) == [None, ['']]
        assert [a.outcome for a in got] == ['error', 'reply']


def wrong_length(prompts, completions, turns):
    return ['x'] * (len(completions) if len(completions) == 1 else 1)


def test_a_list_of_the_wrong_length_is_asked_for_again_turn_by_turn():
    with started('wrong_length', {}, {}) as found:
        assert contents(answers(found, 'a', 'b')) == [['x'], ['x']]


class BadBeginning:
    def __init__(self, *, fault='init'):
        self.fault = fault
        if fault == 'init':
            raise ValueError('no server')

    def reset(self, **columns):
        if self.fault == 'reset':
            raise ValueError('no game')
        return 'You are in a room.' if self.fault == 'text' else 'prompt 0'

    def reply(self, text):
        return 'ok'


@pytest.mark.parametrize(
    ('fault', 'outcome', 'detail'),
    [
        ('init', 'error', 'ValueError: no server (test_environments_episodes.py:'),
        ('reset', 'error', 'ValueError: no game (test_environments_episodes.py:'),
        ('text', 'not_text', "reset returned 'You are in a room.', which is not in the prompt"),
    ],
)
def test_an_episode_that_cannot_begin_is_over(fault, outcome, detail):
    with started('BadBeginning', {}, options={'fault': fault}) as found:
        (answer,) = answers(found, 'x')
    assert (answer.messages, answer.outcome) == (None, outcome)
    assert answer.detail.startswith(detail)


def test_what_reset_returns_may_be_in_the_prompt():
    with started('BadBeginning', {}, options={'fault': ''}) as found:
        assert contents(answers(found, 'x')) == [['ok']]


class Slow:
    most_calls = 2
    running: ClassVar = []
    most: ClassVar = []

    def reply(self, text):
        self.running.append(text)
        self.most.append(len(self.running))
        time.sleep(float(text))
        self.running.remove(text)
        return text


def test_calls_run_beside_each_other_and_replies_come_when_they_are_there():
    HERE.Slow.most.clear()
    with started('Slow', {}, {}, {}, {}) as found:
        found.submit([EndedTurn(n, s) for n, s in enumerate(['1.0', '0.02', '0.01', '0.03'])])
        assert found.ready() == []
        first = found.ready(WAIT)
        assert [a.completion for a in first] == [1]
        rest = []
        while len(rest) < 3:
            rest += found.ready(WAIT)
        assert [a.completion for a in rest][-1] == 0  # the others did not wait for it
    assert max(HERE.Slow.most) == 2


class Spinning:
    def reply(self, text):
        while True:
            pass


def test_python_code_that_does_not_end_is_ended(monkeypatch):
    monkeypatch.setattr(episodes, '_hung', [])
    with started('Spinning', {}, seconds=0.3) as found:
        assert [a.outcome for a in answers(found, 'x')] == ['timeout']
        (thread,) = episodes._hung
        thread.join(WAIT)
        assert not thread.is_alive()


class Stuck:
    def reply(self, text):
        time.sleep(5)

    def close(self):
        time.sleep(5)


def test_leaving_does_not_wait_for_what_hangs(caplog):
    before = time.monotonic()
    with started('Stuck', {}, seconds=0.3) as found:
        found.submit([EndedTurn(0, 'x')])
        (answer,) = found.ready(WAIT)
        assert answer.outcome == 'timeout'
    assert time.monotonic() - before < 4
    assert 'do not end' in caplog.text


def test_too_many_calls_that_hang_are_followed_by_none(monkeypatch):
    monkeypatch.setattr(episodes, 'MOST_HUNG', 1)
    monkeypatch.setattr(episodes, '_hung', [])
    with started('Stuck', {}, {}, seconds=0.3) as found:
        assert [a.outcome for a in answers(found, 'x')] == ['timeout']
        (answer,) = answers(found, None, 'x')
        assert answer.outcome == 'refused'
        assert '1 earlier calls go on' in answer.detail


def test_wrong_use_is_an_error():
    with started('Stateful', {'start': 1}) as found:
        with pytest.raises(ValueError, match='episode 0 has been started before'):
            found.start(0, '', {})
        with pytest.raises(ValueError, match='episode 7, which is not started'):
            found.submit([EndedTurn(7, 'x')])
        with pytest.raises(ValueError, match='two turns of one episode'):
            found.submit([EndedTurn(0, '1'), EndedTurn(0, '2')])
        assert contents(answers(found, '1')) == [['2']]  # nothing was begun by these


def test_answers_are_a_contract():
    assert environments.Answer._fields == (
        'completion', 'messages', 'outcome', 'detail', 'seconds', 'calls', 'reward',
    )  # fmt: skip
    with started('batch', {'number': 1}) as found:
        (answer,) = answers(found, 'a')
    assert answer.seconds >= 0
    assert answer.outcome in environments.OUTCOMES
