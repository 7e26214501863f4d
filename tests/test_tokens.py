"""Tokenizers, stop strings and the texts of completions."""

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest
import tiny
import tokenizers
import transformers

from grpo_jax.data import byte_tokenizer, completion_texts, eos_ids, load_tokenizer, stop_table

BYTES = byte_tokenizer()


@hypothesis.given(st.text())
def test_the_byte_tokenizer_is_utf8(text):
    assert BYTES.encode(text) == list(text.encode())
    assert BYTES.decode(list(text.encode())) == text


def test_special_tokens_of_the_byte_tokenizer():
    assert (BYTES.pad_token_id, BYTES.eos_token_id, len(BYTES)) == (256, 257, 258)
    assert BYTES.encode('<eos>') == list(b'<eos>')
    assert BYTES.decode([97, 257, 256]) == 'a<eos><pad>'
    assert BYTES.decode([97, 257, 256], skip_special_tokens=True) == 'a'


def test_load_tokenizer(tmp_path):
    BYTES.save_pretrained(tmp_path / 'same')
    for name in ('bytes', str(tmp_path / 'same')):
        assert load_tokenizer(name).encode('<eos>é') == list('<eos>é'.encode())
    without = byte_tokenizer()
    without.eos_token = None
    without.save_pretrained(tmp_path / 'without')
    with pytest.raises(ValueError, match=r'/without.* has no end-of-sequence token.*set eos_token'):
        load_tokenizer(str(tmp_path / 'without'))
    tiny.adding('$A <eos>').save_pretrained(tmp_path / 'adding')
    with pytest.raises(ValueError, match=r'/adding.* ends every text with <eos>.*add_eos_token'):
        load_tokenizer(str(tmp_path / 'adding'))
    with pytest.raises(ValueError, match="/none' cannot be loaded: give 'bytes', a folder"):
        load_tokenizer(str(tmp_path / 'none'))


@pytest.mark.parametrize(
    ('generation', 'expected'),
    [
        (None, [257]),
        ({}, [257]),
        ({'eos_token_id': None}, [257]),
        ({'eos_token_id': 65}, [257, 65]),
        ({'eos_token_id': [65, 257, 66]}, [257, 65, 66]),
    ],
)
def test_eos_ids(generation, expected):
    assert eos_ids(BYTES, generation).tolist() == expected


def reaches(table, ids):
    """The position of the id after which the table is in its last state; None if there is none."""
    state = 0
    for place, token in enumerate(ids):
        state = table[state, token]
        if state == len(table) - 1:
            return place
    return None


STOPS = [['ab'], ['aa'], ['\nQ:', '\n\n'], ['abab', 'babb', 'b'], ['aab', 'ab'], ['答案', '案a']]


@pytest.mark.parametrize('stops', STOPS)
@hypothesis.given(text=st.text(alphabet='abQ:\nx', max_size=14))
def test_stop_table_against_a_search_after_each_letter(stops, text):
    table = stop_table(BYTES, stops, 260)
    ends = [any(text[: i + 1].endswith(stop) for stop in stops) for i in range(len(text))]
    expected = ends.index(True) if any(ends) else None
    assert reaches(table, BYTES.encode(text)) == expected


def test_stop_table_of_tokens_of_several_letters():
    """A stop string may begin and end inside tokens; the last state is never left."""
    model = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({'<eos>': 0, 'xa': 1, 'b': 2, 'bx': 3, 'abab': 4}, '<eos>')
    )
    words = transformers.PreTrainedTokenizerFast(tokenizer_object=model, eos_token='<eos>')
    words.backend_tokenizer.decoder = tokenizers.decoders.Fuse()
    words.backend_tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Split('|', 'removed')
    table = stop_table(words, ['ab'], 6)
    assert table.shape == (3, 6)
    assert [reaches(table, ids) for ids in ([1, 2], [1, 3], [4], [2, 2, 1], [1, 0, 5])] == [
        1, 1, 0, None, None,
    ]  # fmt: skip
    assert (table[2] == 2).all()


def test_no_stop_strings_and_empty_ones():
    assert stop_table(BYTES, [], 258) is None
    with pytest.raises(ValueError, match='an empty one would end every completion'):
        stop_table(BYTES, ['a', ''], 258)


def test_texts_end_with_the_first_stop_string():
    ids = np.array([list(b'one\nQ: two##'), list(b'one## two\nQ:'), list(b'no stop here')])
    mask = np.ones(ids.shape, bool)
    cut = completion_texts(BYTES, ids, mask, ['\nQ:', '##'])
    assert cut == ['one\nQ:', 'one##', 'no stop here']


def test_texts():
    ids = np.array([[*b'abc', 257], [0xC3, 0xA9, 257, 120]])
    mask = np.array([[True] * 4, [True, True, True, False]])
    assert completion_texts(BYTES, ids, mask) == ['abc', 'é']
