"""Tables of tokens, leaked questions, and the order of batches."""

import re

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest
import tiny

from grpo_jax import data, types

BYTES = data.byte_tokenizer()


# Tables


ROWS = [{'q': 'abc', 'a': 'x'}, {'q': 'abcdef', 'a': 'y'}, {'q': 'é', 'a': 'long'}]


def prompts(rows=ROWS, template='{q}', prompt_length=4, tokenizer=BYTES):
    return data.tokenize_prompts(rows, tokenizer, template=template, prompt_length=prompt_length)


def demonstrations(rows=ROWS, tokenizer=BYTES, **options):
    options = {
        'template': '{q}',
        'completion_template': '{a}',
        'prompt_length': 4,
        'completion_length': 5,
        **options,
    }
    return data.tokenize_demonstrations(rows, tokenizer, **options)


def test_prompts_by_hand():
    table = prompts()
    assert table.tokens.tolist() == [[97, 98, 99, 256], [0xC3, 0xA9, 256, 256]]
    assert table.length.tolist() == [3, 2]
    assert table.index.tolist() == [0, 2]
    assert table.dropped == 1
    assert {array.dtype for array in (table.tokens, table.length, table.index)} == {
        np.dtype(np.int32)
    }
    assert prompts(template='{{{q}}}', prompt_length=8).tokens[0, :5].tolist() == [*b'{abc}']


def test_demonstrations_by_hand():
    table = demonstrations()
    assert table.prompts.tokens.tolist() == prompts().tokens.tolist()
    assert table.tokens.tolist() == [[120, 257, 256, 256, 256], [*b'long', 257]]
    assert table.mask.tolist() == [[True, True, False, False, False], [True] * 5]
    assert table.tokens.dtype == np.int32
    assert table.mask.dtype == bool
    short = demonstrations(
        prompt_length=6, completion_length=4
    )  # 'long' and its end token do not fit
    assert short.prompts.index.tolist() == [0, 1]
    assert short.prompts.dropped == 1


def test_special_tokens_are_added_to_prompts_only():
    tokenizer = tiny.adding('<pad> $A', bos_token='<pad>')
    table = demonstrations(tokenizer=tokenizer)
    assert table.prompts.tokens[0].tolist() == [256, 97, 98, 99]
    assert table.tokens[0, :2].tolist() == [120, 257]


@pytest.mark.parametrize('template', ['{question}', '{}', '{0}', '{q', '{q.x}', r'\boxed{x}'])
def test_templates_that_do_not_match_the_columns(template):
    message = re.escape(f'template {template!r} does not fit the data') + r'.*\{q\}, \{a\}'
    with pytest.raises(ValueError, match=message):
        prompts(template=template)
    with pytest.raises(ValueError, match=message):
        demonstrations(completion_template=template)


def test_unusable_rows():
    with pytest.raises(ValueError, match='the prompt of row 1 has no tokens'):
        prompts(rows=[{'q': 'a'}, {'q': ''}])
    message = r'all 3 prompts are longer than prompt_length=1 .*shortest has 2, the longest 6'
    with pytest.raises(ValueError, match=message):
        prompts(prompt_length=1)
    with pytest.raises(ValueError, match='all 3 completions are longer than completion_length=1'):
        demonstrations(completion_length=1)
    with pytest.raises(ValueError, match='no row has both a prompt within prompt_length=2 tokens'):
        demonstrations(prompt_length=2, completion_length=4)
    with pytest.raises(ValueError, match='the data set has no rows'):
        prompts(rows=[])


def test_a_summary_counts_every_row():
    assert prompts().summary() == '2 of 3 rows used; dropped 1 that are too long'
    assert prompts().summary(leaked=4).startswith('2 of 7 rows used; dropped 1 that are too long a')


def test_chat_tables_end_as_the_assistant_does():
    tokenizer = tiny.adding('<pad> $A', bos_token='<pad>')
    tokenizer.add_special_tokens({'additional_special_tokens': ['<end>']})
    tokenizer.split_special_tokens = False
    tokenizer.chat_template = (
        "{{ bos_token }}{% for m in messages %}{{ m.role[0] + ':' + m.content + ' <end>' }}"
        '{% endfor %}{% if add_generation_prompt %}a:{% endif %}'
    )
    end = tokenizer.convert_tokens_to_ids('<end>')
    assert tokenizer('<end>').input_ids == [256, end]
    settings = {'prompt_length': 20, 'completion_length': 6, 'chat': True, 'system': 'S'}
    table = demonstrations(tokenizer=tokenizer, **settings)
    expected = [256, *b's:S ', end, *b'u:abc ', end, *b'a:']
    assert table.prompts.tokens[0, : table.prompts.length[0]].tolist() == expected
    assert table.tokens[0].tolist() == [*b'x ', end, 256, 256, 256]
    assert table.mask.sum(-1).tolist() == [3, 3, 6]
    del settings['completion_length']
    sampled = data.tokenize_prompts(ROWS, tokenizer, template='{q}', **settings)
    assert sampled.tokens.tolist() == table.prompts.tokens.tolist()


def test_worked_examples_count_as_tokens():
    rows = [{'question': str(n), 'answer': str(n)} for n in range(10)]
    table = data.tokenize_prompts(
        rows[9:], BYTES, template='gsm8k_8shot', prompt_length=300, examples=rows
    )
    text = BYTES.decode(table.tokens[0][: table.length[0]])
    assert text.startswith('Q: 0\nA: The answer is 0.\n\nQ: 1\n')
    assert text.endswith('Q: 7\nA: The answer is 7.\n\nQ: 9\nA:')


# Leaks


