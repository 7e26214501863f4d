"""How a command ends: with one line for each error, and never with success after an exit."""

import os
import subprocess
import sys

import pytest

from grpo_jax.run.command import one_line_errors


@pytest.mark.parametrize('code', [0, None, 1, 'bye'])
def test_an_exit_of_other_code_is_an_error(code, capsys):
    with pytest.raises(SystemExit) as caught, one_line_errors():
        raise SystemExit(code)
    assert caught.value.code == 2
    assert f'error: the program was ended by sys.exit({code!r})' in capsys.readouterr().err


def test_errors_that_the_user_can_fix_are_one_line(capsys, monkeypatch):
    monkeypatch.delenv('GRPO_JAX_TRACEBACK', raising=False)
    with pytest.raises(SystemExit) as caught, one_line_errors():
        raise ValueError('two\n  lines')
    assert caught.value.code == 2
    assert capsys.readouterr().err == 'error: two lines\n'
    monkeypatch.setenv('GRPO_JAX_TRACEBACK', '1')
    with pytest.raises(ValueError, match='two'), one_line_errors():
        raise ValueError('two')


SCRIPT = """
import os
from grpo_jax.run.command import one_line_errors
with one_line_errors():
    {body}
"""


@pytest.mark.parametrize(
    'buffered', [{}, {'PYTHONUNBUFFERED': '1'}], ids=['buffered', 'unbuffered']
)
@pytest.mark.parametrize('size', [3, 10**6])
def test_a_reader_that_has_gone_is_no_error(size, buffered):
    """As `head` does. The reader is gone before the program begins, so nothing depends on time."""
    reading, writing = os.pipe()
    os.close(reading)
    script = SCRIPT.format(body=f"print('x' * {size})")
    ended = subprocess.run(
        [sys.executable, '-c', script], stdout=writing, stderr=subprocess.PIPE, text=True,
        env=os.environ | buffered,
    )  # fmt: skip
    os.close(writing)
    assert (ended.returncode, ended.stderr) == (141, '')


def test_another_pipe_that_breaks_is_an_error():
    body = 'reading, writing = os.pipe(); os.close(reading); os.write(writing, b"x")'
    ended = subprocess.run(
        [sys.executable, '-c', SCRIPT.format(body=body)], capture_output=True, text=True
    )
    assert (ended.returncode, ended.stderr) == (2, 'error: [Errno 32] Broken pipe\n')
