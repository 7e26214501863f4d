"""Data: what is generated and read, how it is tokenised, and which batch comes when."""

import collections
import dataclasses
import json
import os
import pathlib
import re
import subprocess
import sys

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest
import tiny

from grpo_jax import data, datasets, tokens
from grpo_jax.datasets.arithmetic import carryless, chain, row

ARITHMETIC = {'train_size': 80, 'test_size': 20}
BYTES = tokens.byte_tokenizer()
NATURAL = st.integers(0, 9999)


@pytest.fixture(scope='module')
def cache_dir(tmp_path_factory):
    return tmp_path_factory.mktemp('cache')


@pytest.fixture
def data_dir(tmp_path, monkeypatch):
    monkeypatch.setenv('GRPO_JAX_DATA_DIR', str(tmp_path))
    return tmp_path


def write(folder, name, *lines):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_bytes('\n'.join(lines).encode())


# Arithmetic, by hand


def test_chain_by_hand():
    right = chain([37, 58, 21], ['+', '+'], lambda: False)
    assert right == ['37+58=95', '95+21=116']
    slipped = chain([37, 58, 21], ['+', '+'], lambda: True)
    assert slipped == ['37+58=85', '85+21=6']  # 7+8=15, keep 5; 8+2=10, keep 0
    assert chain([2, 3, 4], ['+', '*'], lambda: False) == ['2+3=5', '5*4=20']  # left to right


@pytest.mark.parametrize(
    ('left', 'symbol', 'right', 'expected'),
    [
        (37, '+', 58, 85),
        (95, '+', 21, 16),
        (5, '+', 5, 0),
        (999, '+', 1, 990),
        (12, '+', 34, 46),
        (52, '-', 37, 25),
        (100, '-', 1, 109),
        (7, '*', 8, 6),
        (12, '*', 34, 308),  # units 8, tens 4+6=10 keep 0, hundreds 3
        (12, '*', 13, 156),
    ],
)
def test_carryless_by_hand(left, symbol, right, expected):
    assert carryless(left, symbol, right) == expected


@hypothesis.given(NATURAL, NATURAL, NATURAL)
def test_carryless_is_a_ring(a, b, c):
    assert carryless(carryless(a, '+', b), '-', b) == a
    assert carryless(a, '*', b) == carryless(b, '*', a)
    apart = carryless(carryless(a, '*', b), '+', carryless(a, '*', c))
    assert carryless(a, '*', carryless(b, '+', c)) == apart


@hypothesis.given(NATURAL, NATURAL)
def test_a_sum_is_carryless_where_no_column_reaches_ten(a, b):
    columns = zip(f'{a:04}', f'{b:04}', strict=True)
    assert (carryless(a, '+', b) == a + b) == all(int(x) + int(y) < 10 for x, y in columns)


def test_slips_are_drawn_at_carry_steps_alone():
    asked = []
    chain([12, 34, 7], ['+', '+'], lambda: bool(asked.append(None)))
    assert len(asked) == 1  # 12+34 carries nothing, 46+7 does


def test_a_slip_never_leads_below_zero():
    slips = iter([True])  # asked for 9+8 alone: 7-9 has nothing to borrow from
    assert chain([9, 8, 9], ['+', '-'], lambda: next(slips)) == ['9+8=7', '7-9=8']


def test_row_by_hand():
    columns = {'question': '37+58+21=', 'answer': '116', 'solution': '37+58=95;95+21=116'}
    for mistakes, demonstration in ((0, '37+58=95;95+21=116'), (1, '37+58=85;85+21=6')):
        expected = {**columns, 'demonstration': demonstration}
        assert row([37, 58, 21], ['+', '+'], mistakes=mistakes, seed=0) == expected
    drawn = [row([37, 58], ['+'], mistakes=0.5, seed=seed)['demonstration'] for seed in range(20)]
    assert set(drawn) == {'37+58=95', '37+58=85'}


# Arithmetic, as a data set


def load_arithmetic(cache_dir, **options):
    splits = ('train', 'test')
    return [
        list(data.load('arithmetic', split, cache_dir=cache_dir, **options)) for split in splits
    ]


def questions(rows):
    return [row['question'] for row in rows]


def test_the_splits_share_no_question(cache_dir):
    options = {'min_numbers': 2, 'max_numbers': 2, 'max_digits': 1, **ARITHMETIC}
    train, test = load_arithmetic(cache_dir, **options)
    assert len(train) == 80
    assert len(test) == 20
    every = {f'{a}+{b}=' for a in range(10) for b in range(10)}
    assert set(questions(train)) | set(questions(test)) == every  # 100 in all, so none twice


