"""A file that a command writes is whole, or as it was before."""

import pytest

from grpo_jax.run.output_file import replaced


def test_the_file_is_replaced_at_the_end(tmp_path):
    path = tmp_path / 'a.jsonl'
    path.write_text('old')
    with replaced(path) as file:
        file.write('new \ud800')
        assert path.read_text() == 'old'
    assert path.read_text() == 'new \\ud800'
    with pytest.raises(TypeError), replaced(path) as file:
        file.writelines(['half', None])
    assert path.read_text() == 'new \\ud800'
    assert [p.name for p in tmp_path.iterdir()] == ['a.jsonl']


def test_what_cannot_be_written_fails_before_the_work(tmp_path):
    for path, error in ((tmp_path, ValueError), (tmp_path / 'nowhere' / 'a', OSError)):
        with pytest.raises(error), replaced(path):
            raise AssertionError('the work has begun')
