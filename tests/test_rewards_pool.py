"""The workers: deadlines, crashes, interrupts, threads, memory, and how they end."""

import json
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from grpo_jax.rewards.verify import pool

SECONDS = 30.0  # for what is expected to be decided, on a busy machine
SAME, DIFFERENT = ['is', 'x+x', '2x'], ['is', 'x+x', '3x']
FOREVER = ['is', 'x', '9^{9^{9^9}}']
# A worker that follows orders, for failures that no expression causes reliably.
SCRIPTED = textwrap.dedent("""
    import json, os, sys, time
    print('ready', flush=True)
    for line in sys.stdin:
        seconds, order = json.loads(line)
        if order == 'die':
            os.abort()
        if order == 'wait':
            time.sleep(60)
        if isinstance(order, float):
            time.sleep(order)
        print(json.dumps(order != 'no'), flush=True)
""")
# The same with copies of the process, as `worker.py` has them.
COPIES = SCRIPTED.replace(
    "print('ready', flush=True)",
    'while os.fork():\n    if not os.wait()[1]:\n        sys.exit()\n'
    "print('ready', os.getpid(), flush=True)",
)


@pytest.fixture(scope='module')
def started():
    workers = pool.Pool(2)
    yield workers
    workers.close()


@pytest.fixture
def real(started):
    """Two workers that import SymPy, which takes seconds: they are shared by the tests."""
    started.timeouts = started.crashes = 0
    return started


@pytest.fixture
def scripted(tmp_path):
    script = tmp_path / 'scripted.py'
    script.write_text(SCRIPTED)
    workers = pool.Pool(2, script=script)
    yield workers
    workers.close()


def alive(pid):
    try:
        return Path(f'/proc/{pid}/stat').read_text().rpartition(')')[2].split()[0] != 'Z'
    except (FileNotFoundError, ProcessLookupError):
        return False


def gone(processes, seconds=60.0):
    end = time.monotonic() + seconds
    while any(map(alive, processes)) and time.monotonic() < end:
        time.sleep(0.05)
    return not any(map(alive, processes))


def children(pid):
    return [int(child) for child in Path(f'/proc/{pid}/task/{pid}/children').read_text().split()]


def pids(workers):
    return [worker.process.pid for worker in workers._workers]


def test_a_matching_pairs_all_rows(real):
    # The first row takes the only column of the second one first.
    chain = [[SAME, SAME, DIFFERENT], [SAME, DIFFERENT, SAME], [SAME, DIFFERENT, DIFFERENT]]
    short = [[SAME, DIFFERENT], [SAME, DIFFERENT]]
    trees = [['matching', table] for table in (chain, short)]
    assert real.evaluate(trees, seconds=SECONDS) == [True, False]


def test_trees(real):
    trees = [
        SAME,
        DIFFERENT,
        True,
        False,
        ['all', [SAME, True]],
        ['all', [SAME, DIFFERENT]],
        ['any', [DIFFERENT, SAME]],
        ['any', [DIFFERENT, ['all', [SAME, False]]]],
        ['all', [DIFFERENT, FOREVER]],  # evaluates no more than it needs
        ['any', [SAME, FOREVER]],
        ['is', '\\frac{', 'x'],
    ]
    results = [True, False, True, False, True, False, True, False, False, True, False]
    assert real.evaluate(trees, seconds=SECONDS) == results
    assert real.evaluate([], seconds=SECONDS) == []
    assert (real.timeouts, real.crashes) == (0, 0)


def test_a_deadline_costs_one_result_and_a_worker(real):
    assert real.evaluate([SAME, FOREVER, DIFFERENT, SAME], seconds=2.0) == [True, None, False, True]
    assert (real.timeouts, real.crashes) == (1, 0)
    assert real.evaluate([SAME], seconds=SECONDS) == [True]


def test_a_deadline_costs_no_start_of_a_worker(real):
    assert real.evaluate([SAME] * 4, seconds=SECONDS) == [True] * 4
    started = pids(real)
    expected = [None] * 5 + [True] * 4
    start = time.monotonic()
    assert real.evaluate([FOREVER] * 5 + [SAME] * 4, seconds=1.0) == expected
    # Five on two workers take three seconds. The bound is for a machine with other work.
    assert time.monotonic() - start < 60
    assert (real.timeouts, real.crashes) == (5, 0)
    assert pids(real) == started  # the same processes, with new copies


def test_a_copy_that_dies_costs_its_result_and_no_start(tmp_path):
    script = tmp_path / 'copies.py'
    script.write_text(COPIES)
    workers = pool.Pool(1, script=script)
    try:
        assert workers.evaluate(['yes'], seconds=SECONDS) == [True]
        started = pids(workers)
        assert workers.evaluate(['die', 'yes', 'wait', 'no', 'die'], seconds=3.0) == [
            None, True, None, False, None,
        ]  # fmt: skip
        assert (workers.timeouts, workers.crashes) == (1, 2)
        assert pids(workers) == started
        copies = children(started[0])
        assert len(copies) == 1
    finally:
        workers.close()
    assert gone(started + copies)  # a killed process takes a moment to end


def test_results_are_in_the_order_of_the_trees(scripted):
    orders = [0.3, 'no', 0.2, 'yes', 'no', 0.0, 'yes', 'no']
    assert scripted.evaluate(orders, seconds=SECONDS) == [order != 'no' for order in orders]


def test_a_worker_that_dies_costs_its_result(scripted):
    assert scripted.evaluate(['yes', 'die', 'no', 'die', 'yes'], seconds=SECONDS) == [
        True, None, False, None, True,
    ]  # fmt: skip
    assert (scripted.timeouts, scripted.crashes) == (0, 2)