def test_no_more_problems_than_exist(cache_dir):
    options = {'min_numbers': 2, 'max_numbers': 2, 'max_digits': 1, 'operations': '-'}
    train, test = load_arithmetic(cache_dir, train_size=54, test_size=1, **options)
    every = {f'{a}-{b}=' for a in range(10) for b in range(a + 1)}
    assert set(questions(train + test)) == every
    with pytest.raises(ValueError, match=r'train_size \+ test_size is 56.* only 55 problems exist'):
        load_arithmetic(cache_dir, train_size=55, test_size=1, **options)


def test_every_chain_of_a_mixed_data_set(cache_dir):
    options = {'min_numbers': 2, 'max_numbers': 4, 'operations': '+-*', 'mistakes': 0.25}
    train, test = load_arithmetic(cache_dir, train_size=1500, test_size=300, **options)
    assert len({*questions(train), *questions(test)}) == 1800
    apply = {'+': int.__add__, '-': int.__sub__, '*': int.__mul__}
    numbers, slips = collections.Counter(), collections.Counter()
    for columns in train + test:
        for column in ('solution', 'demonstration'):
            worked = ''
            for step in columns[column].split(';'):
                left, symbol, right, result = re.fullmatch(r'(\d+)(\W)(\d+)=(\d+)', step).groups()
                assert worked in ('', left)  # continues from the result before
                worked = result
                correct = apply[symbol](int(left), int(right))
                wrong = carryless(int(left), symbol, int(right))
                assert int(result) == correct or column == 'demonstration'
                assert int(result) in (correct, wrong)
                if column == 'demonstration' and correct != wrong and correct >= 0:
                    slips[int(result) == wrong] += 1
            assert worked == columns['answer'] or column == 'demonstration'
        terms = re.findall(r'\d+', columns['question'])
        assert re.findall(r'\d+(?=[-+*=])', columns['solution'])[0] == terms[0]
        assert all(len(term) <= 2 for term in terms)
        numbers[len(terms)] += 1
    assert numbers.keys() == {2, 3, 4}
    assert min(numbers.values()) > 500
    assert 0.22 < slips[True] / slips.total() < 0.28


def test_digits(cache_dir):
    train, _ = load_arithmetic(cache_dir, min_digits=2, max_digits=3, **ARITHMETIC)
    lengths = {len(term) for row in train for term in re.findall(r'\d+', row['question'])}
    assert lengths == {2, 3}


def test_data_depend_on_the_seed_alone(cache_dir, tmp_path):
    first = load_arithmetic(cache_dir, **ARITHMETIC)
    assert load_arithmetic(tmp_path, **ARITHMETIC) == first
    assert first[1][0]['question'] == '72+47+79='  # in any process and Python version
    other = load_arithmetic(cache_dir, seed=1, **ARITHMETIC)
    assert not set(questions(other[1])) & set(questions(first[1]))
    more = load_arithmetic(cache_dir, train_size=90, test_size=20, mistakes=0.0)
    assert questions(more[1]) == questions(first[1])
    assert questions(more[0])[:80] == questions(first[0])
    assert all(row['demonstration'] == row['solution'] for row in more[0])


def test_every_option_has_data_of_its_own():
    changed = {
        'train_size': 9,
        'test_size': 9,
        'min_numbers': 2,
        'max_numbers': 4,
        'min_digits': 2,
        'max_digits': 3,
        'operations': '+*',
        'mistakes': 0.75,
        'seed': 7,
    }
    fields = {field.name for field in dataclasses.fields(datasets.ArithmeticConfig)}
    inherited = {field.name for field in dataclasses.fields(datasets.JsonlConfig)}
    assert changed.keys() == fields - inherited
    configs = [datasets.ArithmeticConfig(**{name: changed[name]}) for name in changed]
    names = {config.name for config in [*configs, datasets.ArithmeticConfig()]}
    assert len(names) == len(changed) + 1
    assert datasets.ArithmeticConfig().name == datasets.ArithmeticConfig().name


def files(folder):
    return {
        path: path.stat().st_mtime_ns for path in folder.rglob('*') if 'array_record' in path.name
    }


def test_prepared_data_are_used_again(tmp_path, capfd, caplog):
    load_arithmetic(tmp_path, **ARITHMETIC)
    before = files(tmp_path)
    assert len(before) == 2
    load_arithmetic(tmp_path, **ARITHMETIC)
    assert files(tmp_path) == before
    load_arithmetic(tmp_path, **ARITHMETIC, mistakes=0.1)
    assert len(files(tmp_path)) == 4
    assert capfd.readouterr() == ('', '')  # nothing is printed or logged
    assert caplog.messages == []


