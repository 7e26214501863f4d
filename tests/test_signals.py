"""The first signal stops a run where it is safe, the second one at once."""

import contextlib
import os
import signal
import subprocess
import sys
import textwrap
import threading

import pytest

from grpo_jax.run import hosts, signals

NUMBERS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@pytest.fixture(autouse=True)
def _default_handlers():
    defaults = (signal.default_int_handler, signal.SIG_DFL, signal.SIG_DFL)
    before = {n: signal.signal(n, d) for n, d in zip(NUMBERS, defaults, strict=True)}
    yield
    for number, default in zip(NUMBERS, defaults, strict=True):
        assert signal.signal(number, before[number]) is default


@pytest.mark.parametrize('number', NUMBERS)
def test_a_signal_raises(number, capfd):
    with pytest.raises(hosts.Stopped) as stopped, signals.handled(), signals.handled():
        signal.raise_signal(number)
    assert isinstance(stopped.value, KeyboardInterrupt)
    assert stopped.value.number == number
    name = signal.Signals(number).name
    assert str(stopped.value).startswith(f'stopped by {name}; the same command goes on')
    expected = f'{name}: drops this step and saves the last; a second signal ends at once\n'
    assert capfd.readouterr().err == expected
    with signals.handled():  # a later run in this process is not stopped
        signals.check()


def test_a_delayed_signal_raises_at_the_end_of_the_outermost_block():
    done = []

    def run():
        with signals.delayed():
            with signals.delayed():
                signal.raise_signal(signal.SIGTERM)
                done.append(1)
            done.append(2)
        done.append(3)

    with pytest.raises(hosts.Stopped), signals.handled():
        run()
    assert done == [1, 2]


def test_while_it_is_raised_what_has_to_be_saved_is_not_stopped_again():
    done = []

    def stop():
        try:
            signal.raise_signal(signal.SIGTERM)
        finally:
            with signals.delayed():
                done.append(1)
            done.append(2)

    with pytest.raises(hosts.Stopped), signals.handled():
        stop()
    assert done == [1, 2]


def test_a_signal_that_other_code_has_caught_is_raised_again():
    def run():
        signals.check()
        with contextlib.suppress(BaseException):
            signal.raise_signal(signal.SIGTERM)
        signals.check()

    with pytest.raises(hosts.Stopped), signals.handled():
        run()


def test_signals_that_are_ignored_or_handled_by_others_stay_so():
    mine = []
    signal.signal(signal.SIGHUP, signal.SIG_IGN)  # nohup
    signal.signal(signal.SIGTERM, lambda *arguments: mine.append(arguments))
    with signals.handled():
        signal.raise_signal(signal.SIGHUP)
        signal.raise_signal(signal.SIGTERM)
        signals.check()
    assert len(mine) == 1
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


def test_in_other_threads_nothing_is_changed():
    found = []

    def run():
        with signals.handled():
            found.append(signal.getsignal(signal.SIGTERM))

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert found == [signal.SIG_DFL]


SLOW = """
    import signal, sys, time
    from grpo_jax.run import hosts, signals
    with hosts.stopped_by_signal(), signals.handled():
        try:
            print('ready', flush=True)
            time.sleep(100)
        finally:
            print('saving', flush=True)
            time.sleep({seconds})
"""


@pytest.mark.parametrize(('first', 'second'), [(signal.SIGTERM, None), (signal.SIGHUP, 2)])
def test_exit_codes(first, second):
    """That of the first signal when all is saved, and that of the second one at once."""
    program = textwrap.dedent(SLOW.format(seconds=100 if second else 0))
    pipe = subprocess.PIPE
    with subprocess.Popen(
        [sys.executable, '-c', program], stdout=pipe, stderr=pipe, text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    ) as process:  # fmt: skip
        assert process.stdout.readline() == 'ready\n'
        os.kill(process.pid, first)
        assert process.stdout.readline() == 'saving\n'
        if second:
            os.kill(process.pid, second)
        _, err = process.communicate()
    assert process.returncode == 128 + (second or first)
    last = 'SIGINT: ended at once' if second else 'stopped by SIGTERM; the same command goes on '
    assert err.splitlines()[-1].startswith(last)
    assert len(err.splitlines()) == 2
