"""Scores of a batch: weights, what may be returned, async functions, every error."""

import asyncio
import functools
import sys

import numpy as np
import pytest

from grpo_jax import rewards
from grpo_jax.rewards import RewardError, equivalent, score, statistics


def run(functions, weights=None, n=2, **kwargs):
    arguments = {
        'prompts': [f'p{i}' for i in range(n)],
        'completions': [f'c{i}' for i in range(n)],
        'columns': {'answer': [str(i) for i in range(n)]},
    }
    weights = dict.fromkeys(functions, 1.0) if weights is None else weights
    return score(functions, weights, **{**arguments, **kwargs})


def constant(*values):
    return lambda **_: list(values)


def test_score_adds_weighted_parts_over_the_functions_that_apply():
    functions = {'a': constant(1.0, None, 3), 'b': constant(True, 5, None)}
    scores = run(functions, {'a': 2, 'b': -0.5}, 3)
    np.testing.assert_array_equal(scores.total, np.array([1.5, -2.5, 6], np.float32))
    np.testing.assert_array_equal(scores.parts['a'], np.array([1, np.nan, 3], np.float32))
    np.testing.assert_array_equal(scores.parts['b'], np.array([1, 5, np.nan], np.float32))
    assert scores.total.dtype == scores.parts['a'].dtype == np.float32
    assert list(scores.parts) == ['a', 'b']


def test_statistics_over_rows_that_apply():
    parts = {'a': np.array([1, np.nan, 3], np.float32), 'none': np.full(3, np.nan, np.float32)}
    metrics = statistics(rewards.Scores(np.zeros(3, np.float32), parts))
    assert metrics == {'rewards/a/mean': 2.0, 'rewards/a/std': 2**0.5}  # of 1 and 3, as a sample
    assert all(type(value) is float for value in metrics.values())
    parts = {'a': np.array([np.nan, 4.0], np.float32)}
    metrics = statistics(rewards.Scores(np.zeros(2, np.float32), parts))
    assert metrics == {'rewards/a/mean': 4.0, 'rewards/a/std': 0.0}


def test_score_of_no_rows():
    scores = run({'a': constant()}, n=0)
    assert scores.total.shape == scores.parts['a'].shape == (0,)
    assert statistics(scores) == {}


@pytest.mark.parametrize(
    'returned',
    [(0.5, 2), np.array([0.5, 2]), np.array([0.5, 2], np.float32), [np.float32(0.5), np.array(2)]],
)
def test_score_takes_lists_tuples_and_arrays(returned):
    np.testing.assert_array_equal(run({'a': lambda **_: returned}).total, [0.5, 2])


def test_functions_of_the_trl_form_run_unmodified():
    def overlong(completion_ids, **kwargs):
        return [min(0.0, (2 - len(ids)) / 2) for ids in completion_ids]

    def names_its_column(completions, answer, **kwargs):
        return [float(c.endswith(a)) for c, a in zip(completions, answer, strict=True)]

    class Instance:
        def __call__(self, prompts, completions, completion_ids, **kwargs):
            assert sorted(kwargs) == ['answer', 'level']
            return [None if level == 'hard' else 1.0 for level in kwargs['level']]

    scores = run(
        {'overlong': overlong, 'column': names_its_column, 'instance': Instance()},
        columns={'answer': ['0', 'x'], 'level': ['easy', 'hard']},
        completion_ids=[[5, 6, 7], [5]],
    )
    np.testing.assert_array_equal(scores.total, [-0.5 + 1 + 1, 0 + 0])


def test_completion_ids_are_left_out_where_there_are_none():
    run({'a': lambda prompts, completions, answer: [1, 2]})
    with pytest.raises(RewardError, match='called with prompts, completions, answer, raised TypeE'):
        run({'a': lambda completion_ids, **_: [1, 2]})


def test_a_function_cannot_change_what_another_one_sees():
    def vandal(prompts, completions, answer):
        completions.clear()
        answer[0] = 'x'
        return [0, 0]

    def reader(prompts, completions, answer):
        return [float(completions == ['c0', 'c1']), float(answer == ['0', '1'])]

    np.testing.assert_array_equal(run({'v': vandal, 'r': reader}).total, [1, 1])


def test_async_functions_run_together_even_inside_an_event_loop():
    async def whole():
        # Each waits for the other, so neither could end if they ran one after the other.
        state = {}

        def waiting(mine, other):
            async def reward(completions, **_):
                state[mine] = True
                while other not in state:
                    await asyncio.sleep(0)
                return [1.0] * len(completions)

            return reward

        functions = {'a': waiting('a', 'b'), 'sync': constant(1, 2), 'b': waiting('b', 'a')}
        return run(functions, {'a': 1, 'sync': 10, 'b': 100})

    scores = asyncio.run(whole())
    np.testing.assert_array_equal(scores.total, [111, 121])
    assert list(scores.parts) == ['a', 'sync', 'b']


