"""The sandbox: what programs can do to their tests, to their host and to each other."""

import contextlib
import math
import os
import pathlib
import shutil
import subprocess
import threading
import time
from concurrent.futures import CancelledError

import attack_programs
import pytest

from grpo_jax.rewards import sandbox
from grpo_jax.rewards.sandbox import pool as pools
from grpo_jax.rewards.sandbox.system_calls import system_call_filter

LIMITS = sandbox.Limits(seconds=60.0, memory=2**29)
BRIEF = sandbox.Limits(seconds=1.0, memory=2**29)
INSIDE = 'rewards.sandbox.inside'
# One of each kind, for every run of the suite.
SOME = (
    'returns: an object that equals everything',
    'returns: an integer that equals everything',
    'ends by: os._exit(0) at import',
    'ends by: StopIteration, which ends all(map(...))',
    'forges: a verdict on every descriptor',
    'forges: answers to calls that come later',
    'patches: builtins',
    'reads: the tests in memory',
    'reads: /etc/passwd',
    'reads: inherited descriptors',
    'harms: files everywhere',
    'harms: the internet',
    'harms: everybody',
    'harms: a daemon',
)
# They reach beyond namespaces, into the kernel or its memory.
NEED_FILTER = ('harms: the host by vsock', 'harms: netlink', 'harms: packets', 'harms: kernel keys')


def has_sandbox():
    try:
        sandbox.shared()
    except sandbox.SandboxError:
        return False
    return True


needs_sandbox = pytest.mark.skipif(
    not shutil.which('bwrap') or not has_sandbox(),
    reason='no sandbox here: apt-get install bubblewrap, and allow user namespaces',
)


def with_tests(program, test, **options):
    return sandbox.Tests(program, test, **options)


def run(*jobs, limits=LIMITS):
    return sandbox.shared().run(jobs, limits)


def passed(program, test, **options):
    (result,) = run(with_tests(program, test, **options))
    return result.passed


def stat_of(pid):
    """The parent of a process and its command; None for one that has ended."""
    with contextlib.suppress(OSError):
        fields = pathlib.Path(f'/proc/{pid}/stat').read_text().rpartition(')')[2].split()
        command = pathlib.Path(f'/proc/{pid}/cmdline').read_bytes().decode(errors='replace')
        return int(fields[1]), command
    return None


def sandboxed(of=None):
    """Processes of sandboxes whose pool is in process `of`, or that have lost theirs."""
    found = []
    for folder in pathlib.Path('/proc').glob('[0-9]*'):
        pid, owner = int(folder.name), None
        while (stat := stat_of(pid)) and INSIDE in stat[1]:
            owner, pid = stat[0], stat[0]
        if owner is None:
            continue
        orphan = owner == 1 or (parent := stat_of(owner)) is None or 'python' not in parent[1]
        if orphan or owner == of:
            found.append(int(folder.name))
    return found


def close_shared():
    for pool in pools._shared.values():
        pool.close()
    pools._shared.clear()


def wait_until_gone(of=None, seconds=20.0):
    end = time.monotonic() + seconds
    while (left := sandboxed(of)) and time.monotonic() < end:
        time.sleep(0.05)
    return left


def attack(names, limits):
    """Run attacks; return the names of those with a reward, and of those that ran out of time."""
    programs = [attack_programs.ATTACKS[name] for name in names]
    results = run(*(with_tests(p, attack_programs.TESTS, entry_point='double') for p in programs),
                  limits=limits)  # fmt: skip
    rewarded = [name for name, result in zip(names, results, strict=True) if result.passed]
    return rewarded, [name for name, result in zip(names, results, strict=True) if result.timeout]


def nothing_is_left():
    places = (*attack_programs.PLACES, str(pathlib.Path.home()), str(pools.__file__))
    files = [os.path.join(place, attack_programs.LEFT) for place in places]
    assert not [file for file in files if os.path.lexists(file)]
    honest = with_tests(attack_programs.HONEST, attack_programs.TESTS, entry_point='double')
    assert [result.passed for result in run(*[honest] * 4)] == [1] * 4
    assert wait_until_gone() == []


@needs_sandbox
def test_some_attacks():
    assert attack(SOME, LIMITS) == ([], [])
    nothing_is_left()


@pytest.mark.slow
@needs_sandbox
def test_attacks():
    names = [
        name for name in attack_programs.QUICK if system_call_filter() or name not in NEED_FILTER
    ]
    assert len(names) >= 90
    slow = [  # the tests compute with them, until their own limit
        'forges: a number that takes years',
        'forges: a set that takes hours',
        'forges: values that need more memory than there is',
    ]
    assert attack([name for name in names if name not in slow], LIMITS) == ([], [])
    assert attack(slow, sandbox.Limits(2.0, 2**29))[0] == []
    nothing_is_left()


