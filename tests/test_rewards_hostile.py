"""Hostile reward functions: each is an error or None for its completions, and none ends the run."""

import dataclasses
import functools
import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import hostile_rewards
import numpy as np
import pytest
from hostile_rewards import ASYNC, DEADLY, ENDLESS, FAILING, HARMFUL

from grpo_jax import plugins, rewards
from grpo_jax.rewards import CallOptions, RewardError, deadlines, isolated, output, score

# Two groups of two; the last completion of the first one is hostile.
COMPLETIONS = ['a', 'b', 'c', 'd']
SECONDS = 0.5  # of a call that does not end; the others need not be that fast
SLOW = {*ENDLESS, *ASYNC, hostile_rewards.never_returns_from_c}


def run(function, *, completions=COMPLETIONS, most_failed=None, **options):
    options = {'timeout': SECONDS if function in SLOW else 60.0, **options}
    return score(
        {'f': function, 'one': lambda completions, **_: [1.0] * len(completions)},
        {'f': 1.0, 'one': 0.5},
        prompts=['p', 'p', 'q', 'q'],
        completions=completions,
        columns={},
        group_size=2,
        calls={'f': CallOptions(**options)},
        most_failed=most_failed,
    )


def in_processes(function):
    """Options of a function that is called in one worker process."""
    return {'isolated': True, 'path': f'hostile_rewards:{function.__name__}'}


@pytest.fixture(autouse=True)
def short_grace(monkeypatch):
    monkeypatch.setattr(deadlines, '_abandoned', [])
    monkeypatch.setattr('grpo_jax.rewards.attempts.GRACE', 0.5)


