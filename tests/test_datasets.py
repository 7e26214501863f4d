"""Data sets in files: formats, columns, and held-out questions."""

import gzip
import itertools
import json
import os
import pathlib
import re
import sys

import hypothesis
import hypothesis.strategies as st
import pytest
import typechecking

from grpo_jax import data
from grpo_jax.data.datasets import answers
from grpo_jax.data.questions import question_key, select_heldout


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


# Files


def serve(name, split='dev', *, folder, cache_dir, **options):
    return list(data.load(name, split, folder=folder, cache_dir=cache_dir, **options))


def test_jsonl_columns_keep_their_types(data_dir, cache_dir):
    rows = [
        {'b/c': ' x ', 'a': '', 'ü': '算'},
        {'b/c': 1, 'a': 145.0, 'ü': None},
        {'b/c': [1, 'é'], 'a': {'k': False}, 'ü': True},
    ]
    write(data_dir / 'own', 'dev.jsonl', json.dumps(rows[0]), '', *map(json.dumps, rows[1:]), ' ')
    served = data.load('jsonl', 'dev', folder='own', cache_dir=cache_dir)
    assert list(served) == rows
    for row, prepared in zip(rows, served, strict=True):
        assert all(type(prepared[name]) is type(value) for name, value in row.items())
    part = data.load('jsonl', 'dev[1:]', folder=data_dir / 'own', cache_dir=cache_dir)
    assert list(part) == list(served)[1:]
    assert served[1:] == list(served)[1:]
    with pytest.raises(IndexError, match='row 3: the data set has rows 0 to 2'):
        served[3]


def test_json_and_compressed_lines(tmp_path, cache_dir):
    rows = [{'question': 'a'}, {'question': 'b'}]
    (tmp_path / 'zip').mkdir()
    with gzip.open(tmp_path / 'zip' / 'dev.jsonl.gz', 'wt') as file:
        file.write('\n\n'.join(map(json.dumps, rows)))
    write(tmp_path / 'list', 'dev.json', json.dumps(rows, indent=1))
    write(tmp_path / 'one', 'dev.json', json.dumps(rows[0]))
    assert serve('jsonl', folder=tmp_path / 'zip', cache_dir=cache_dir) == rows
    assert serve('jsonl', folder=tmp_path / 'list', cache_dir=cache_dir) == rows
    assert serve('jsonl', folder=tmp_path / 'one', cache_dir=cache_dir) == rows[:1]
    named = {'file': '../list/*.json', 'cache_dir': cache_dir}
    assert serve('jsonl', 'whatever', folder=tmp_path / 'one', **named) == rows
    whole = (tmp_path / 'zip' / 'dev.jsonl.gz').read_bytes()
    (tmp_path / 'zip' / 'dev.jsonl.gz').write_bytes(whole[:-9])
    with pytest.raises(ValueError, match=r'dev\.jsonl\.gz: not a complete gzip file'):
        serve('jsonl', folder=tmp_path / 'zip', cache_dir=cache_dir)
    write(tmp_path / 'one', 'dev.json', '[1]')
    with pytest.raises(ValueError, match=r'dev\.json: row 1: 1 is not a JSON object'):
        serve('jsonl', folder=tmp_path / 'one', cache_dir=cache_dir)


def test_columns_are_renamed(tmp_path, cache_dir):
    write(tmp_path, 'dev.jsonl', json.dumps({'problem': 'p', 'final': 7, 'level': 1}))
    options = {'folder': tmp_path, 'cache_dir': cache_dir}
    columns = {'question': 'problem', 'answer': 'final', 'text': 'problem'}
    expected = {'question': 'p', 'answer': 7, 'text': 'p', 'level': 1}
    assert serve('jsonl', columns=columns, **options) == [expected]
    swapped = {'final': 'level', 'level': 'final'}
    expected = {'problem': 'p', 'final': 1, 'level': 7}
    assert serve('jsonl', columns=swapped, **options) == [expected]
    message = r"dev\.jsonl:1: column 'query' is missing, there are problem, final, level: fix"
    with pytest.raises(ValueError, match=message):
        serve('jsonl', columns={'question': 'query'}, **options)
    message = r"dev\.jsonl:1: column 'final' is to be renamed 'level', but the file has a"
    with pytest.raises(ValueError, match=message):
        serve('jsonl', columns={'level': 'final'}, **options)
    with pytest.raises(ValueError, match=r"columns=\{'new name': 'name in the file'\}"):
        serve('jsonl', required=['question'], **options)