@pytest.mark.slow
@needs_sandbox
def test_attacks_that_hang():
    names = [name for name in attack_programs.ATTACKS if name not in attack_programs.QUICK]
    rewarded, ended = attack(names, BRIEF)
    assert rewarded == []
    assert len(ended) >= len(names) - 2  # the rest run into another limit first
    nothing_is_left()


def test_attacks_work_without_a_sandbox():
    """The attempts are real: on the host, the same programs get what they want."""
    names = ('reads: /etc/passwd', 'reads: /sys', 'harms: other programs')
    results = sandbox.shared(unsafe=True).run(
        [with_tests(attack_programs.ATTACKS[name], attack_programs.TESTS, entry_point='double')
         for name in names],
        LIMITS,
    )  # fmt: skip
    assert [result.passed for result in results] == [1] * len(names)


@needs_sandbox
def test_values_cross_in_both_directions():
    values = [
        None, True, 0, -(2**70), 2**63, 0.1, -0.0, 1e400, 1e-320, 2 + 3j, '', 'é\n\ud800\0',
        b'\xff', bytearray(b'a'), [], [[1], (2, [3])], (), (1,), {1, 'a', (2, 3)}, set(),
        frozenset({1}), {}, {'a': {1: [2]}, (1, 2): None, None: 3.5}, range(3, 10, 2),
    ]  # fmt: skip
    test = f"""
inf = float('inf')
for number, value in enumerate({values!r}):
    got = same(value)
    assert type(got) is type(value), value
    # The order of a set depends on the process.
    assert got == value and (isinstance(value, set) or repr(got) == repr(value)), value
    assert made(number) == value, value
"""
    program = f"inf = float('inf')\ndef same(x): return x\ndef made(n): return {values!r}[n]\n"
    (result,) = run(with_tests(program, test))
    assert (result.passed, result.error) == (1, '')


@needs_sandbox
def test_other_values():
    program = """
import collections, datetime, decimal, enum, fractions, re
Point = collections.namedtuple('Point', 'x y')
class Color(enum.IntEnum): RED = 1
class Pair:
    def __init__(self, a, b): self.a, self.b = a, b
def nan(): return float('nan')
def point(): return Point(1, [2])
def count(): return collections.Counter('aab')
def ordered(): return collections.OrderedDict(b=1, a=2)
def squares(n): return (i * i for i in range(n))
def color(): return Color.RED
def half(): return fractions.Fraction(1, 2)
def cents(): return decimal.Decimal('0.10')
def day(): return datetime.date(2024, 2, 29), datetime.datetime(2024, 2, 29, 12)
def queue(): return collections.deque([1, 2])
def views(): return {'a': 1}.keys(), {'a': 1}.values(), {'a': 1}.items()
def total(pairs): return sum(p.a * p.b for p in pairs)
def adder(n): return lambda x: x + n
class Stack:
    def __init__(self): self.items = []
    def push(self, x): self.items.append(x)
    def pop(self): return self.items.pop()
"""
    test = """
import datetime
from decimal import Decimal
from fractions import Fraction
assert nan() != nan()
assert point() == (1, [2]) and count() == {'a': 2, 'b': 1} and list(ordered()) == ['b', 'a']
assert list(squares(4)) == [0, 1, 4, 9] and next(squares(3)) == 0
assert color() == 1 and half() == Fraction(2, 4) and str(cents()) == '0.10'
assert day() == (datetime.date(2024, 2, 29), datetime.datetime(2024, 2, 29, 12))
assert list(queue()) == [1, 2] and list(views()[2]) == [('a', 1)] and views()[0] == {'a'}
assert total([Pair(1, 2), Pair(b=3, a=4)]) == 14
assert adder(2)(3) == 5
stack = Stack()
stack.push(7)
assert stack.pop() == 7 and stack.items == []
try:
    stack.pop()
except IndexError as error:
    assert 'empty' in str(error)
else:
    assert False
"""
    (result,) = run(with_tests(program, test))
    assert (result.passed, result.error) == (1, '')


