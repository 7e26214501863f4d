"""Tokenizers, stop strings and the texts of completions."""

import json

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest
import tiny
import tokenizers
import transformers

from grpo_jax.data import (
    byte_tokenizer,
    check_token_ids,
    completion_texts,
    eos_ids,
    load_tokenizer,
    stop_table,
    token_ids,
    token_ranges,
)

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


BOS, EOS = '<｜begin▁of▁sentence｜>', '<｜end▁of▁sentence｜>'


def write_bytewise(folder, post_processor=None, digits=True, **settings):
    """A byte-level tokenizer whose folder names a class for sentencepiece ones, as DeepSeek's."""
    model = tokenizers.Tokenizer(tokenizers.models.BPE())
    splits = [
        tokenizers.pre_tokenizers.Split(tokenizers.Regex(r'\s?\p{L}+'), 'isolated'),
        tokenizers.pre_tokenizers.Digits(individual_digits=digits),
        tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ]
    model.pre_tokenizer = tokenizers.pre_tokenizers.Sequence(splits)
    model.decoder = tokenizers.decoders.ByteLevel()
    letters = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=300, initial_alphabet=letters, show_progress=False
    )
    model.train_from_iterator(['How many apples are there? It is 12345.'] * 9, trainer)
    model.add_special_tokens([BOS, EOS])
    byte_level = tokenizers.processors.ByteLevel(trim_offsets=False)
    model.post_processor = (post_processor and post_processor(model)) or byte_level
    folder.mkdir(parents=True)
    model.save(str(folder / 'tokenizer.json'))
    described = {
        'bos_token': BOS, 'eos_token': EOS, 'pad_token': EOS, 'unk_token': None, 'legacy': True,
        'clean_up_tokenization_spaces': False, 'tokenizer_class': 'LlamaTokenizerFast',
    } | settings  # fmt: skip
    (folder / 'tokenizer_config.json').write_text(json.dumps(described))
    (folder / 'config.json').write_text('{"model_type": "llama"}')
    return str(folder)


def adding_bos(model):
    return tokenizers.processors.TemplateProcessing(
        single=f'{BOS} $A', special_tokens=[(BOS, model.token_to_id(BOS))]
    )


@pytest.mark.parametrize('processor', [None, adding_bos], ids=['plain', 'adding'])
@pytest.mark.parametrize('stated', [True, False, None])
@pytest.mark.parametrize('kind', ['LlamaTokenizerFast', 'PreTrainedTokenizerFast'])
def test_bos_is_added_as_the_configuration_says(processor, stated, kind, tmp_path):
    settings = {} if stated is None else {'add_bos_token': stated, 'add_eos_token': False}
    name = write_bytewise(tmp_path / 'x', processor, tokenizer_class=kind, **settings)
    tokenizer = load_tokenizer(name)
    adds = processor is not None if stated is None else stated
    ids = tokenizer('The answer', add_special_tokens=False).input_ids
    assert tokenizer.decode(ids) == 'The answer'
    assert tokenizer('The answer').input_ids == [tokenizer.bos_token_id] * adds + ids
    tokenizer.save_pretrained(tmp_path / 'again')
    assert load_tokenizer(str(tmp_path / 'again'))('The answer').input_ids == (
        tokenizer('The answer').input_ids
    )


def test_a_tokenizer_whose_ids_differ_from_its_file(tmp_path):
    """A class that splits texts by its own rules: Qwen2's splits numbers into digits."""
    name = write_bytewise(tmp_path / 'x', digits=False, tokenizer_class='Qwen2Tokenizer')
    (tmp_path / 'x' / 'config.json').write_text('{"model_type": "qwen2"}')
    stored = tokenizers.Tokenizer.from_file(f'{name}/tokenizer.json')
    loaded = transformers.AutoTokenizer.from_pretrained(name)
    text = 'How many apples are 12345 + 67?'
    differs = loaded(text, add_special_tokens=False).input_ids != stored.encode(text).ids
    assert differs, 'another class of transformers has to be found for this test'
    with pytest.raises(ValueError, match=r"loads it as Qwen2\w+, .*tokenizer_class to 'PreTrained"):
        load_tokenizer(name)
    (tmp_path / 'x' / 'config.json').unlink()
    (tmp_path / 'x' / 'tokenizer_config.json').write_text(
        json.dumps({'eos_token': EOS, 'tokenizer_class': 'PreTrainedTokenizerFast'})
    )
    assert load_tokenizer(name)(text).input_ids == stored.encode(text).ids


def test_errors_of_other_libraries_name_the_tokenizer(tmp_path):
    name = write_bytewise(tmp_path / 'x')
    for text in ('{', '{"model": {"type": "BPE"}}', '[]'):
        (tmp_path / 'x' / 'tokenizer.json').write_text(text)
        with pytest.raises(ValueError, match=r'/x. cannot be loaded: give .bytes., a') as e:
            load_tokenizer(name)
        assert len(str(e.value)) < 600


def test_a_tokenizer_without_a_vocabulary(tmp_path):
    byte_tokenizer().save_pretrained(tmp_path)
    path = tmp_path / 'tokenizer.json'
    fields = json.loads(path.read_text())
    fields['model']['vocab'] = {}
    path.write_text(json.dumps(fields))
    with pytest.raises(ValueError, match=r"has no tokens for '1', and perhaps for no text at all"):
        load_tokenizer(str(tmp_path))


def test_ids_of_a_tokenizer():
    assert token_ids(BYTES).tolist() == list(range(258))
    assert token_ranges(np.arange(258)) == ((0, 258),)
    assert token_ranges(np.array([0, 1, 2, 5, 7, 8])) == ((0, 3), (5, 6), (7, 9))
    check_token_ids(np.array([0, 257]), BYTES, 258)
    check_token_ids(np.array([], int), BYTES, 258)
    with pytest.raises(ValueError, match=r"'<eos>' is token 257 of the tokenizer, .* embeds 257 t"):
        check_token_ids(np.array([[1, 257]]), BYTES, 257)


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
