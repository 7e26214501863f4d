"""Generated problems: arithmetic with systematic mistakes, and countdown."""

import ast
import collections
import dataclasses
import fractions
import json
import pathlib
import re
import subprocess
import sys

import hypothesis
import hypothesis.strategies as st
import pytest

from grpo_jax import data
from grpo_jax.data import datasets
from grpo_jax.data.datasets import countdown, prepared
from grpo_jax.data.datasets.arithmetic import carryless, make_row, solve

ARITHMETIC = {'train_size': 80, 'test_size': 20}
NATURAL = st.integers(0, 9999)


@pytest.fixture(scope='module')
def cache_dir(tmp_path_factory):
    return tmp_path_factory.mktemp('cache')


# Arithmetic, by hand


def test_solve_by_hand():
    right = solve([37, 58, 21], ['+', '+'], lambda: False)
    assert right == ['37+58=95', '95+21=116']
    mistaken = solve([37, 58, 21], ['+', '+'], lambda: True)
    assert mistaken == ['37+58=85', '85+21=6']  # 7+8=15, keep 5; 8+2=10, keep 0
    assert solve([2, 3, 4], ['+', '*'], lambda: False) == ['2+3=5', '5*4=20']  # left to right


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
def test_a_sum_is_carryless_where_no_place_reaches_ten(a, b):
    places = zip(f'{a:04}', f'{b:04}', strict=True)
    assert (carryless(a, '+', b) == a + b) == all(int(x) + int(y) < 10 for x, y in places)


def test_mistakes_are_drawn_at_carry_steps_only():
    draws = []
    solve([12, 34, 7], ['+', '+'], lambda: bool(draws.append(None)))
    assert len(draws) == 1  # 46+7 is a carry step, 12+34 is not


def test_no_step_is_negative_after_a_mistake():
    mistakes = iter([True])  # drawn for 9+8 only: 7-9 is always carryless
    assert solve([9, 8, 9], ['+', '-'], lambda: next(mistakes)) == ['9+8=7', '7-9=8']


def test_row_by_hand():
    columns = {'question': '37+58+21=', 'answer': '116', 'solution': '37+58=95;95+21=116'}
    for mistakes, demonstration in ((0, '37+58=95;95+21=116'), (1, '37+58=85;85+21=6')):
        expected = {**columns, 'demonstration': demonstration}
        assert make_row([37, 58, 21], ['+', '+'], mistakes=mistakes, seed=0) == expected
    drawn = [
        make_row([37, 58], ['+'], mistakes=0.5, seed=seed)['demonstration'] for seed in range(20)
    ]
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


def test_every_solution_of_a_mixed_data_set(cache_dir):
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


SIZES = {'train_size': 9, 'test_size': 9, 'seed': 7, 'min_numbers': 2, 'max_numbers': 5}
DIGITS = {'min_digits': 2, 'max_digits': 3, 'operations': '+*', 'mistakes': 0.75}


@pytest.mark.parametrize(
    ('config', 'changed'),
    [
        (datasets.ArithmeticConfig, {**SIZES, **DIGITS}),
        (datasets.CountdownConfig, {**SIZES, 'max_number': 50, 'max_target': 60}),
    ],
)
def test_every_option_has_data_of_its_own(config, changed):
    options = {field.name for field in dataclasses.fields(config) if field.kw_only and field.init}
    assert changed.keys() == options
    names = {c.name for c in [config(), *(config(**{n: changed[n]}) for n in changed)]}
    assert len(names) == len(changed) + 1
    assert config().name == config().name


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


def test_rows_are_the_same_one_by_one_and_in_chunks(cache_dir, monkeypatch):
    rows = data.load('arithmetic', 'train', cache_dir=cache_dir, **ARITHMETIC)
    expected = [rows[n] for n in range(len(rows))]
    for chunk in (1, 7, 80, 1000):
        monkeypatch.setattr(prepared, '_CHUNK', chunk)
        assert list(rows) == expected


