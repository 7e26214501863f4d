"""Text to tokens and back."""

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest
import tiny

from grpo_jax import tokens

BYTES = tokens.byte_tokenizer()


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
        assert tokens.load_tokenizer(name).encode('<eos>é') == list('<eos>é'.encode())
    without = tokens.byte_tokenizer()
    without.eos_token = None
    without.save_pretrained(tmp_path / 'without')
    with pytest.raises(ValueError, match=r'/without.* has no end-of-sequence token.*set eos_token'):
        tokens.load_tokenizer(str(tmp_path / 'without'))
    tiny.adding('$A <eos>').save_pretrained(tmp_path / 'adding')
    with pytest.raises(ValueError, match=r'/adding.* ends every text with <eos>.*add_eos_token'):
        tokens.load_tokenizer(str(tmp_path / 'adding'))
    with pytest.raises(ValueError, match="/none' cannot be loaded: give 'bytes', a folder"):
        tokens.load_tokenizer(str(tmp_path / 'none'))


def test_eos_ids():
    assert tokens.eos_ids(BYTES) == (257,)
    assert tokens.eos_ids(BYTES, '<pad>', 'A') == (257, 256, 65)
    with pytest.raises(ValueError, match="'<stop>' cannot end completions"):
        tokens.eos_ids(BYTES, '<stop>')


def test_texts():
    ids = np.array([[*b'abc', 257], [0xC3, 0xA9, 257, 120]])
    mask = np.array([[True] * 4, [True, True, True, False]])
    assert tokens.texts(BYTES, ids, mask) == ['abc', 'é']
