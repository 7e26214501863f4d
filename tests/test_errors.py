"""Messages of errors: all problems of a config, and files for which there is no room."""

import errno
import logging
import os
import pathlib
import sys
import types

import pytest

from grpo_jax.run import compute_plans, json_lines, managers
from grpo_jax.run.command import one_line_errors
from grpo_jax.run.defaults import defaults
from grpo_jax.run.environment import read_environment
from grpo_jax.run.errors import ConfigError, is_disk_full, naming_file, problems_of
from grpo_jax.run.inputs import Inputs, check_inputs
from grpo_jax.run.loggers import opened
from grpo_jax.run.output_file import new_folder, replaced
from grpo_jax.run.plan import listed

FULL = pathlib.Path('/dev/full')  # every write to it finds no room
REMEDY = 'make room there, and give the same command again'


@pytest.mark.parametrize(
    ('error', 'file'),
    [
        (OSError(errno.ENOSPC, 'No space left on device', '/a/b c.json'), '/a/b c.json'),
        (OSError(errno.ENOSPC, 'No space left on device', b'/a/b'), '/a/b'),
        (OSError(errno.ENOSPC, 'No space left on device'), 'a file'),
        (
            ValueError(
                'RESOURCE_EXHAUSTED: Error writing local file "/a/b c/_sharding": Failed to write '
                "3619 bytes to file 8: No space left on device [os_error_code='28']"
            ),
            '/a/b c/_sharding',
        ),
        (RuntimeError('write() failed: No space left on device; writing /a/b-0; at 8'), '/a/b-0'),
        (RuntimeError('I/O error: No space left on device (os error 28)'), 'a file'),
    ],
)
def test_a_full_disk_is_named_with_its_remedy(error, file, capsys):
    line = f'{file} cannot be written (No space left on device): {REMEDY}'
    assert is_disk_full(error)
    assert problems_of(error) == (line,)
    with pytest.raises(SystemExit) as ended, one_line_errors():
        raise error
    assert ended.value.code == 2
    assert capsys.readouterr().err == f'error: {line}\n'


def test_a_quota_is_a_full_disk_too():
    assert problems_of(OSError(errno.EDQUOT, 'Disk quota exceeded', '/a')) == (
        f'/a cannot be written (Disk quota exceeded): {REMEDY}',
    )


@pytest.mark.parametrize(
    'error', [OSError(errno.EACCES, 'Permission denied', '/a'), RuntimeError('out of memory')]
)
def test_other_errors_are_as_they_were(error):
    assert not is_disk_full(error)
    assert problems_of(error) == (str(error),)
    with pytest.raises(type(error)) as raised, naming_file('/other'):
        raise error
    assert raised.value is error


def test_all_problems_of_a_config():
    assert problems_of(ConfigError(['a', 'b', 'a'])) == ('a', 'b')


def write_text(folder):
    with replaced(FULL) as file:
        file.write('x' * 10)


def write_in_new_folder(folder):
    with new_folder(folder / 'made'):
        raise OSError(errno.ENOSPC, 'No space left on device')


def write_by_library(folder):
    with naming_file(FULL):
        raise RuntimeError('I/O error: No space left on device (os error 28)')


@pytest.mark.parametrize(
    ('write', 'name'),
    [
        (lambda folder: json_lines.Appender(FULL).write('x'), str(FULL)),
        (write_text, str(FULL)),
        (write_by_library, str(FULL)),
        (write_in_new_folder, 'made'),
    ],
)
def test_writers_name_their_files(write, name, tmp_path):
    if not FULL.exists():
        pytest.skip('there is no /dev/full')
    with pytest.raises(OSError, match='No space left') as raised:
        write(tmp_path)
    assert raised.value.errno == errno.ENOSPC
    assert os.fspath(raised.value.filename).endswith(name)


@pytest.mark.parametrize(
    ('name', 'read'),
    [
        ('environment.json', read_environment),
        ('loggers.json', lambda folder: opened(defaults(), folder).__enter__()),
        ('compute.json', compute_plans._read),
        ('plan.json', lambda folder: listed.warned_of_others(folder).__enter__()),
        ('inputs.json', lambda folder: check_inputs(Inputs({}, {}), folder, override=False)),
    ],
)
@pytest.mark.parametrize('text', ['', '{', '[1]', '{"a": 1}', '{"a": {"plan": {"rows": -1}}}'])
def test_a_damaged_file_of_a_run_is_named(name, read, text, tmp_path):
    (tmp_path / name).write_text(text)
    with pytest.raises(
        ValueError, match=f'^{tmp_path / name} cannot be read .*(restore|remove) it'
    ):
        read(tmp_path)


def test_of_a_failed_save_nothing_else_is_printed(caplog, monkeypatch, tmp_path):
    shown = []
    monkeypatch.setattr(sys, 'unraisablehook', shown.append)
    logger = logging.getLogger('absl')
    monkeypatch.setattr(logger, 'propagate', True)
    monkeypatch.setattr(logger, 'handlers', [])

    def save(path='/lib/orbax/future.py', level=logging.ERROR, *, traced=True):
        info = (ValueError, ValueError('x'), None) if traced else None
        logger.handle(logging.LogRecord('absl', level, path, 1, path, (), info))
        sys.unraisablehook(types.SimpleNamespace(exc_value=RuntimeError('Event loop is closed')))
        raise OSError(errno.ENOSPC, 'No space left on device')

    def logged(**what):
        """The records of a save that fails, and what is shown."""
        caplog.clear()
        shown.clear()
        with pytest.raises(OSError, match='No space') as raised, managers.clear_errors(tmp_path):
            save(**what)
        assert raised.value.filename == str(tmp_path)
        assert not shown
        return len(caplog.records)

    assert logged() == 0
    assert logged(level=logging.WARNING) == 1
    assert logged(traced=False) == 1
    assert logged(path='/lib/other.py') == 1
    with pytest.raises(OSError, match='No space'):
        save()
    assert len(caplog.records) == 2  # outside of the block it is as before
    assert len(shown) == 1