def test_two_processes_prepare_at_once(tmp_path):
    program = (
        'import random, sys\n'
        'from grpo_jax.data import datasets\n'
        'random.seed(0)\n'  # TFDS draws the names of its unfinished folders from this generator
        'config = datasets.ArithmeticConfig(train_size=3000)\n'
        'print("ready", flush=True); input()\n'
        'builder = datasets.prepare(datasets.Arithmetic, config, sys.argv[1])\n'
        'print(len(datasets.PreparedRows(builder.as_data_source("train"))))'
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
def test_arithmetic_options_out_of_range(option, value, remedy):
    message = f'arithmetic: {option} is {re.escape(repr(value))}: make it {remedy}'
    with pytest.raises(ValueError, match=message):
        datasets.ArithmeticConfig(**{option: value})


def test_a_cache_that_cannot_be_written(tmp_path):
    (tmp_path / 'file').touch()
    with pytest.raises(ValueError, match=r'cache_dir .*/file/cache: .*: name a folder'):
        data.load('arithmetic', 'train', cache_dir=tmp_path / 'file' / 'cache', **ARITHMETIC)


# Countdown


def value(expression, numbers):
    """The exact value of an expression that uses each of the numbers once, and no other."""

    def work(node):
        if isinstance(node, ast.Constant):
            used.append(node.value)
            return fractions.Fraction(node.value)
        left, right = work(node.left), work(node.right)
        return {ast.Add: left + right, ast.Sub: left - right, ast.Mult: left * right}.get(
            type(node.op), left / right if right else None
        )

    used = []
    result = work(ast.parse(expression, mode='eval').body)
    assert sorted(used) == sorted(numbers)
    return result


def test_countdown_is_solvable_and_split(cache_dir):
    options = {'train_size': 1500, 'test_size': 200, 'cache_dir': cache_dir}
    train, test = (list(data.load('countdown', split, **options)) for split in ('train', 'test'))
    assert (len(train), len(test)) == (1500, 200)
    problems, counts, symbols = set(), collections.Counter(), set()
    for columns in train + test:
        numbers, target = json.loads(columns['numbers']), int(columns['target'])
        assert value(columns['answer'], numbers) == target
        assert 1 <= target <= 100
        assert all(1 <= number <= 99 for number in numbers)
        asked = [int(digits) for digits in re.findall(r'\d+', columns['question'])]
        assert asked == [*numbers, target, 7, 2, 3]
        problems.add((target, *sorted(numbers)))
        counts[len(numbers)] += 1
        symbols |= set(columns['answer'])
    assert len(problems) == 1700
    assert counts.keys() == {3, 4}
    assert min(counts.values()) > 700
    assert symbols >= set('+-*/()')
    assert data.load('countdown', 'test', cache_dir=cache_dir, test_size=200)[7] == test[7]
    other = data.load('countdown', 'test', seed=1, **options)
    assert other[0] != test[0]


def test_countdown_row_by_hand():
    columns = countdown.make_row(countdown.Problem([3, 8, 20], 4, '20 - 8 - 8'))
    assert columns['question'].startswith('Use each of the numbers 3, 8 and 20 exactly once')
    assert 'to make 4.' in columns['question']
    assert '<answer>' in columns['question']
    assert columns['numbers'] == '[3, 8, 20]'
    assert columns['target'] == '4'
    assert value('(7 - 2) * 3', [2, 3, 7]) == 15  # the question's own example is an equation


def test_countdown_has_no_more_problems_than_exist(tmp_path):
    # Of two numbers up to 2: 1+1, 1*1, 1/1; 2+1, 2-1, 2*1, 2/1; 2+2, 2*2, 2/2. Pairs with targets:
    every = {(1, 1, 1), (2, 1, 1), (1, 1, 2), (2, 1, 2), (3, 1, 2), (1, 2, 2), (4, 2, 2)}
    options = {'min_numbers': 2, 'max_numbers': 2, 'max_number': 2, 'cache_dir': tmp_path}
    sizes = {'train_size': 6, 'test_size': 1}
    rows = [
        row
        for split in ('train', 'test')
        for row in data.load('countdown', split, **sizes, **options)
    ]
    found = {(int(row['target']), *sorted(json.loads(row['numbers']))) for row in rows}
    assert found == every
    with pytest.raises(ValueError, match=r'countdown: train_size \+ test_size is 8.* only 7 prob'):
        data.load('countdown', 'train', train_size=7, test_size=1, **options)


@pytest.mark.parametrize(
    ('option', 'remedy'),
    [
        ('train_size', 'at least 1'),
        ('min_numbers', 'at least 2'),
        ('max_numbers', 'at least min_numbers'),
        ('max_number', 'at least 1'),
        ('max_target', 'at least 1'),
    ],
)
def test_countdown_options_out_of_range(option, remedy):
    with pytest.raises(ValueError, match=f'countdown: {option} is 0: make it {remedy}'):
        datasets.CountdownConfig(**{option: 0})