def test_two_processes_prepare_at_once(tmp_path):
    program = (
        'import random, sys\n'
        'from grpo_jax import datasets\n'
        'random.seed(0)\n'  # TFDS names its unfinished folders by this generator
        'config = datasets.ArithmeticConfig(train_size=3000)\n'
        'print("ready", flush=True); input()\n'
        'builder = datasets.prepare(datasets.Arithmetic, config, sys.argv[1])\n'
        'print(len(datasets.TextRows(builder.as_data_source("train"))))'
    )
    command = [sys.executable, '-c', program, str(tmp_path / 'new' / 'cache')]
    pipes = {'stdin': subprocess.PIPE, 'stdout': subprocess.PIPE, 'stderr': subprocess.PIPE}
    root = pathlib.Path(__file__).parents[1]
    both = [subprocess.Popen(command, text=True, cwd=root, **pipes) for _ in range(2)]
    assert [process.stdout.readline() for process in both] == ['ready\n'] * 2
    for process in both:
        process.stdin.write('\n')
        process.stdin.flush()
    outputs = [process.communicate(timeout=120) for process in both]
    assert [output for output, _ in outputs] == ['3000\n'] * 2, outputs


@pytest.mark.parametrize(
    ('option', 'value', 'remedy'),
    [
        ('train_size', 0, 'at least 1'),
        ('test_size', 0, 'at least 1'),
        ('min_numbers', 1, 'at least 2'),
        ('max_numbers', 2, 'at least min_numbers'),
        ('min_digits', 0, 'at least 1'),
        ('max_digits', 0, 'at least min_digits'),
        ('operations', '+/', r'one or more of \+-\*'),
        ('operations', '', r'one or more of \+-\*'),
        ('mistakes', 1.5, 'between 0 and 1'),
        ('seed', -1, 'at least 0'),
    ],
)
def test_options_out_of_range(option, value, remedy):
    message = f'arithmetic: {option} is {re.escape(repr(value))}: make it {remedy}'
    with pytest.raises(ValueError, match=message):
        datasets.ArithmeticConfig(**{option: value})


def test_unknown_names_and_splits(cache_dir):
    with pytest.raises(ValueError, match="'mnist': choose arithmetic, gsm8k or jsonl"):
        data.load('mnist', 'train', cache_dir=cache_dir)
    with pytest.raises(ValueError, match="arithmetic has no split 'val': choose train or test"):
        data.load('arithmetic', 'val', cache_dir=cache_dir, **ARITHMETIC)


def test_a_cache_that_cannot_be_written(tmp_path):
    (tmp_path / 'file').touch()
    with pytest.raises(ValueError, match=r'cache_dir .*/file/cache: .*: name a folder'):
        data.load('arithmetic', 'train', cache_dir=tmp_path / 'file' / 'cache', **ARITHMETIC)


# JSON lines


def test_jsonl_is_served_as_it_is(data_dir, cache_dir):
    rows = [
        {'b/c': ' x ', 'a': '', 'ü': '算'},
        {'b/c': 1, 'a': 145.0, 'ü': None},
        {'b/c': [1, 'é'], 'a': {'k': False}, 'ü': True},
    ]
    write(data_dir / 'own', 'dev.jsonl', json.dumps(rows[0]), '', *map(json.dumps, rows[1:]), ' ')
    served = data.load('jsonl', 'dev', folder='own', cache_dir=cache_dir)
    assert list(served) == [
        rows[0],
        {'b/c': '1', 'a': '145.0', 'ü': 'null'},
        {'b/c': '[1, "é"]', 'a': '{"k": false}', 'ü': 'true'},
    ]
    part = data.load('jsonl', 'dev[1:]', folder=data_dir / 'own', cache_dir=cache_dir)
    assert list(part) == list(served)[1:]
    with pytest.raises(IndexError, match='row 3: the data set has rows 0 to 2'):
        served[3]


def test_a_changed_file_is_noticed(data_dir, cache_dir):
    for text in ('old', 'new'):
        write(data_dir / 'own', 'dev.jsonl', json.dumps({'text': text}))
        os.utime(data_dir / 'own' / 'dev.jsonl', (1, 1))
        served = data.load('jsonl', 'dev', folder='own', cache_dir=cache_dir)
        assert list(served) == [{'text': text}]


@pytest.mark.parametrize(
    ('lines', 'message'),
    [
        (['{"a": 1}', '{"a": '], r'dev\.jsonl:2: not valid JSON: Expecting value at column 6'),
        (['{"a": 1}', '', '[1]'], r'dev\.jsonl:3: \[1\] is not a JSON object'),
        (['{}'], r'dev\.jsonl:1: \{\} is not a JSON object with columns'),
        (['{"a": "\\ud800"}'], r'dev\.jsonl:1: not JSON in UTF-8: .*surrogates not allowed'),
        (['{"a": 1}', '{"b": 1}'], r'dev\.jsonl:2: the columns are b where the first line has a'),
        (['{"a": 1}', '{"a": 1, "b": 1}'], r'dev\.jsonl:2: the columns are a, b where'),
        (['{"b": 1, "c": 2}'], r"dev\.jsonl:1: column 'a' is missing, there are b, c"),
        ([], r'dev\.jsonl: the file is empty'),
        (['', ''], r'dev\.jsonl: the file is empty'),
    ],
)
def test_malformed_jsonl(lines, message, data_dir, tmp_path):
    write(data_dir, 'dev.jsonl', *lines)
    with pytest.raises(ValueError, match=message):
        data.load('jsonl', 'dev', required=('a',), cache_dir=tmp_path / 'cache')


