"""JSON lines: split at '\\n' alone, whole or not at all, and errors that name the line."""

import os
import resource
import signal

import hypothesis
import pytest
from hypothesis import strategies as st

from grpo_jax.run import json_lines

BREAKS = '\n\r\v\f\x1c\x1d\x1e\x85\u2028\u2029\0"\\é好\ud800'


def rows(path):
    return [line.row for line in json_lines.read(path)]


def written(path, *values):
    file = json_lines.Appender(path)
    for value in values:
        file.write(json_lines.line(value))
    file.close()
    return path


@hypothesis.given(st.lists(st.text(st.sampled_from(BREAKS) | st.characters()), max_size=4))
def test_any_text_comes_back(tmp_path_factory, texts):
    path = tmp_path_factory.mktemp('lines') / 'a.jsonl'
    written(path, *({'text': text, text: 1} for text in texts))
    assert rows(path) == [{'text': text, text: 1} for text in texts]
    assert path.read_bytes().count(b'\n') == len(texts)


@pytest.mark.parametrize('end', [1, 2, 9])
def test_a_torn_last_line_is_not_read_and_a_whole_one_is(tmp_path, end):
    path = written(tmp_path / 'a.jsonl', {'text': 'a\u2028b'}, {'text': '\x85'})
    assert len(rows(path)) == 2
    path.write_bytes(path.read_bytes()[:-end])
    assert rows(path) == [{'text': 'a\u2028b'}]


@pytest.mark.parametrize('text', ['{', '[1]', '1', '', '\0\0', '{"a": 1} x', '[' * 100_000])
def test_a_line_that_cannot_be_read_is_named(tmp_path, text):
    path = tmp_path / 'a.jsonl'
    path.write_text('{"a": "\u2028"}\n' + text + '\n{}\n')
    with pytest.raises(ValueError, match=r'a\.jsonl, line 2 is not a JSON object .*remove it'):
        rows(path)


def test_a_row_that_does_not_fit_on_the_disk_leaves_no_part_of_it(tmp_path):
    """A limit of the size of files fails as a full disk does: after a part of the row."""
    file = json_lines.Appender(tmp_path / 'a.jsonl')
    file.write(json_lines.line({'a': 1}))
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, before[1]))
    try:
        with pytest.raises(OSError, match=r'a\.jsonl'):
            file.write(json_lines.line({'text': 'x' * 200}))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    assert os.path.getsize(tmp_path / 'a.jsonl') == len('{"a": 1}\n')
    file.write(json_lines.line({'text': 'x' * 200}))
    file.sync()
    file.close()
    assert rows(tmp_path / 'a.jsonl') == [{'a': 1}, {'text': 'x' * 200}]
