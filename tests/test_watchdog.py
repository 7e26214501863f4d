"""The process that ends a program which a function has left unable to go on, with a line."""

import os
import re
import signal
import subprocess
import sys
import time

import pytest

HEAD = """
import atexit, ctypes, itertools, os, signal, sys, threading, time
from grpo_jax.rewards import deadlines, watchdog
deadlines.GRACE, watchdog.SILENCE, watchdog._BEAT = 1, 1.5, 0.2
def holds_the_lock():
    sum(itertools.repeat(0))
def closes_descriptors():
    os.closerange(0, 4096)
def segfault():
    ctypes.string_at(0)
def ends_before(handler, *arguments):  # an exit handler that is older than this library
    end = watchdog._end_at_exit
    atexit.unregister(end)
    atexit.register(handler, *arguments)
    atexit.register(end)
"""


def run(code):
    """The status, and the lines on standard error; waits until the watching process ends too."""
    command = [sys.executable, '-c', HEAD + code]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=120)
    return ended.returncode, [line for line in ended.stderr.splitlines() if line]


@pytest.mark.parametrize(
    ('function', 'status', 'line'),
    [
        (
            'holds_the_lock', signal.SIGKILL,
            'error: reward x did not return in time and lets nothing else run, so the '
            'program was killed, with the checkpoints that it has: call it in another process, as '
            'isolated=True does for a reward',
        ),
        (
            'closes_descriptors', signal.SIGKILL,
            'error: reward x has closed the file descriptors of the program, so the program was '
            'killed, with the checkpoints that it has: call it in another process, as '
            'isolated=True does for a reward',
        ),
        (
            'segfault', signal.SIGSEGV,
            'error: the program ended during a call of reward x; if it crashed there, call it in '
            'another process, as isolated=True does for a reward',
        ),
    ],
)  # fmt: skip
def test_a_function_that_ends_the_program_is_named(function, status, line):
    seconds = 0.2 if function == 'holds_the_lock' else 0
    found, lines = run(f'deadlines.call_within({seconds}, "reward x", {function})')
    assert (found, lines) == (-status, [line])


@pytest.mark.slow
def test_also_in_another_thread():
    found, lines = run(
        'def call():\n'
        '    deadlines.call_within(0.2, "reward x", holds_the_lock)\n'
        'threading.Thread(target=call).start()\n'
    )
    assert found == -signal.SIGKILL
    assert lines[0].startswith('error: reward x did not return in time')


@pytest.mark.parametrize(
    ('call', 'status', 'line'),
    [
        pytest.param(
            'sum(itertools.repeat(0))', signal.SIGKILL,
            "error: environment 'reply' did not return in time and lets nothing else run, so the "
            'program was killed, with the checkpoints that it has: call it in another process, as '
            'isolated=True does for a reward',
            marks=pytest.mark.slow,
        ),
        (
            'ctypes.string_at(0)', signal.SIGSEGV,
            "error: the program ended during a call of environment 'reply'; if it crashed there, "
            'call it in another process, as isolated=True does for a reward',
        ),
    ],
)  # fmt: skip
def test_an_environment_that_ends_the_program_is_named(call, status, line, tmp_path):
    (tmp_path / 'env.py').write_text(
        f'import ctypes, itertools\ndef reply(prompts, completions, **_):\n    {call}\n'
    )
    found, lines = run(
        'from grpo_jax import environments\n'
        'from grpo_jax.environments import episodes\n'
        'episodes.GRACE = 1\n'
        f'made = environments.build("{tmp_path}/env.py:reply", {{}}, turns=2, seconds=0.5)\n'
        'with made.episodes() as found:\n'
        '    found.start(0, "p", {})\n'
        '    found.submit([environments.EndedTurn(0, "x")])\n'
        '    found.ready(100)\n'
    )
    assert (found, [x.replace(f'{tmp_path}/env.py:', '') for x in lines]) == (-status, [line])