def test_parquet_in_parts(tmp_path, cache_dir):
    pyarrow = pytest.importorskip('pyarrow')
    parquet = pytest.importorskip('pyarrow.parquet')
    (tmp_path / 'data').mkdir()
    for part, values in enumerate([['a', None], ['c']]):
        table = pyarrow.table({'q': values, 'n': [[part]] * len(values)})
        parquet.write_table(table, tmp_path / 'data' / f'dev-0000{part}-of-00002.parquet')
    expected = [{'q': 'a', 'n': [0]}, {'q': None, 'n': [0]}, {'q': 'c', 'n': [1]}]
    options = {'folder': tmp_path, 'cache_dir': cache_dir}
    assert serve('parquet', **options) == expected
    assert serve('hf', **options) == expected
    with pytest.raises(ValueError, match=r"00000-of-00002\.parquet: row 2: column 'q' is empty"):
        serve('parquet', required=('q',), **options)
    parquet.write_table(pyarrow.table({'q': [b'\xff']}), tmp_path / 'dev.parquet')
    with pytest.raises(ValueError, match=r'dev\.parquet: row 1, q: .*bytes is not JSON'):
        serve('parquet', **options)
    write(tmp_path, 'dev.parquet', 'no')
    with pytest.raises(ValueError, match=r'dev\.parquet: not a Parquet file'):
        serve('parquet', **options)


def test_hugging_face_datasets_on_disk(tmp_path, cache_dir):
    hf = pytest.importorskip('datasets')
    train, test = ({'problem': [text] * 2, 'level': [1, 2]} for text in ('old', 'new'))
    both = hf.DatasetDict(train=hf.Dataset.from_dict(train), test=hf.Dataset.from_dict(test))
    both.save_to_disk(tmp_path / 'both')
    both['test'].save_to_disk(tmp_path / 'one')
    options = {'columns': {'question': 'problem'}, 'cache_dir': cache_dir}
    for folder, text in (('both', 'old'), ('one', 'new')):
        expected = [{'question': text, 'level': 1}, {'question': text, 'level': 2}]
        assert serve('hf', 'train', folder=tmp_path / folder, **options) == expected
    state = (tmp_path / 'one' / 'state.json').read_text()
    both['train'].save_to_disk(tmp_path / 'one')  # the same names with other data
    (tmp_path / 'one' / 'state.json').write_text(state)
    assert serve('hf', folder=tmp_path / 'one', **options)[0]['question'] == 'old'


@pytest.mark.parametrize(
    ('name', 'file', 'package'),
    [('hf', 'state.json', 'datasets'), ('parquet', 'dev.parquet', 'pyarrow')],
)
def test_absent_packages(name, file, package, tmp_path, monkeypatch):
    write(tmp_path, file, '{}')
    monkeypatch.setitem(sys.modules, package, None)
    message = f'to read {tmp_path}.*, install {package}: pip install {package}'
    with pytest.raises(ValueError, match=message):
        serve(name, folder=tmp_path, cache_dir=tmp_path / 'cache')


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
        (['{"a": 1}', '{"b": 1, "a": 2}'], r'dev\.jsonl:2: the columns are b, a where the first'),
        (['{"a": 1, "b": 2}', '{"a": 1}'], r'dev\.jsonl:2: the columns are a where .* has a, b'),
        (['{"b": 1, "c": 2}'], r"dev\.jsonl:1: column 'a' is missing, there are b, c"),
        (['{"a": 1}', '{"b": 1}'], r"dev\.jsonl:2: column 'a' is missing, there are b: rename"),
        (['{"a": 1}', '{"a": " "}'], r"dev\.jsonl:2: column 'a' is empty"),
        (['{"a": null}'], r"dev\.jsonl:1: column 'a' is empty"),
        ([], r'dev\.jsonl: the file is empty'),
        (['', ''], r'dev\.jsonl: the file is empty'),
    ],
)
def test_malformed_jsonl(lines, message, data_dir, tmp_path):
    write(data_dir, 'dev.jsonl', *lines)
    with pytest.raises(ValueError, match=message):
        data.load('jsonl', 'dev', required=('a',), cache_dir=tmp_path / 'cache')