def wrapped(function):
    return lambda *arguments, **columns: function(*arguments, **columns)


class Callable:
    def __init__(self, function):
        self.function = function

    async def __call__(self, **columns):
        return await self.function(**columns)


async def scaled(completions, *, scale=1.0, **_):
    await asyncio.sleep(0)
    return [scale] * len(completions)


@pytest.mark.parametrize(
    'function',
    [
        scaled,
        functools.partial(scaled, scale=1.0),
        functools.partial(functools.partial(scaled), scale=1.0),
        wrapped(scaled),
        functools.wraps(scaled)(wrapped(scaled)),
        wrapped(functools.partial(scaled)),
        Callable(scaled),
        functools.partial(Callable(scaled), scale=1.0),
        wrapped(Callable(scaled)),
        Callable(scaled).__call__,
    ],
)
def test_async_functions_inside_wrappers(function):
    np.testing.assert_array_equal(run({'a': function, 'b': constant(1, 2)}).total, [2, 3])


@pytest.mark.filterwarnings('error')
def test_nothing_is_left_unawaited_after_an_error():
    with pytest.raises(RewardError, match=r"reward 'b'.* raised KeyError"):
        run({'a': scaled, 'b': failure})


def leaving(**_):
    sys.exit(0)


async def async_leaving(**_):
    sys.exit()


async def cancelled(**_):
    raise asyncio.CancelledError


@pytest.mark.parametrize(
    ('function', 'error'),
    [(leaving, 'SystemExit: 0'), (async_leaving, 'SystemExit'), (cancelled, 'CancelledError')],
)
def test_a_reward_that_ends_the_program_is_an_error(function, error):
    with pytest.raises(RewardError, match=f"reward 'bad', .* raised {error}"):
        run({'bad': function})
    with pytest.raises(RewardError, match=f"step rewards 'bad', .* raised {error}"):
        rewards.score_steps('bad', function, ['p'], ['c'], {})


def test_a_reward_that_raises_is_found(tmp_path):
    """The error names the last line in the user's file, of a function, an async one and a step."""
    (tmp_path / 'my.py').write_text("""import json

def reward(completions, **columns):
    return [json.loads(text) for text in completions]

async def waiting(completions, **columns):
    return reward(completions)

def extract(text):
    return 1 / 0
""")
    found = r'raised JSONDecodeError: .* \(my.py:4\)$'
    for name in ('reward', 'waiting'):
        function = rewards.resolve(f'{tmp_path}/my.py:{name}')
        with pytest.raises(RewardError, match=found):
            run({'bad': function})
        with pytest.raises(RewardError, match=found):
            rewards.score_steps('bad', function, ['p'], ['c'], {})
    with pytest.raises(RewardError, match=r'ZeroDivisionError: division by zero \(my.py:10\)$'):
        rewards.extract_answers(rewards.extractor(f'{tmp_path}/my.py:extract'), ['a'])
    with pytest.raises(
        RewardError, match=r"raised TypeError: .*unexpected keyword argument 'p\w+'$"
    ):
        run({'bad': lambda completions: [1, 2]})


def test_an_interrupt_names_the_reward():
    def interrupted(**_):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt) as caught:
        run({'slow': interrupted})
    assert caught.value.__notes__ == ["reward 'slow' was running"]


async def async_failure(**_):
    raise KeyError('gone')


async def async_narrow(prompts):
    return [1, 2]


def failure(**_):
    raise KeyError('gone')