def test_a_worker_killed_between_comparisons_costs_nothing(scripted):
    assert scripted.evaluate([0.1] * 8, seconds=SECONDS) == [True] * 8
    for worker in list(scripted._workers):
        worker.process.kill()
        worker.process.wait()
    assert scripted.evaluate(['yes', 'no'], seconds=SECONDS) == [True, False]
    assert scripted.crashes == 0


def test_waiting_ends_at_the_deadline(scripted):
    start = time.monotonic()
    assert scripted.evaluate(['wait', 'wait', 'yes'], seconds=0.5) == [None, None, True]
    assert time.monotonic() - start < 30  # a worker would wait for sixty
    assert scripted.timeouts == 2


def test_no_process_is_left(scripted):
    scripted.evaluate(['yes', 'die', 'wait'], seconds=0.5)
    left = pids(scripted)
    assert left
    assert list(map(os.getsid, left)) == left  # interrupts from the keyboard do not reach them
    assert all(map(alive, left))
    scripted.close()
    assert gone(left)
    assert pids(scripted) == []
    assert scripted.evaluate(['no'], seconds=SECONDS) == [False]  # and it starts again


def test_an_interrupt_leaves_no_stale_results(scripted, monkeypatch):
    scripted.evaluate(['yes', 'yes'], seconds=SECONDS)

    def interrupted(results):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(scripted, '_collect', interrupted)
        with pytest.raises(KeyboardInterrupt):
            scripted.evaluate([0.1, 0.1], seconds=SECONDS)
    assert scripted.evaluate(['no', 'no', 'no'], seconds=SECONDS) == [False] * 3


def test_any_thread_can_evaluate(scripted):
    orders = [['yes', 'no', 0.05], ['no', 'no'], ['yes'], ['no', 'yes', 'no', 'yes']] * 3
    with ThreadPoolExecutor(6) as threads:
        results = list(threads.map(lambda part: scripted.evaluate(part, seconds=SECONDS), orders))
    assert results == [[order != 'no' for order in part] for part in orders]
    assert threading.active_count() >= 1
    assert len(pids(scripted)) <= 2


def test_a_worker_that_cannot_start_names_the_command_to_debug(tmp_path):
    script = tmp_path / 'broken.py'
    script.write_text('raise SystemExit(3)')
    workers = pool.Pool(1, script=script)
    with pytest.raises(ChildProcessError, match=r'3 workers ended before they .*broken\.py'):
        workers.evaluate(['yes'], seconds=SECONDS)
    assert pids(workers) == []


def test_memory_of_a_worker_is_limited():
    workers = pool.Pool(1, memory=400 * 2**20)
    try:
        assert workers.evaluate([SAME], seconds=SECONDS) == [True]
        limits = Path(f'/proc/{pids(workers)[0]}/limits').read_text()
        (line,) = [line for line in limits.splitlines() if line.startswith('Max address space')]
        assert line.split()[3] == str(400 * 2**20)
        # 2^(3·10^9) has 375 MB; whichever of the two limits it meets, it costs one result.
        assert workers.evaluate([['is', 'x', '2^{3000000000}x']], seconds=5.0) in ([None], [False])
        assert workers.evaluate([SAME], seconds=SECONDS) == [True]
    finally:
        workers.close()


def test_a_worker_imports_no_jax_and_none_of_this_package():
    code = (
        'import runpy, sys, json; runpy.run_path(sys.argv[1]);'
        'print(json.dumps([m for m in sys.modules if m.split(".")[0] in '
        '("jax", "numpy", "grpo_jax", "flax", "torch", "tensorflow")]))'
    )
    result = subprocess.run(
        [sys.executable, '-P', '-c', code, str(pool._SCRIPT)],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert json.loads(result.stdout) == []


PARENT = """
import sys
from grpo_jax.rewards.verify import pool
print(pool.shared().evaluate([['is', 'x+x', '2x']], seconds=60.0), flush=True)
print(*[w.process.pid for w in pool.shared()._workers], flush=True)
{rest}
"""


def start(rest):
    parent = subprocess.Popen(
        [sys.executable, '-c', PARENT.format(rest=rest)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert parent.stdout.readline() == '[True]\n'
    return parent, [int(pid) for pid in parent.stdout.readline().split()]


def test_workers_end_with_their_program():
    parent, workers = start('')
    assert parent.wait(60) == 0
    assert gone(workers)


def test_workers_end_where_their_program_is_killed_during_a_comparison():
    rest = "pool.shared().evaluate([['is', 'x', '9^{9^{9^9}}']], seconds=3.0)"
    parent, workers = start(
        rest.replace('pool.shared()', 'print("asking", flush=True) or pool.shared()')
    )
    assert parent.stdout.readline() == 'asking\n'
    time.sleep(0.3)
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    assert gone(workers)  # by the limit on processor time


@pytest.mark.filterwarnings('ignore:.*fork:DeprecationWarning')
@pytest.mark.filterwarnings('ignore:.*fork:RuntimeWarning')
def test_a_forked_child_has_workers_of_its_own():
    rest = textwrap.dedent("""
        import os
        child = os.fork()
        if not child:
            assert pool.shared()._workers == []
            ok = pool.shared().evaluate([['is', 'x+x', '3x']], seconds=60.0) == [False]
            sys.exit(0 if ok else 1)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
        print(pool.shared().evaluate([['is', 'x+x', '2x']], seconds=60.0), flush=True)
        print(*[w.process.pid for w in pool.shared()._workers], flush=True)
    """)
    parent, workers = start(rest)
    assert parent.stdout.read().split('\n')[:3] == ['0', '[True]', ' '.join(map(str, workers))]
    assert parent.wait(60) == 0
    assert os.getpid() != parent.pid