def test_missing_files(data_dir, cache_dir, monkeypatch):
    message = r'/gsm8k/train\.jsonl: no such file: put it there, or let GRPO_JAX_DATA_DIR \(now '
    with pytest.raises(ValueError, match=message):
        data.load('gsm8k', 'train', cache_dir=cache_dir)
    with pytest.raises(ValueError, match=r'none\.jsonl: no such file'):
        datasets.JsonlConfig(path=data_dir / 'none.jsonl')
    monkeypatch.delenv('GRPO_JAX_DATA_DIR')
    message = 'GRPO_JAX_DATA_DIR is not set: let it name the folder that holds gsm8k/train.jsonl'
    with pytest.raises(ValueError, match=message):
        data.load('gsm8k', 'train', cache_dir=cache_dir)


@pytest.mark.skipif('GRPO_JAX_DATA_DIR' not in os.environ, reason='GRPO_JAX_DATA_DIR is not set')
def test_gsm8k(cache_dir):
    path = pathlib.Path(os.environ['GRPO_JAX_DATA_DIR'], 'gsm8k', 'test.jsonl')
    rows = data.load('gsm8k', 'test', cache_dir=cache_dir)
    assert list(rows) == [json.loads(line) for line in path.read_text().splitlines()]
    assert len(rows) == 1319
    table = data.tokenize_prompts(rows, BYTES, template='{question}\n', prompt_length=256)
    assert len(table.index) + table.dropped == 1319
    text = BYTES.decode(table.tokens[7][: table.length[7]])
    assert text == rows[int(table.index[7])]['question'] + '\n'


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
    assert {array.dtype for array in table[:3]} == {np.dtype(np.int32)}
    assert prompts(template='{{{q}}}', prompt_length=8).tokens[0, :5].tolist() == [*b'{abc}']


def test_demonstrations_by_hand():
    table = demonstrations()
    assert table.prompts.tokens.tolist() == prompts().tokens.tolist()
    assert table.tokens.tolist() == [[120, 257, 256, 256, 256], [*b'long', 257]]
    assert table.mask.tolist() == [[True, True, False, False, False], [True] * 5]
    assert table.tokens.dtype == np.int32
    assert table.mask.dtype == bool
    short = demonstrations(prompt_length=6, completion_length=4)  # 'long' and its end do not fit
    assert short.prompts.index.tolist() == [0, 1]
    assert short.prompts.dropped == 1


def test_the_tokenizer_adds_to_prompts_alone():
    tokenizer = tiny.adding('<pad> $A', bos_token='<pad>')
    table = demonstrations(tokenizer=tokenizer)
    assert table.prompts.tokens[0].tolist() == [256, 97, 98, 99]
    assert table.tokens[0, :2].tolist() == [120, 257]


@pytest.mark.parametrize('template', ['{question}', '{}', '{0}', '{q', '{q.x}', r'\boxed{x}'])
def test_templates_that_do_not_fit(template):
    message = re.escape(f'template {template!r} does not fit the data') + r'.*\{q\}, \{a\}'
    with pytest.raises(ValueError, match=message):
        prompts(template=template)
    with pytest.raises(ValueError, match=message):
        demonstrations(completion_template=template)


def test_tables_that_cannot_be():
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
    assert type(batch) is data.Prompts
    assert batch.tokens.shape == (4, 4)
    assert batch.tokens[:, 0].tolist() == (65 + batch.index).tolist()
    assert batch.length.tolist() == [1] * 4
    assert {type(array) for array in batch} == {np.ndarray}
    assert {array.dtype for array in batch} == {np.dtype(np.int32)}


def test_batches_of_demonstrations():
    table = demonstrations()
    batch = data.batches(table, 2, seed=0)[5]
    assert type(batch) is data.Rollout
    order = [table.prompts.index.tolist().index(row) for row in batch.prompts.index]
    assert batch.tokens[:, 0].tolist() == table.tokens[order].tolist()
    assert batch.mask[:, 0].tolist() == table.mask[order].tolist()
    assert batch.tokens.shape == batch.mask.shape == batch.logprobs.shape == (2, 1, 5)
    assert not batch.logprobs.any()
    assert batch.logprobs.dtype == np.float32
    assert batch.ended.tolist() == [[True], [True]]


def test_batches_that_cannot_be():
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