@pytest.mark.parametrize(
    ('function', 'message'),
    [
        (failure, "reward 'bad'.* raised KeyError: 'gone'"),
        (async_failure, "reward 'bad'.* raised KeyError: 'gone'"),
        (async_narrow, "reward 'bad'.* raised TypeError: .*unexpected keyword"),
        (constant(1), "reward 'bad' returned 1 values for 2 completions"),
        (constant(1, 2, 3), "reward 'bad' returned 3 values for 2 completions"),
        (constant(), "reward 'bad' returned 0 values"),
        (lambda **_: None, "reward 'bad' returned None, a NoneType"),
        (lambda **_: 1.0, "reward 'bad' returned 1.0, a float"),
        (lambda **_: np.array(1.0), "reward 'bad' returned array.* a ndarray"),
        (lambda **_: {0: 1.0, 1: 2.0}, "reward 'bad' returned {0: 1.0, 1: 2.0}, a dict"),
        (lambda **_: '12', "reward 'bad' returned '12', a str"),
        (lambda **_: iter([1, 2]), "reward 'bad' returned <list_iterator"),
        (constant(1, 'x'), "reward 'bad' returned 'x' for row 1 .prompt 'p1', completion 'c1'"),
        (constant(float('nan'), 1), "reward 'bad' returned nan for row 0"),
        (constant(1, -np.inf), "reward 'bad' returned -inf for row 1"),
        (lambda **_: np.array([1, np.nan]), "reward 'bad' returned nan for row 1"),
        (constant(1e39, 1), "reward 'bad' returned 1e[+]39 for row 0"),
        (constant(10**400, 1), "reward 'bad' returned 1000.* for row 0"),
        (constant(1, [2]), "reward 'bad' returned .2. for row 1"),
        (lambda **_: np.ones((2, 1)), r"reward 'bad' returned \[1.0\] for row 0"),
        (constant(1j, 1), "reward 'bad' returned 1j for row 0"),
    ],
)
def test_score_names_the_function_that_is_wrong(function, message):
    with pytest.raises(RewardError, match=message):
        run({'bad': function})


def test_a_row_without_a_reward_is_skipped_and_counted():
    scores = run({'a': constant(1, None), 'b': constant(None, None)}, {'a': 2, 'b': 3})
    np.testing.assert_array_equal(scores.total, [2, np.nan])
    metrics = statistics(scores)
    assert metrics['rewards/skipped'] == 1.0
    assert metrics['rewards/a/mean'] == 1.0
    assert 'rewards/b/mean' not in metrics
    assert 'rewards/skipped' not in statistics(run({'a': constant(1, 2)}))


@pytest.mark.parametrize(
    ('weights', 'message'),
    [
        ({}, r"\['a'\] and weights \[\] differ"),
        ({'a': 1, 'b': 1}, r"weights \['a', 'b'\] differ"),
        ({'a': float('nan')}, "weight of reward 'a' is nan"),
        ({'a': '1'}, "weight of reward 'a' is '1'"),
        ({'a': True}, "weight of reward 'a' is True"),
        ({'a': 10**400}, "weight of reward 'a' is 1000"),
        ({'a': 3e38}, 'weighted sum for row 1 .* does not fit float32'),
    ],
)
def test_score_rejects_weights(weights, message):
    with pytest.raises(RewardError, match=message):
        run({'a': constant(1, 2)}, weights)


@pytest.mark.parametrize(
    ('kwargs', 'message'),
    [
        ({'completions': ['c']}, 'completions has 1 rows, prompts 2'),
        ({'columns': {'answer': ['1', '2', '3']}}, 'answer has 3 rows, prompts 2'),
        ({'completion_ids': [[1]]}, 'completion_ids has 1 rows, prompts 2'),
        ({'columns': {'prompts': ['1', '2']}}, "column 'prompts' is the name of a reward argument"),
        ({'columns': {'completion_ids': [[1], [2]]}}, "column 'completion_ids' is the name"),
    ],
)
def test_score_rejects_inputs_that_do_not_fit(kwargs, message):
    with pytest.raises(RewardError, match=message):
        run({'a': constant(1, 2)}, **kwargs)


def test_score_without_functions():
    with pytest.raises(RewardError, match='no reward functions'):
        run({})


def test_comparisons_that_time_out_are_counted():
    def slow(completions, **_):
        return [float(equivalent('x+x', text, seconds=1.0)) for text in completions]

    scores = run({'slow': slow}, completions=['9^{9^{9^9}}', '2x'])
    np.testing.assert_array_equal(scores.total, [0, 1])
    assert scores.timeouts == 1
    assert statistics(scores)['rewards/timeouts'] == 1.0
    assert 'rewards/timeouts' not in statistics(run({'a': constant(1, 2)}))


def test_differences_that_float32_rounds_away(caplog):
    """20,000,001 is no float32; nor are the differences below what an advantage is made of."""
    functions = {'points': lambda completions, **_: [20_000_000, 20_000_001]}
    arguments = {'prompts': ['a', 'b'], 'completions': ['c', 'd'], 'columns': {}}
    scores = score(functions, {'points': 1.0}, **arguments)
    assert scores.total[0] == scores.total[1]
    assert (
        'rewards from 20000000.0 to 20000001.0 are rounded to float32, which changes' in caplog.text
    )
    caplog.clear()
    for values in ([0.1 + 0.2, 0.3], [5000.0001, 5003.0], [1e30, 2e30], [1, 1]):
        functions = {'points': lambda completions, values=values, **_: values}
        score(functions, {'points': 1.0}, **arguments)
    assert not caplog.text