@needs_sandbox
def test_what_tests_may_expect_of_a_program():
    assert not passed('def f(x): return 1', 'pass')  # tests that call nothing
    assert not passed('def f(x): return 1', 'def check(candidate): assert candidate(1) == 1')
    assert passed('def f(x): return 1', 'def check(candidate): assert candidate(1) == 1',
                  entry_point='f')  # fmt: skip
    assert not passed('def g(x): return 1', 'assert f(1) == 1')  # it has another name
    assert not passed('def f(x) return 1', 'assert f(1) == 1')
    # Arguments are copies: a program cannot change what it is compared with.
    assert not passed(
        'def f(a):\n    a.clear()\n    return []', 'a = [2, 1]\nassert f(a) == sorted(a)'
    )
    # A module of the standard library is the tests' own, whatever the program has of that name.
    liar = 'class math:\n    isclose = staticmethod(lambda *a: True)\ndef f(x): return None'
    assert not passed(liar, 'assert math.isclose(f(1), 2.0)')
    # Helpers that the tests use come from the prefix.
    cheat = 'def twice(x): return 5\ndef f(x): return 5'
    assert not passed(cheat, 'assert f(3) == twice(3)', prefix='def twice(x): return 2 * x')
    # What the tests print or how they end is not taken for a result.
    assert not passed('def f(x): return 1', 'import os\nf(1)\nos._exit(0)')
    assert not passed('def f(x): return 1', 'import sys\nf(1)\nsys.exit(0)')
    # A bare `except` does not save a program that has ended.
    assert not passed('import os\ndef f(x): os._exit(0)', 'try: f(1)\nexcept: pass')


@needs_sandbox
def test_partial_credit():
    test = """
assert True, 'no case'
for x in range(4):
    assert f(x) == x
assert f(0) == 0
def check(candidate):
    assert candidate(5) == 6
"""
    results = run(
        with_tests('def f(x): return x', test, entry_point='f', partial=True),
        with_tests('def f(x): return x if x < 3 else 0', test, entry_point='f', partial=True),
        with_tests('def f(x): return x + (x == 5)', test, entry_point='f', partial=True),
        with_tests('import os\ndef f(x): return x if x else os._exit(0)', test, partial=True),
        with_tests('def f(x): return x', 'f(1)', partial=True),  # without cases, all or nothing
        with_tests('def f(x): return 1 / x', 'f(0)\nassert f(1) == 1', partial=True),
        with_tests('def f(x): return x', 'assert f(1) == 1\nraise ValueError', partial=True),
    )
    assert [(r.passed, r.cases) for r in results] == [
        (2, 3), (1, 3), (3, 3), (0, 3), (1, 1), (0, 1), (0, 1),
    ]  # fmt: skip


@needs_sandbox
def test_inputs():
    def job(program, partial=False):
        return sandbox.Inputs(program, ('1\n', '2\n'), ('2\n', '4\n'), partial=partial)

    results = run(
        job('print(int(input()) * 2)'),
        job('import sys\nsys.stdout.write(f"{2 * int(sys.stdin.buffer.read())}\\n")'),
        job('import threading\nthreading.Thread(target=lambda: print(int(input()) * 2)).start()'),
        job('import atexit\nn = int(input())\natexit.register(lambda: print(n * 2))'),
        job('if __name__ == "__main__":\n    print(int(input()) * 2)\n    exit()'),
        job('print(2)', partial=True),
        job('n = int(input())\nprint(n * 2)\nif n == 2: 1 / 0', partial=True),
        job('print(int(input()) * 2'),
        job('import os\nos._exit(0)'),
        job('import os\nos.kill(os.getppid(), 9)'),
        job('while True: print("2" * 1_000_000)', partial=True),
        job('print(int(input()) * 2)\nprint(" " * 100_000)'),
    )
    assert [result.passed for result in results] == [2, 2, 2, 2, 2, 1, 1, 0, 0, 0, 0, 0]
    slow = job('n = int(input())\nprint(2 * n, flush=True)\nwhile n == 2: pass', partial=True)
    (result,) = run(slow, limits=BRIEF)
    assert (result.passed, result.timeout) == (1, True)


@needs_sandbox
def test_no_process_outlives_its_pool():
    pool = sandbox.Pool(2)
    loop = with_tests('def f(x):\n    while True: pass', 'assert f(1)')
    assert [r.timeout for r in pool.run([loop, loop], BRIEF)] == [True, True]
    assert sandboxed(os.getpid())
    pool.close()
    close_shared()
    assert wait_until_gone(os.getpid()) == []


@needs_sandbox
def test_a_pool_is_closed_while_a_program_runs():
    pool = sandbox.Pool(1)
    loop = with_tests('def f(x):\n    while True: pass', 'assert f(1)')
    caught = []

    def work():
        try:
            pool.run([loop, loop], sandbox.Limits(600.0, 2**29))
        except CancelledError as error:
            caught.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    while not pool._workers or not pool._workers[0]._running:
        time.sleep(0.01)
    time.sleep(0.2)
    pool.close()
    thread.join(60)
    assert not thread.is_alive()
    assert len(caught) == 1
    with pytest.raises(RuntimeError, match='is closed'):
        pool.run([loop], LIMITS)