def test_missing_files(data_dir, cache_dir, monkeypatch):
    message = r'/gsm8k/train\.jsonl: no such file: put it there, or set GRPO_JAX_DATA_DIR \(now '
    with pytest.raises(ValueError, match=message):
        data.load('gsm8k', 'train', cache_dir=cache_dir)
    with pytest.raises(ValueError, match=r'/none/v2\.jsonl: no such file'):
        data.load('jsonl', 'v2', folder='none', file='{split}.jsonl', cache_dir=cache_dir)
    monkeypatch.delenv('GRPO_JAX_DATA_DIR')
    message = 'GRPO_JAX_DATA_DIR is not set: set it to the folder that contains gsm8k/train.jsonl'
    with pytest.raises(ValueError, match=message):
        data.load('gsm8k', 'train', cache_dir=cache_dir)


# The published data sets, by hand


@pytest.mark.parametrize(
    ('name', 'row', 'expected'),
    [
        (
            'gsm8k',
            {'question': 'q', 'answer': '500*2=<<500*2=1000>>1000\n#### 1,000'},
            {'question': 'q', 'answer': '1000', 'solution': '500*2=<<500*2=1000>>1000\n#### 1,000'},
        ),
        (
            'math',
            {'problem': 'q', 'level': 'Level 1', 'solution': r'so $\boxed{\frac{1}{2}}$.'},
            {'question': 'q', 'answer': r'\frac{1}{2}', 'level': 'Level 1'},
        ),
        ('math', {'problem': 'q', 'answer': '2', 'solution': r'\boxed{3}'}, {'answer': '2'}),
        (
            'cmath',
            {'grade': 1, 'question': '问', 'golden': '4/6 '},
            {'question': '问', 'answer': '4/6', 'grade': 1},
        ),
        (
            'svamp',
            {'Body': 'He has 2 nuts.', 'Question': 'How many has he?', 'Answer': 2.0, 'ID': 'x'},
            {'question': 'He has 2 nuts. How many has he?', 'answer': '2', 'ID': 'x'},
        ),
        (
            'svamp',
            {'Body': 'He goes. If he has 2', 'Question': 'How many has he?', 'Answer': 1.5},
            {'question': 'He goes. If he has 2, how many has he?', 'answer': '1.5'},
        ),
        (
            'svamp',
            {'Body': 'If he goes. Then he has 2', 'Question': 'How many has he?', 'Answer': -1.0},
            {'question': 'If he goes. Then he has 2. How many has he?', 'answer': '-1'},
        ),
        (
            'mawps',
            {'input': 'q', 'target': 0.6666666667, 'type': 'addsub'},
            {'question': 'q', 'answer': '0.6666666667', 'type': 'addsub'},
        ),
    ],
)
def test_published_rows_by_hand(name, row, expected, tmp_path, cache_dir):
    write(tmp_path, 'dev.jsonl', json.dumps(row))
    (served,) = serve(name, folder=tmp_path, cache_dir=cache_dir)
    assert expected.items() <= served.items()
    assert served.keys() >= row.keys() - {'problem', 'golden', 'Answer', 'input', 'target'}