def test_leaks_by_hand():
    training = [{'question': text, 'n': str(n)} for n, text in enumerate(['Why ?', 'a b', 'ab'])]
    heldout = [{'question': text} for text in ('WHY?', ' A  b', 'A  B', 'other')]
    kept, leaked = data.without_leaks(training, heldout)
    assert leaked == 2
    assert list(kept) == training[2:]
    assert kept[0]['n'] == '2'
    with pytest.raises(IndexError):
        kept[1]
    assert data.columns(kept, np.array([0]), 2)['n'] == ['2', '2']
    assert prompts(kept, '{question}').tokens[:, :2].tolist() == [[*b'ab']]
    same, leaked = data.without_leaks(training, heldout[3:])
    assert leaked == 0
    assert same is training
    assert data.without_leaks(training, []) == (training, 0)


@hypothesis.given(
    st.lists(st.text('ab ?', max_size=3), max_size=20),
    st.lists(st.text('AB ?', max_size=3), max_size=20),
)
def test_nothing_held_out_is_trained_on(training, heldout):
    def bare(question):
        return re.sub(r' ?[?] ?', '?', ' '.join(question.split())).lower()

    held = {bare(question) for question in heldout}
    expected = [question for question in training if bare(question) not in held]
    hypothesis.assume(expected or not training)
    rows, asked = ([{'question': text} for text in texts] for texts in (training, heldout))
    kept, leaked = data.without_leaks(rows, asked)
    assert [row['question'] for row in kept] == expected
    assert leaked == len(training) - len(expected)


def test_leaks_of_all_rows_or_without_the_column():
    rows = [{'question': 'a'}, {'question': 'b'}]
    with pytest.raises(ValueError, match='all 2 training rows are held out as well'):
        data.without_leaks(rows, rows[::-1])
    for pair in ((ROWS, rows), (rows, ROWS)):
        with pytest.raises(ValueError, match="column 'question', but the columns are q, a: rename"):
            data.without_leaks(*pair)
    assert data.without_leaks(ROWS, ROWS[1:], column='q')[1] == 2


# Columns


def test_columns_repeat_in_group_order():
    expected = {'q': ['é', 'é', 'abc', 'abc'], 'a': ['long', 'long', 'x', 'x']}
    assert data.columns(ROWS, np.array([2, 0], np.int32), 2) == expected


# Batches

TEN = prompts(rows=[{'q': chr(65 + place)} for place in range(10)])


def indices(table, batch_size, seed, steps):
    served = data.batches(table, batch_size, seed=seed)
    return [served[step].index.tolist() for step in steps]


def test_batch_k_is_a_function_of_seed_and_k():
    far = [0, 3, 10**6, 2**40]
    forward = indices(TEN, 4, 0, far)
    assert indices(TEN, 4, 0, far[::-1]) == forward[::-1]
    assert all(set(batch) <= set(range(10)) for batch in forward)
    assert indices(TEN, 4, 1, far) != forward


@hypothesis.settings(max_examples=10)
@hypothesis.given(st.integers(1, 10), st.integers(0, 2**64))
def test_every_epoch_holds_every_row_once(batch_size, seed):
    steps = range(-(-30 // batch_size))
    order = np.concatenate(indices(TEN, batch_size, seed, steps))
    for start in (0, 10, 20):
        assert sorted(order[start : start + 10]) == list(range(10))


def test_epochs_and_seeds_differ_in_order():
    epochs = [tuple(indices(TEN, 10, seed, [step])[0]) for seed in range(4) for step in range(4)]
    assert len(set(epochs)) == 16  # also: epoch 1 of a seed is not epoch 0 of the next


def test_batches_of_prompts():
    batch = data.batches(TEN, 4, seed=0)[1]
    assert type(batch) is types.Prompts
    assert batch.tokens.shape == (4, 4)
    assert batch.tokens[:, 0].tolist() == (65 + batch.index).tolist()
    assert batch.length.tolist() == [1] * 4
    assert {type(array) for array in batch[:3]} == {np.ndarray}
    assert {array.dtype for array in batch[:3]} == {np.dtype(np.int32)}


def test_batches_of_demonstrations():
    table = demonstrations()
    batch = data.batches(table, 2, seed=0)[5]
    assert type(batch) is types.Rollout
    order = [table.prompts.index.tolist().index(row) for row in batch.prompts.index]
    assert batch.tokens[:, 0].tolist() == table.tokens[order].tolist()
    assert batch.mask[:, 0].tolist() == table.mask[order].tolist()
    assert batch.tokens.shape == batch.mask.shape == batch.logprobs.shape == (2, 1, 5)
    assert not batch.logprobs.any()
    assert batch.logprobs.dtype == np.float32
    assert batch.ended.tolist() == [[True], [True]]


def test_invalid_batch_sizes_and_seeds():
    for batch_size in (0, 11):
        with pytest.raises(ValueError, match=f'batch_size is {batch_size}: make it 1 to 10'):
            data.batches(TEN, batch_size, seed=0)
    with pytest.raises(ValueError, match='seed is -1'):
        data.batches(TEN, 2, seed=-1)


def test_in_order():
    batches = list(data.in_order(TEN, 4))
    assert [batch.index.tolist() for batch, _ in batches] == [
        [0, 1, 2, 3],
        [4, 5, 6, 7],
        [8, 9, 9, 9],
    ]
    assert [real for _, real in batches] == [4, 4, 2]
    (batch, real), *rest = data.in_order(demonstrations(), 3)
    assert batch.prompts.index.tolist() == [0, 2, 2]
    assert (batch.tokens.shape, real, rest) == ((3, 1, 5), 2, [])
