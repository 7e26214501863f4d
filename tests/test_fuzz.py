"""Malformed inputs of every format end in one clear error; see `benchmarks/fuzz.py`."""

import pathlib
import subprocess
import sys

import pytest

PROGRAM = pathlib.Path(__file__).parents[1] / 'benchmarks' / 'fuzz.py'


@pytest.mark.parametrize('count', [200, pytest.param(20_000, marks=pytest.mark.slow)])
def test_malformed_inputs_are_clear_errors(count):
    """In a process of its own, without the checks of types that the tests add."""
    ended = subprocess.run(
        [sys.executable, str(PROGRAM), f'--count={count}', '--seed=1'],
        capture_output=True, text=True,
    )  # fmt: skip
    assert ended.returncode == 0, ended.stdout + ended.stderr[-2000:]
    rows = {line[:14].strip(): line[14:].split() for line in ended.stdout.splitlines()[1:]}
    assert len(rows) == 10
    assert all(int(errors) > 0 for _, errors, *_ in rows.values())  # inputs are malformed