@pytest.mark.parametrize(
    ('name', 'row', 'message'),
    [
        ('gsm8k', {'question': 'q', 'answer': 'so 3'}, "the solution has no '#### ' and a number"),
        ('gsm8k', {'question': 'q', 'answer': 'so ####'}, "the solution has no '#### ' and a num"),
        ('gsm8k', {'question': '', 'answer': '#### 1'}, "column 'question' is empty"),
        ('gsm8k', {'question': 'q'}, "column 'answer' is missing, there are question"),
        ('math', {'problem': 'q', 'solution': 'so 3'}, r'the solution has no \\boxed'),
        ('math', {'problem': 'q', 'solution': r'\boxed{ }'}, 'is empty: fix the row'),
        ('math', {'problem': 'q', 'solution': r'\boxed{\frac{1}{2}'}, 'is never closed'),
        ('svamp', {'Body': 'b', 'Question': 'q', 'Answer': 'two'}, "the answer 'two' is not a num"),
        ('svamp', {'Question': 'q', 'Answer': 2}, "column 'Body' is missing"),
        ('mawps', {'input': 'q', 'target': None}, "column 'answer' is empty"),
    ],
)
def test_malformed_published_rows(name, row, message, tmp_path):
    good = {
        'gsm8k': {'question': 'q', 'answer': '#### 1'},
        'math': {'problem': 'q', 'solution': r'\boxed{1}'},
        'svamp': {'Body': 'b', 'Question': 'q', 'Answer': 1},
        'mawps': {'input': 'q', 'target': 1},
    }
    write(tmp_path, 'dev.jsonl', json.dumps(good[name]), json.dumps(row))
    with pytest.raises(ValueError, match=rf'dev\.jsonl:2: .*{message}'):
        serve(name, folder=tmp_path, cache_dir=tmp_path / 'cache')


def test_math_in_folders(tmp_path, cache_dir):
    for place, (subject, number) in enumerate(itertools.product('ba', (10, 2))):
        row = {'problem': f'{subject}{number}', 'solution': rf'\boxed{{{place}}}'}
        write(tmp_path / 'dev' / subject, f'{number}.json', json.dumps(row, indent=2))
    served = serve('math', folder=tmp_path, cache_dir=cache_dir)
    assert [row['question'] for row in served] == ['a2', 'a10', 'b2', 'b10']
    assert [row['answer'] for row in served] == ['3', '2', '1', '0']


@pytest.mark.parametrize(
    ('text', 'expected'),
    [
        (r'\boxed{1} or $\boxed{2}$', '2'),
        (r'\boxed{\left\{ x \mid \frac{1}{x} \right.}', r'\left\{ x \mid \frac{1}{x} \right.'),
        (r'\boxed{\{1, \{2\}\}} {}', r'\{1, \{2\}\}'),
        (r'$\boxed 5$ of 6', '5'),
        ('\\boxed  x+1\nend', 'x+1'),
        (r'\fbox{C}', 'C'),
        (r'\framebox{C}', 'C'),
        (r'\boxed{1}, which is \fbox{ 2 }', '2'),
        (r'$\boxed{3}$, not \boxedset{4}', '3'),
        (r'\boxed {7}', '7'),
        (r'\boxed{a\\}', r'a\\'),
    ],
)
def test_boxed_by_hand(text, expected):
    assert answers.boxed(text) == expected


