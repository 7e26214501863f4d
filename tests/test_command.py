"""How a command ends: with one line for each error, and never with success after an exit."""

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