@needs_sandbox
def test_any_thread_can_run_programs():
    results = {}

    def work(number):
        results[number] = passed('def f(x): return x', f'assert f({number}) == {number}')

    threads = [threading.Thread(target=work, args=(n,)) for n in range(5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == dict.fromkeys(range(5), 1)


@needs_sandbox
def test_processes_that_are_killed_from_outside_are_replaced():
    close_shared()
    pool = sandbox.Pool(1)
    try:
        job = with_tests('def f(x): return x', 'assert f(1) == 1')
        assert pool.run([job], LIMITS)[0].passed
        for pid in sandboxed(os.getpid()):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, 9)
        assert wait_until_gone(os.getpid()) == []
        assert [r.passed for r in pool.run([job] * 3, LIMITS)] == [1] * 3
    finally:
        pool.close()


@needs_sandbox
@pytest.mark.skipif(os.geteuid() != 0, reason='only root can become another user')
def test_an_ordinary_user_has_a_sandbox(tmp_path):
    """With the system's own Python, which others than root can start."""
    python = shutil.which('python3', path='/usr/bin')
    if python is None:
        pytest.skip('there is no Python in /usr/bin')
    root = tmp_path / 'package' / 'grpo_jax' / 'rewards'
    root.parent.mkdir(parents=True)
    shutil.copytree(pathlib.Path(sandbox.__file__).parent, root / 'sandbox')
    for folder in (tmp_path, *tmp_path.parents):
        if folder.stat().st_mode & 0o005 != 0o005:
            folder.chmod(folder.stat().st_mode | 0o011)
    programs = [
        ('def f(x): return 2 * x', 'assert f(1) == 2'),
        ('import os\ndef f(x): return os.getuid()', 'assert f(1) == 65534'),
        ('import os\ndef f(x): return os.kill(1, 9)', 'assert f(1) == 3'),
        ('import os\ndef f(x): return [os.fork() for _ in range(9)]', 'f(1)'),
        ('import os\ndef f(x): return os.listdir("/etc")', 'f(1)'),
    ]
    code = f"""
import os, sys
sys.path.insert(0, {str(root.parents[1])!r})
from grpo_jax.rewards import sandbox
assert os.getuid() == 12345
tests = [sandbox.Tests(*pair) for pair in {programs!r}]
results = sandbox.Pool(1).run(tests, sandbox.Limits(20.0, 2**29))
print([result.passed for result in results])
"""
    result = subprocess.run(
        [python, '-I', '-c', code], capture_output=True, text=True, user=12345, group=12345,
        extra_groups=[], cwd='/', env={'PATH': os.environ['PATH']},
    )  # fmt: skip
    assert result.stdout == '[1, 1, 0, 0, 0]\n', result.stderr


def test_without_bubblewrap_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setenv('PATH', '/nowhere')
    with pytest.raises(sandbox.SandboxError, match=r'apt-get install bubblewrap .* unsafe=True'):
        sandbox.Pool()


def test_a_sandbox_that_does_not_start_says_why(monkeypatch, tmp_path):
    broken = tmp_path / 'bwrap'
    broken.write_text('#!/bin/sh\necho No permissions to create a new namespace >&2\nexit 1\n')
    broken.chmod(0o755)
    monkeypatch.setenv('PATH', f'{tmp_path}:{os.environ["PATH"]}')
    pool = sandbox.Pool(1)
    try:
        with pytest.raises(sandbox.SandboxError, match=r'No permissions to create .*: allow user'):
            pool.run([with_tests('', '')], LIMITS)
    finally:
        pool.close()


def test_unsafe_programs_have_limits():
    results = sandbox.shared(unsafe=True).run(
        [
            with_tests('def f(x): return 2 * x', 'assert f(1) == 2'),
            with_tests('def f(x):\n    while True: pass', 'assert f(1) == 2'),
            with_tests('def f(x): return len(bytearray(2**30))', 'assert f(1)'),
            with_tests(
                'class A:\n    __eq__ = lambda *a: True\ndef f(x): return A()', 'assert f(1) == 2'
            ),
            sandbox.Inputs('print(2 * int(input()))', ('4',), ('8\n',)),
        ],
        sandbox.Limits(3.0, 2**29),
    )
    assert [result.passed for result in results] == [1, 0, 0, 0, 1]
    assert [result.timeout for result in results] == [False, True, False, False, False]


def test_limits_are_those_of_the_kernel():
    limits = sandbox.Limits(2.5, 2**29).resources()
    assert limits['AS'] == 2**29
    assert limits['CPU'] == math.ceil(2.5) + 1
    assert limits['NPROC'] < 20