@pytest.mark.parametrize(
    ('name', 'split', 'count'),
    [
        ('gsm8k', 'train', 7473),
        ('gsm8k', 'test', 1319),
        ('math', 'test', 5000),
        ('math', 'test500', 500),
        ('cmath', 'test', 1098),
        ('svamp', 'test', 1000),
        ('mawps', 'test', 2065),
        ('humaneval', 'test', 164),
    ],
)
def test_published_files(name, split, count, cache_dir):
    rows = published(name, split, cache_dir)
    assert len(rows) == count
    required = {'question', 'answer'} if name != 'humaneval' else {'question', 'test'}
    for row in rows:
        assert all(row[column].strip() for column in required)
        if name in ('gsm8k', 'svamp', 'mawps'):
            assert re.fullmatch(r'-?\d+(\.\d*[1-9])?', row['answer'])
    if name == 'math' and split == 'test500':  # compares with answers extracted independently
        assert all(answers.boxed(row['solution']) == row['answer'] for row in rows)


def published(name, split, cache_dir):
    folder = os.environ.get('GRPO_JAX_DATA_DIR', '')
    if not pathlib.Path(folder, name).is_dir():
        pytest.skip(f'GRPO_JAX_DATA_DIR names no folder with {name}')
    return list(data.load(name, split, cache_dir=cache_dir))


def test_gsm8k_text_is_that_of_the_file(cache_dir):
    rows = published('gsm8k', 'test', cache_dir)
    path = pathlib.Path(os.environ['GRPO_JAX_DATA_DIR'], 'gsm8k', 'test.jsonl')
    source = [json.loads(line) for line in path.read_text().splitlines()]
    assert [row['question'] for row in rows] == [row['question'] for row in source]
    assert [row['solution'] for row in rows] == [row['answer'] for row in source]


# Held-out questions

SPELLINGS = (str, str.upper, '  {} '.format, lambda text: text.replace(' ', '\n\t '))


@hypothesis.given(
    st.lists(st.text('abé ½+?.', min_size=1), min_size=2, max_size=30, unique_by=question_key),
    st.floats(0.05, 0.95) | st.integers(1, 20),
    st.data(),
)
def test_what_is_held_out_cannot_leak(questions, heldout, draw):
    keys = [question_key(question) for question in questions]
    try:
        chosen = select_heldout(keys, heldout)
    except ValueError:
        hypothesis.assume(False)
    again = draw.draw(st.lists(st.sampled_from(questions), max_size=20))
    again = [draw.draw(st.sampled_from(SPELLINGS))(question) for question in again]
    rows = draw.draw(st.permutations(questions + again))
    assert select_heldout([question_key(row) for row in rows], heldout) == chosen
    training = [{'question': row} for row in rows if question_key(row) not in chosen]
    held = [{'question': row} for row in rows if question_key(row) in chosen]
    assert training
    assert held
    assert data.without_leaks(training, held) == (training, 0)
    if heldout >= 1:
        assert len(chosen) == heldout
    else:  # the selection does not depend on other questions
        more = select_heldout([*keys, *(f'new {n}' for n in range(50))], heldout)
        assert more & set(keys) == chosen


def test_the_share_held_out():
    keys = [f'question {number}' for number in range(20_000)]
    assert abs(len(select_heldout(keys, 0.1)) - 2000) < 4.5 * (20_000 * 0.1 * 0.9) ** 0.5
    assert select_heldout(keys, 0.1) < select_heldout(keys, 0.2)
    for heldout in (1e-9, 20_000, 1 - 1e-9):
        with pytest.raises(ValueError, match='of 20000 different questions: choose a value'):
            select_heldout(keys, heldout)


