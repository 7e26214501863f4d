"""Runs that are killed at random moments, or find the disk full, end as unbroken ones."""

import json
import os
import pathlib
import subprocess
import sys

import pytest

PROGRAM = pathlib.Path(__file__).with_name('kill_runs.py')


def run(folder, *arguments, timeout=3600):
    """What the program prints, as JSON, a line each."""
    environment = dict(os.environ)
    if programs := os.environ.get('GRPO_JAX_TEST_PROGRAMS'):
        environment.setdefault('JAX_COMPILATION_CACHE_DIR', programs)
    command = [sys.executable, str(PROGRAM), f'--folder={folder}', *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=timeout)
    assert done.returncode == 0, done.stdout + done.stderr
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith('{')]


def test_a_killed_run(tmp_path):
    """Of GRPO: once, within a save."""
    (found, total) = run(tmp_path, '--kinds=grpo', '--kills=1', '--parts=save')
    assert found['grpo'][1] == []
    assert sum(total.values()) == 1


@pytest.mark.slow
def test_killed_runs_of_all_kinds(tmp_path):
    """More kills take longer: python tests/kill_runs.py --folder=/tmp/kills --kills=10."""
    found, total = run(tmp_path, '--kills=3')
    assert all(different == [] for _, different in found.values())
    assert sum(total.values()) == 3 * len(found)


@pytest.mark.slow
def test_a_full_disk(tmp_path):
    """At every write: one line that names the file, and nothing is lost when room has been made."""
    (tmp_path / 'disk').mkdir()
    mount = ['mount', '-t', 'tmpfs', 'tmpfs', str(tmp_path / 'disk')]
    if os.geteuid() or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip('a file system cannot be mounted here: run as root, outside of a container')
    subprocess.run(['umount', str(tmp_path / 'disk')], check=True)
    (found,) = run(tmp_path, '--kinds=grpo', '--full')
    assert len(found['grpo']) > 20
    assert not any(found['grpo'].values())


@pytest.mark.slow
def test_hostile_rewards_of_a_command(tmp_path):
    """Never status 0 of a run that is not finished, and what was done is saved."""
    program = PROGRAM.with_name('hostile_runs.py')
    command = [sys.executable, str(program), f'--folder={tmp_path}']
    done = subprocess.run(command, capture_output=True, text=True, timeout=3600)
    assert done.returncode == 0, done.stdout + done.stderr