@pytest.mark.parametrize(
    ('code', 'status'),
    [
        ('deadlines.call_within(60, "x", lambda: 1)', 0),
        ('deadlines.call_within(60, "x", lambda: 1)\nos.kill(os.getpid(), 9)', -9),
        ('deadlines.call_within(60, "x", lambda: 1)\nsegfault()', -signal.SIGSEGV),
        ('deadlines.call_within(60, "x", lambda: 1)\nos._exit(3)', 3),
        ('deadlines.call_within(60, "x", lambda: watchdog.exit_now(4))', 4),
        pytest.param(
            'with watchdog.watched("x", 0.01):\n    pass\ntime.sleep(2.5)',
            0,
            marks=pytest.mark.slow,
        ),
        # The pipe is closed while no call goes on, and the process lives.
        pytest.param(
            'deadlines.call_within(60, "x", lambda: 1)\n'
            'os.execv(sys.executable, [sys.executable, "-c", "import time; time.sleep(2.5)"])\n',
            0,
            marks=pytest.mark.slow,
        ),
        # What ends after the watching process has.
        (
            'ends_before(time.sleep, 1)\n'
            'watchdog._KILLED_WITHIN = 0\n'
            'def late():\n'
            '    with watchdog.watched("x", 60):\n'
            '        time.sleep(0.5)\n'
            'threading.Thread(target=late, daemon=True).start()\n'
            'time.sleep(0.1)\n',
            0,
        ),
        # Calls of a thread that runs until the program has ended.
        (
            'ends_before(time.sleep, 0.5)\n'
            'def calls():\n'
            '    while True:\n'
            '        with watchdog.watched("x", 60):\n'
            '            time.sleep(0.01)\n'
            'threading.Thread(target=calls, daemon=True).start()\n'
            'time.sleep(0.1)\n',
            0,
        ),
        # A child that goes on has the pipe too, and is not watched itself.
        pytest.param(
            'deadlines.call_within(60, "x", lambda: 1)\n'
            'if os.fork() == 0:\n'
            '    deadlines.call_within(60, "y", lambda: 1)\n'
            '    time.sleep(3)\n'
            '    watchdog.exit_now(0)\n',
            0,
            marks=pytest.mark.slow,
        ),
    ],
)
def test_nothing_is_said_of_a_program_that_ends_otherwise(code, status):
    assert run(code) == (status, [])


@pytest.mark.slow
def test_several_calls_at_a_time():
    """One of them that is not late may be the one that blocks the program, and may return."""
    found, lines = run(
        'with watchdog.watched("a", 0.1), watchdog.watched("b", 5):\n'
        '    ctypes.PyDLL(None).usleep(3_000_000)\n'
        'with watchdog.watched("a", 0.1), watchdog.watched("b", 1), watchdog.watched("a", 1):\n'
        '    holds_the_lock()\n'
    )
    assert found == -signal.SIGKILL
    assert lines[0].startswith('error: a or b did not return')
    assert len(lines) == 1


def test_a_name_cannot_write_lines_of_its_own():
    found, lines = run('deadlines.call_within(0, "x\\nquit\\nend 0\\x1b[2J", segfault)')
    assert found == -signal.SIGSEGV
    assert lines == [
        r'error: the program ended during a call of x quit end 0\x1b[2J; if it crashed there, call '
        'it in another process, as isolated=True does for a reward'
    ]


@pytest.mark.slow
def test_neither_process_waits_for_the_other_to_be_continued():
    """A watching process that does not read, then a program that is suspended in a late call."""
    found, lines = run(
        'deadlines.call_within(60, "x", lambda: 1)\n'
        'os.kill(watchdog._process._child.pid, signal.SIGSTOP)\n'
        'for _ in range(2000):\n'
        '    with watchdog.watched("y" * 10**6, 60):\n'
        '        pass\n'
        'with watchdog.watched("z", 0.01):\n'
        '    if os.fork() == 0:\n'
        '        time.sleep(3)\n'
        '        os.kill(os.getppid(), signal.SIGCONT)\n'
        '        watchdog.exit_now(0)\n'
        '    os.kill(os.getpid(), signal.SIGSTOP)\n'
        'os.kill(watchdog._process._child.pid, signal.SIGSTOP)\n'
    )
    assert (found, lines) == (0, [])