def test_one_file_is_split_in_two(tmp_path, cache_dir):
    lines = [json.dumps({'q': f'How many is {n % 40} ?' + ' ' * (n // 40)}) for n in range(100)]
    write(tmp_path, 'train.jsonl', *lines)
    write(tmp_path, 'test.jsonl', json.dumps({'q': 'other'}))
    options = {'folder': tmp_path, 'cache_dir': cache_dir, 'columns': {'question': 'q'}}
    for heldout in (0.3, 10):
        cut = [serve('jsonl', s, heldout=heldout, **options) for s in ('train', 'heldout')]
        training, held = ({question_key(row['question']) for row in rows} for rows in cut)
        assert len(cut[0]) + len(cut[1]) == 100
        assert training.isdisjoint(held)
        assert len(training) + len(held) == 40
        assert len(held) == 10 or heldout == 0.3
        numbers = [int(re.search(r'\d+', row['question'])[0]) for row in cut[0]]
        places = [
            number + 40 * (len(row['question']) - len(row['question'].rstrip()))
            for number, row in zip(numbers, cut[0], strict=True)
        ]
        assert places == sorted(places)  # the order of the file is kept
    assert len(serve('jsonl', 'train', **options)) == 100
    assert len(serve('jsonl', 'test', heldout=0.3, **options)) == 1  # a file of its own: not split
    part = serve('jsonl', 'heldout[:3]', heldout=10, file='train.jsonl', **options)
    assert part == cut[1][:3]
    with pytest.raises(ValueError, match="jsonl has no split 'test': choose train or heldout"):
        serve('jsonl', 'test', heldout=0.3, file='train.jsonl', **options)
    for heldout in (-0.1, 1.5, -3, True, '1'):
        message = f'heldout is {heldout!r}: make it a fraction below 1'
        with typechecking.off(), pytest.raises(ValueError, match=message):
            serve('jsonl', 'train', heldout=heldout, **options)
    with pytest.raises(ValueError, match="column 'question' is missing, there are q: rename"):
        serve('jsonl', 'train', heldout=0.3, **{**options, 'columns': {}})


# Unknown names


def test_unknown_names_and_splits(cache_dir):
    with pytest.raises(ValueError, match="'mnist': choose arithmetic, countdown, gsm8k, math, "):
        data.load('mnist', 'train', cache_dir=cache_dir)
    with pytest.raises(ValueError, match="arithmetic has no split 'val': choose train or test"):
        data.load('arithmetic', 'val', cache_dir=cache_dir, train_size=9)
    message = "countdown has no option 'mistakes': it has train_size, test_size, seed, min_numbers"
    with pytest.raises(ValueError, match=message):
        data.load('countdown', 'train', cache_dir=cache_dir, mistakes=0)
    for option in ('source', 'paths', 'feature'):
        message = f"gsm8k has no option '{option}': it has folder, file, columns, required, heldout"
        with pytest.raises(ValueError, match=message):
            data.load('gsm8k', 'train', cache_dir=cache_dir, **{option: 1})


@pytest.mark.parametrize(
    ('option', 'value', 'remedy'),
    [
        ('folder', 3, 'the path of a folder'),
        ('file', ['x'], 'the name of a file'),
        ('file', 0.5, 'the name of a file'),
        ('columns', ['x'], "names, such as {'question': 'problem'}"),
        ('columns', {'a': {'b': 1}}, "names, such as {'question': 'problem'}"),
        ('required', 'answer', "a list of names, such as ['question']"),
        ('required', [[]], "a list of names, such as ['question']"),
    ],
)
def test_options_of_the_wrong_type(option, value, remedy, tmp_path, cache_dir):
    write(tmp_path, 'train.jsonl', '{"answer": 1}')
    options = {'folder': tmp_path, option: value}
    message = re.escape(f'jsonl: {option} is {value!r}: make it {remedy}')
    with pytest.raises(data.rows.OptionError, match=message):
        data.load('jsonl', 'train', cache_dir=cache_dir, **options)


@pytest.mark.parametrize(
    ('name', 'option', 'value'),
    [
        ('arithmetic', 'max_numbers', 10**30),
        ('arithmetic', 'max_digits', 10**6),
        ('arithmetic', 'train_size', 10**12),
        ('countdown', 'max_target', 10**12),
        ('countdown', 'max_numbers', 10**6),
        ('countdown', 'seed', 2**63),
    ],
)
def test_sizes_that_cannot_be_made(name, option, value, cache_dir):
    with pytest.raises(data.rows.OptionError, match=f'{name}: {option} is {value}: make it '):
        data.load(name, 'train', cache_dir=cache_dir, **{option: value})
