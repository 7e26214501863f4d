"""One run at a time trains in a folder; locks of processes that have ended are none."""

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import textwrap
import threading

import pytest

from grpo_jax.run import lock

HOLDER = """
    import pathlib, sys, time
    from grpo_jax.run import lock
    with lock.held(pathlib.Path(sys.argv[1])):
        print('held', flush=True)
        sys.stdin.read()
"""


@pytest.fixture
def holder(tmp_path):
    """Another process that holds the lock of a new folder."""
    command = [sys.executable, '-c', textwrap.dedent(HOLDER), str(tmp_path / 'run')]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True) as process:
        assert process.stdout.readline() == 'held\n'
        yield process
        process.kill()


def take(workdir):
    with lock.held(workdir):
        return json.loads((workdir / lock.FILE).read_text())


def test_a_second_process_is_refused_until_the_first_has_ended(tmp_path, holder):
    workdir = tmp_path / 'run'
    message = rf"workdir '.*run' is in use: process {holder.pid} on .+, since 20.+ trains in it; "
    for _ in range(2):  # the refusal does not release it
        with pytest.raises(lock.LockedError, match=message + 'wait until it has ended, stop it by'):
            take(workdir)
    os.kill(holder.pid, signal.SIGKILL)
    holder.wait()
    assert (workdir / lock.FILE).exists()
    assert take(workdir)['pid'] == os.getpid()
    assert not list(workdir.iterdir())


def test_an_end_in_order_leaves_nothing(tmp_path, holder):
    holder.communicate('')
    assert not list((tmp_path / 'run').iterdir())


def test_one_process_trains_once_at_a_time_in_a_folder(tmp_path):
    (tmp_path / 'link').symlink_to(tmp_path)
    with lock.held(tmp_path), pytest.raises(lock.LockedError, match='is in use'):
        take(tmp_path / 'link')
    with lock.held(tmp_path):  # an error before did not keep it
        assert len(list(tmp_path.iterdir())) == 2


def test_children_do_not_hold_the_lock(tmp_path):
    """A worker that outlives a killed run does not keep its folder."""
    with lock.held(tmp_path):
        child = multiprocessing.get_context('fork').Process(target=signal.pause)
        child.start()
    assert take(tmp_path)
    child.kill()
    child.join()


def record(**changes):
    return lock._identity() | {'pid': 4, 'host': 'there', 'boot': 'another'} | changes


@pytest.mark.parametrize('text', ['', '{', '[]', '\0\0', json.dumps(record(boot=lock._boot()))])
def test_what_a_killed_process_of_this_machine_left_is_no_lock(tmp_path, text):
    (tmp_path / lock.FILE).write_text(text)
    assert take(tmp_path)['pid'] == os.getpid()


def test_a_lock_of_another_machine_is_one_while_its_number_changes(tmp_path, monkeypatch, caplog):
    """Of which this machine's kernel knows nothing, on some network file systems."""
    monkeypatch.setattr(lock, 'BEAT', 0.2)
    path, ended = tmp_path / lock.FILE, threading.Event()

    def count():
        # Another process: this one would release its own lock by closing the file.
        subprocess.run([sys.executable, '-c', f'open({str(path)!r}, "w").write({text!r})'])
        ended.set()

    path.write_text(json.dumps(record()))
    text = json.dumps(record(beats=1))
    monkeypatch.setattr(lock, '_PATIENCE', 100)
    other = threading.Thread(target=count)
    other.start()
    with pytest.raises(lock.LockedError, match='process 4 on there, since'):
        take(tmp_path)
    other.join()
    monkeypatch.setattr(lock, '_PATIENCE', 2.5)
    assert take(tmp_path)['pid'] == os.getpid()
    assert 'process 4 on there has not removed its lock; waiting 0.5 s' in caplog.text


@pytest.mark.parametrize('code', ['ENOLCK', 'ENOTSUP'])
def test_without_locks_of_the_file_system_the_process_tells(tmp_path, monkeypatch, code):
    def fail(*_):
        raise OSError(getattr(lock.errno, code), 'no locks')

    monkeypatch.setattr(lock.fcntl, 'lockf', fail)
    alive = {'pid': os.getpid(), 'boot': lock._boot()}
    (tmp_path / lock.FILE).write_text(json.dumps(record(**alive)))
    with pytest.raises(lock.LockedError, match=f'process {os.getpid()} on there'):
        take(tmp_path)
    # Another process has got its number since.
    (tmp_path / lock.FILE).write_text(json.dumps(record(**alive, process_started='1')))
    assert take(tmp_path)['pid'] == os.getpid()


def test_the_holder_counts(tmp_path, monkeypatch):
    monkeypatch.setattr(lock, 'BEAT', 0.01)
    with lock.held(tmp_path):
        for _ in range(500):
            if json.loads((tmp_path / lock.FILE).read_text() or '{"beats": 0}')['beats'] > 1:
                break
            threading.Event().wait(0.01)
        else:
            pytest.fail('it does not')


def test_a_folder_that_cannot_be_made_is_reported_by_the_check_of_the_config(tmp_path):
    (tmp_path / 'file').write_text('')
    with lock.held(tmp_path / 'file' / 'run'):
        pass
    assert (tmp_path / 'file').read_text() == ''