def test_another_process_watches_when_the_first_was_killed():
    found, lines = run(
        'deadlines.call_within(60, "x", lambda: 1)\n'
        'watchdog._process._child.kill(); watchdog._process._child.wait()\n'
        'for _ in range(2):\n'
        '    assert deadlines.call_within(60, "y", lambda: 1) == 1\n'
        'deadlines.call_within(60, "z", segfault)\n'
    )
    assert found == -signal.SIGSEGV
    assert len(lines) == 1
    assert 'call of z' in lines[0]


def test_the_watching_process_ends_with_the_program():
    code = HEAD + (
        'deadlines.call_within(60, "x", lambda: 1)\nprint(watchdog._process._child.pid)\n'
    )
    ended = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, timeout=60)
    watching = int(re.search(r'\d+', ended.stdout)[0])
    end = time.monotonic() + 30
    while time.monotonic() < end:
        try:
            os.kill(watching, 0)
        except ProcessLookupError:
            return
        time.sleep(0.05)
    pytest.fail('it goes on')


def test_calls_that_were_interrupted_are_over():
    """An inner call whose end was not told, as where a deadline interrupts it there."""
    found, lines = run(
        'with watchdog.watched("outer", 60):\n'
        '    owner = f"thread-{threading.get_ident()}"\n'
        '    watchdog._begin(next(watchdog._numbers), owner, "inner", 0.1)\n'
        'ctypes.PyDLL(None).usleep(3_000_000)\n'
        'segfault()\n'
    )
    assert (found, lines) == (-signal.SIGSEGV, [])


def test_where_nothing_can_watch_calls_are_made_all_the_same():
    code = (
        'for executable in (None, "/bin/false", "/bin/true"):\n'
        '    sys.executable, watchdog._failures = executable, 0\n'
        '    for _ in range(20):\n'
        '        assert deadlines.call_within(60, "x", lambda: 1) == 1\n'
        '        time.sleep(0.01)\n'
        'time.sleep(1.5)\n'
        'assert threading.active_count() <= 2, threading.enumerate()\n'
    )
    found, lines = run(code)
    assert found == 0
    text = 'functions that crash or block the program are no longer named: '
    ended = f'{text}the process that watches has ended, or does not read'
    assert lines == [
        f'{text}expected str, bytes or os.PathLike object, not NoneType', ended, ended,
    ]  # fmt: skip


@pytest.mark.slow
def test_a_program_that_cannot_be_told_is_killed():
    command = [sys.executable, '-c', HEAD + 'deadlines.call_within(0.2, "x", holds_the_lock)']
    with open('/dev/full', 'w') as full:
        assert subprocess.run(command, stderr=full, timeout=120).returncode == -signal.SIGKILL


@pytest.mark.slow
def test_an_environment_that_was_left_is_not_watched(tmp_path):
    (tmp_path / 'env.py').write_text(
        'import time\ndef reply(prompts, completions, **_):\n    time.sleep(100)\n'
    )
    found, lines = run(
        'from grpo_jax import environments\n'
        'from grpo_jax.environments import episodes\n'
        'episodes.GRACE = 0\n'
        f'made = environments.build("{tmp_path}/env.py:reply", {{}}, turns=2, seconds=0.5)\n'
        'with made.episodes() as found:\n'
        '    found.start(0, "p", {})\n'
        '    found.submit([environments.EndedTurn(0, "x")])\n'
        'ctypes.PyDLL(None).usleep(3_000_000)\n'
    )
    assert (found, lines) == (0, [])