@pytest.fixture(scope='module', autouse=True)
def pools():
    """One worker for each function: starting one takes a second."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(isolated, 'ProcessPool', functools.partial(isolated.ProcessPool, size=1))
        yield
    for pool in isolated._pools.values():
        pool.close()


@pytest.fixture(autouse=True)
def folder_of_this_file():
    before = plugins.folders()
    plugins.set_folders([Path(__file__).parent])
    yield
    plugins.set_folders(before)


@pytest.mark.parametrize('function', [*FAILING, *ASYNC], ids=lambda f: f.__name__)
def test_a_failure_is_an_error_that_names_the_function(function):
    with pytest.raises(RewardError, match=r"^reward 'f'") as caught:
        run(function)
    message = str(caught.value)
    assert len(message) < 3000
    assert message == output.printable(message)


@pytest.mark.parametrize('function', [*FAILING, *ASYNC], ids=lambda f: f.__name__)
def test_a_failure_leaves_the_other_completions_their_rewards(function):
    scores = run(function, on_error='none')
    lost = 1 if function.__name__ in ('nan', 'infinite', 'strings', 'objects') else 2
    expected = [1.5 if lost == 1 else np.nan, np.nan, 1.5, 1.5]
    if function is hostile_rewards._blocks:  # the event loop is that of all async functions
        lost, expected = 4, [np.nan] * 4
    np.testing.assert_array_equal(scores.total, np.array(expected, np.float32))
    np.testing.assert_array_equal(scores.parts['one'], np.ones(4, np.float32))
    assert scores.failures['f'].number == lost
    assert scores.failures['f'].first.startswith("reward 'f'")
    assert rewards.statistics(scores)['rewards/f/failed'] == lost


def test_each_completion_alone():
    scores = run(hostile_rewards.raises, on_error='none', per='completion')
    np.testing.assert_array_equal(scores.total, np.array([1.5, np.nan, 1.5, 1.5], np.float32))
    assert scores.failures['f'].number == 1


@pytest.mark.parametrize('function', DEADLY, ids=lambda f: f.__name__)
def test_what_would_end_the_process_ends_a_worker(function):
    scores = run(function, on_error='none', memory=2.0, **in_processes(function))
    np.testing.assert_array_equal(scores.total, np.array([np.nan] * 2 + [1.5] * 2, np.float32))
    again = run(function, completions=list('acde'), **in_processes(function), memory=2.0)
    np.testing.assert_array_equal(again.total, [1.5] * 4)


def test_isolated_failures_have_messages():
    for function, text in (
        (hostile_rewards.raises, r'it raised ValueError: no .* \(hostile_rewards.py:\d+\)'),
        (hostile_rewards.segfault, 'its worker process ended'),
        (hostile_rewards.nan, 'returned nan for row 1'),
    ):
        with pytest.raises(RewardError, match=f"reward 'f'.*{text}"):
            run(function, **in_processes(function))


def test_isolated_functions_see_what_others_see(tmp_path):
    (tmp_path / 'mine.py').write_text(
        'import numpy as np\n'
        'async def f(prompts, completions, level, trainer_state, log_metric, log_extra, *, k=1,'
        ' **_):\n'
        '    print("hidden")\n'
        '    log_metric("seen", len(completions))\n'
        '    log_extra("level", level)\n'
        '    return np.array([k * trainer_state.global_step + len(p) for p in prompts])\n'
    )
    plugins.set_folders([tmp_path])
    spec = {'mine:f': {'weight': 2.0, 'k': 10, 'call': {'isolated': True}}}
    functions, weights = rewards.build(spec)
    calls = rewards.call_options(spec, functions, dataclasses.asdict(CallOptions()))
    calls = {name: dataclasses.replace(c, timeout=60.0) for name, c in calls.items()}
    scores = score(
        functions, weights, prompts=['p', 'p', 'qq', 'qq'], completions=COMPLETIONS,
        columns={'level': [1, {'a': b'x'}, None, 2.5]}, trainer_state=rewards.TrainerState(3),
        group_size=2, calls=calls,
    )  # fmt: skip
    np.testing.assert_array_equal(scores.total, [62, 62, 64, 64])
    assert scores.logs.metrics == {'seen': [2.0, 2.0]}
    assert scores.logs.extra['level'][2:] == [None, 2.5]


@pytest.mark.parametrize('function', HARMFUL, ids=lambda f: f.__name__)
def test_harm_is_undone(function, capsys, caplog):
    folder, dumps = os.getcwd(), json.dumps
    assert run(function).total.tolist() == [1.5] * 4
    assert os.getcwd() == folder
    assert json.dumps is dumps
    printed = ''.join(capsys.readouterr())
    assert len(printed) < 2 * output.LIMIT + 200
    assert printed == output.printable(printed)
    if function is hostile_rewards.prints_megabytes:
        assert "reward 'f' prints more" in printed


def test_what_is_written_to_descriptors_of_a_worker_is_lost(capfd):
    function = hostile_rewards.writes_megabytes_to_descriptors
    assert run(function, **in_processes(function)).total.tolist() == [1.5] * 4
    assert capfd.readouterr() == ('', '')


def test_retries():
    failures = iter([True, True, False, True, False, False, False, False])

    def flaky(completions, log_metric, **_):
        log_metric('tries', 1.0)
        if next(failures):
            raise OSError('not now')
        return [1.0] * len(completions)

    assert run(flaky, retries=2).logs.metrics == {'tries': [1.0]}  # of the attempt that counts
    with pytest.raises(RewardError, match='raised OSError: not now'):
        run(flaky)
    scores = run(flaky, retries=1, on_error='none')
    assert not scores.failures
    assert list(failures) == [False, False]  # one for each group

    async def later(completions, **_):
        if next(bad):
            raise OSError('not now')
        return [1.0] * len(completions)

    bad = iter([True, False])
    assert not run(later, retries=1).failures


def test_too_many_failures():
    options = {'on_error': 'none'}
    assert run(hostile_rewards.raises, most_failed=2, **options).failures['f'].number == 2
    message = r"reward 'f' failed on 2 completions of a step, and grpo.reward_calls.max_failed "
    with pytest.raises(RewardError, match=f'{message}allows 1; the first error: reward .f.*Value'):
        run(hostile_rewards.raises, most_failed=1, **options)
    joined = rewards.join_failures([
        {'f': rewards.Failures(2, 'x')}, {}, {'f': rewards.Failures(1, 'y')},
    ])  # fmt: skip
    assert joined == {'f': rewards.Failures(3, 'x')}
    rewards.check_failures(joined, 3)
    with pytest.raises(RewardError, match='allows 2; the first error: x'):
        rewards.check_failures(joined, 2)


def test_a_failed_function_without_weight_takes_no_reward_away():
    scores = score(
        {'f': hostile_rewards.raises, 'one': lambda completions, **_: [1.0] * len(completions)},
        {'f': 0.0, 'one': 0.5}, prompts=['p'] * 4, completions=COMPLETIONS, columns={},
        group_size=2, calls={'f': CallOptions(on_error='none')},
    )  # fmt: skip
    assert scores.total.tolist() == [0.5] * 4


def test_outside_of_the_main_thread_a_call_is_abandoned():
    release, errors = threading.Event(), []

    def waits(completions, **_):
        release.wait(60)
        return [1.0] * len(completions)

    def calls():
        for _ in range(deadlines.MAX_ABANDONED + 1):
            try:
                run(waits, timeout=0.05)
            except RewardError as error:
                errors.append(str(error))

    thread = threading.Thread(target=calls)
    thread.start()
    thread.join(60)
    release.set()
    assert "reward 'f': it did not return within its deadline of 0.05 s" in errors[0]
    assert f'{deadlines.MAX_ABANDONED + 1} calls go on after their deadlines' in errors[-1]
    assert 'isolated=True' in errors[-1]


def test_what_cannot_be_interrupted_ends_the_program_with_a_line():
    code = (
        'from grpo_jax.rewards import deadlines\n'
        'deadlines.GRACE = 1\n'
        'import signal, time\n'
        'def stubborn():\n'
        '    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGURG, signal.SIGVTALRM])\n'
        '    time.sleep(1000)\n'
        'deadlines.call_within(0.2, "reward x", stubborn)\n'
    )
    ended = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, timeout=60)
    assert ended.returncode == 2
    assert ended.stderr.startswith('error: reward x did not return within its deadline of 0.2 s')
    assert ended.stderr.count('\n') == 1


def test_a_deadline_that_is_met_leaves_nothing():
    before = threading.active_count()
    for _ in range(20):
        assert deadlines.call_within(60.0, 'x', lambda: 1) == 1
    end = time.monotonic() + 60
    while threading.active_count() > before and time.monotonic() < end:
        time.sleep(0.01)
    assert threading.active_count() <= before


def test_extractors():
    with pytest.raises(RewardError, match=r"extractor 'slow': it did not return within .* 0.2 s"):
        rewards.extract_answers(slow, ['x'], timeout=0.2)


def slow(text):
    time.sleep(1000)


@pytest.mark.parametrize(
    ('value', 'message'),
    [
        ({'timeout': -1.0}, r'grpo\.rewards\.f\.call: timeout=-1.0: give seconds'),
        ({'timeout': 'x'}, "timeout='x': give a value of type float"),
        ({'timeout': float('nan')}, 'timeout=nan: give seconds'),
        ({'timeout': 0.0, 'isolated': True}, 'timeout=0 with isolated=True'),
        ({'retries': 1.5}, 'retries=1.5: give a value of type int'),
        ({'retries': True}, 'retries=True: give a value of type int'),
        ({'on_error': 'skip'}, "on_error='skip' is unknown: use one of stop, none"),
        ({'per': 'batch'}, "per='batch' is unknown: use one of group, completion"),
        ({'isolated': 1}, 'isolated=1: give a value of type bool'),
        ({'memory': 0.0}, 'memory=0.0: give a number of GiB'),
        ({'timeouts': 1.0}, "call has no option 'timeouts', did you mean 'timeout'"),
        ({'path': 'x'}, "call has no option 'path'"),
        (3.0, r"grpo\.rewards\.f\.call=3.0: give options, such as \{'timeout'"),
    ],
)
def test_wrong_options(value, message):
    spec = {'f': {'weight': 1.0, 'function': hostile_rewards.raises, 'call': value}}
    functions, _ = rewards.build(spec)
    with pytest.raises(RewardError, match=message):
        rewards.call_options(spec, functions, {})


def test_options_of_the_config_and_of_a_function():
    spec = {
        'a': {'weight': 1.0, 'function': hostile_rewards.raises, 'call': {'retries': 3}},
        'math_answer': 1.0,
    }
    functions, _ = rewards.build(spec)
    calls = rewards.call_options(spec, functions, {'timeout': 5.0, 'isolated': True})
    assert calls['a'] == CallOptions(
        5.0, retries=3, isolated=True, path=plugins.path_of(hostile_rewards.raises)
    )
    assert calls['math_answer'] == CallOptions(5.0)  # a built-in function does no harm
    with pytest.raises(RewardError, match=r'grpo\.reward_calls: retries=-1'):
        rewards.call_options(spec, functions, {'retries': -1})
    lambdas = {'f': {'weight': 1.0, 'function': lambda **_: [], 'call': {'isolated': True}}}
    with pytest.raises(RewardError, match=r"reward 'f' with isolated=True: .*define it at the top"):
        rewards.call_options(lambdas, rewards.build(lambdas)[0], {})
