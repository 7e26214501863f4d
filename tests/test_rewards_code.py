"""Rewards for programs: what is run of a completion, with which tests, and what it is worth."""

import ast
import json
import os
import pathlib

import pytest
from test_sandbox import needs_sandbox

from configs import code_tiny
from grpo_jax import data, rewards
from grpo_jax.rewards.builtin import code

TEST = 'assert twice(2) == 4\nassert twice(5) == 10\nassert twice("a") == "aa"\n'
FENCED = 'So:\n```python\ndef twice(x):\n    return 2 * x\n```\nThis doubles `x`.'
# Returns a result that differs from the right one in the least way, whatever its type.
OFF_BY_ONE = """

def _off_by_one(function):
    def changed(*args):
        value = function(*args)
        if isinstance(value, bool): return not value
        if isinstance(value, (int, float)): return value + 1
        if isinstance(value, str): return value + ' '
        if isinstance(value, (list, tuple)): return value + type(value)([None])
        if isinstance(value, dict): return {**value, None: None}
        return 0
    return changed

%s = _off_by_one(%s)
"""


def unit_tests(completions, source=TEST, **options):
    rows = len(completions)
    columns = {'test': [source] * rows} | {
        name: [options.pop(name)] * rows for name in ('entry_point', 'prefix') if name in options
    }
    return rewards.code_tests([''] * rows, completions, **columns, **options)


def io(completions, inputs, outputs, **options):
    rows = len(completions)
    return rewards.code_io(
        [''] * rows, completions, [inputs] * rows, [outputs] * rows, **options
    )  # fmt: skip


@pytest.mark.parametrize(
    ('completion', 'program'),
    [
        ('```python\na\n```', 'a\n'),
        ('```py\na\n```\n```\nb\n```', 'b\n'),
        ('```python\na\n```\nrun it:\n```bash\nb\n```', 'a\n'),
        ('```bash\nb\n```', ''),
        ('```python\na', 'a'),  # a stop string has cut the end
        ('```Python title\na\n```', 'a\n'),
        ('<think>```python\na\n```</think>```python\nb\n```', 'b\n'),
        ('    return 1\n', '    return 1\n'),
        ('x = "```"\n', 'x = "```"\n'),
        ('', ''),
    ],
)
def test_extract_code(completion, program):
    assert rewards.extract_code(completion) == program


@pytest.mark.parametrize(
    'text', ['```python\n' * 50_000, '`' * 200_000, ' ' * 200_000, '``` ' * 50_000]
)
def test_extract_code_reads_any_text_in_linear_time(text):
    rewards.extract_code(text)


@needs_sandbox
def test_code_tests():
    completions = [
        FENCED,
        'def twice(x):\n    return 2 * x\n',
        '```python\ndef twice(x):\n    return x + x if x != 5 else 0\n```',
        '```python\ndef double(x):\n    return 2 * x\n```',
        '```python\ndef twice(x):\n```',
        'no program at all',
        '',
    ]
    assert unit_tests(completions) == [1, 1, 0, 0, 0, 0, 0]
    assert unit_tests(completions, partial=True) == [1, 1, pytest.approx(2 / 3), 0, 0, 0, 0]
    assert unit_tests(completions[:1], source=TEST.splitlines()) == [1]
    assert unit_tests(completions[:2], source='') == [None, None]


@needs_sandbox
def test_a_prefix_is_continued_or_repeated():
    prefix = 'import math\n\n\ndef area(r):\n    """Of a circle."""\n'
    test = 'def check(candidate):\n    assert abs(candidate(2) - 12.566) < 0.001\n'
    completions = [
        '    return math.pi * r**2\n',
        '```python\n    return math.pi * r**2\n```',
        '```python\ndef area(r):\n    return math.pi * r**2\n```',
        '    return 12\n',
    ]
    options = {'prefix': prefix, 'entry_point': 'area'}
    assert unit_tests(completions, test, **options) == [1, 1, 1, 0]
    open_ended = {'prefix': 'import math\ndef area(r):\n', 'entry_point': 'area'}
    assert unit_tests(completions[:1], test, **open_ended) == [1]


@pytest.mark.parametrize(
    ('prefix', 'valid'),
    [
        ('', True),
        ('import math', True),
        ('import math\n\n\ndef area(r):\n    """Of a circle."""\n', True),
        ('def area(r):\n', True),
        ('class A:\n    def area(r):', True),
        ('def f(x): return ', True),
        ('def area(r):\n\t"""Of a circle."""\n\n', True),
        ('Write a function.', False),  # which fails, and is not left out
    ],
)
def test_a_prefix_is_made_to_source(prefix, valid):
    finished = code._finished(prefix)
    assert finished.startswith(prefix.rstrip())
    try:
        compile(finished, 'prefix', 'exec')
    except SyntaxError:
        assert not valid
    else:
        assert valid


@needs_sandbox
def test_code_io():
    completions = [
        '```python\nprint(2 * int(input()))\n```',
        'print(2.0 * int(input()))',
        'print(4)',
        'import os; print(2 * int(input()), flush=True); os._exit(1)',
        '',
    ]
    inputs, outputs = ['2\n', '7\n'], ['4\n', '14']
    assert io(completions, inputs, outputs) == [1, 1, 0, 0, 0]
    assert io(completions, inputs, outputs, partial=True) == [1, 1, 0.5, 0, 0]
    assert io(completions[:1], json.dumps(inputs), json.dumps(outputs)) == [1]
    assert io(completions[:1], [], []) == [None]


@pytest.mark.parametrize(
    ('printed', 'expected', 'same'),
    [
        ('1 2\n', '1 2', True),
        ('1  2 \n\n', '1 2', True),
        ('1\n2', '1 2', False),
        ('1.50', '1.5', True),
        ('1e3', '1000', True),
        ('-0', '0', True),
        ('0.1', '0.10000001', False),
        ('nan', 'nan', True),
        ('nan', 'NaN', False),
        ('inf', 'Infinity', False),
        ('Yes', 'yes', False),
        ('１', '1', False),
        ('', '', True),
        ('x', '', False),
        ('1' * 500, '1' * 500 + '.0', False),  # too long to be a number
        ('1e9999999', '1e99999999', False),
    ],
)
def test_same_output(printed, expected, same):
    assert rewards.same_output(printed, expected) is same


@pytest.mark.parametrize('test', [5, [5], {'a': 1}])
def test_tests_are_texts(test):
    with pytest.raises(ValueError, match=r'column test, row 0: .* is not a list of texts'):
        unit_tests([''], test)


def test_inputs_have_outputs():
    with pytest.raises(ValueError, match='row 0 has 2 inputs and 1 outputs'):
        io([''], ['1', '2'], ['1'])
    with pytest.raises(ValueError, match='column inputs, row 0'):
        io([''], 'no JSON', ['1'])


@needs_sandbox
@pytest.mark.parametrize(
    ('options', 'message'),
    [
        ({'seconds': 0}, 'seconds=0: give a number above 0'),
        ({'seconds': float('nan')}, 'seconds=nan'),
        ({'memory': 1.5}, 'memory=1.5: give MiB'),
        ({'partial': 1}, 'partial=1: make it True or False'),
        ({'unsafe': 'yes'}, "unsafe='yes': make it True or False"),
        ({'second': 1}, "did you mean 'seconds'"),
    ],
)
def test_options_are_checked_when_the_reward_is_made(options, message):
    for name in ('code_tests', 'code_io'):
        with pytest.raises(rewards.RewardError, match=message):
            rewards.build({name: {'weight': 1.0, **options}})


def test_a_reward_without_a_sandbox_is_refused_when_it_is_made(monkeypatch):
    monkeypatch.setattr('grpo_jax.rewards.sandbox.pool._shared', {})
    monkeypatch.setenv('PATH', '/nowhere')
    with pytest.raises(rewards.RewardError, match=r"'code_tests': .*apt-get install bubblewrap"):
        rewards.build({'code_tests': 1.0})


@needs_sandbox
def test_programs_that_take_too_long_are_counted():
    functions, weights = rewards.build({'code_tests': {'weight': 1.0, 'seconds': 1.0}})
    loop = 'def twice(x):\n    while True: pass\n'
    scores = rewards.score(
        functions, weights, prompts=['', ''], completions=[loop, FENCED],
        columns={'test': [TEST, TEST]},
    )  # fmt: skip
    assert list(scores.total) == [0, 1]
    assert scores.logs.means() == {'timeouts/code_tests': 0.5}


# Published problems


def rows_of(name, split, cache_dir, **options):
    return list(data.load(name, split, cache_dir=cache_dir, **options))


def humaneval(cache_dir):
    if not pathlib.Path(os.environ.get('GRPO_JAX_DATA_DIR', ''), 'humaneval').is_dir():
        pytest.skip('GRPO_JAX_DATA_DIR names no folder with humaneval')
    return rows_of('humaneval', 'test', cache_dir)


def check_humaneval(rows):
    def rewards_of(completions):
        columns = {name: [row[name] for row in rows] for name in ('test', 'entry_point', 'prefix')}
        return rewards.code_tests([''] * len(rows), completions, **columns, seconds=120.0)

    solutions = [row['solution'] for row in rows]
    assert rewards_of(solutions) == [1] * len(rows)
    whole = [f'```python\n{row["question"]}{row["solution"]}```' for row in rows]
    assert rewards_of(whole) == [1] * len(rows)
    names = [row['entry_point'] for row in rows]
    wrong = [
        solution + OFF_BY_ONE % (name, name)
        for solution, name in zip(solutions, names, strict=True)
    ]
    assert rewards_of(wrong) == [0] * len(rows)
    assert rewards_of(['    return None\n'] * len(rows)) == [0] * len(rows)


@needs_sandbox
def test_some_solutions_of_humaneval(tmp_path):
    rows = humaneval(tmp_path)
    check_humaneval([rows[number] for number in (0, 32, 38, 50, 129, 162)])


@pytest.mark.slow
@needs_sandbox
def test_solutions_of_humaneval(tmp_path):
    rows = humaneval(tmp_path)
    assert len(rows) == 164
    check_humaneval(rows)


def written(tmp_path, monkeypatch, name, rows, file='test.jsonl'):
    monkeypatch.setenv('GRPO_JAX_DATA_DIR', str(tmp_path))
    (tmp_path / name).mkdir()
    lines = ''.join(json.dumps(row) + '\n' for row in rows)
    (tmp_path / name / file).write_text(lines)
    return rows_of(name, 'test', tmp_path / 'cache')


MBPP = {
    'text': 'Write a function to find the longest chain of pairs.',
    'code': (
        'class Pair(object):\r\n\tdef __init__(self, a, b):\r\n\t\tself.a, self.b = a, b\r\n'
        'def chain(arr, n):\r\n\treturn sum(p.b - p.a for p in arr[:n])\r\n'
    ),
    'task_id': 601,
    'test_setup_code': '',
    'test_list': [
        'assert chain([Pair(1, 2), Pair(4, 8)], 2) == 5',
        'assert chain([Pair(1, 2)], 1) == 1',
    ],
    'challenge_test_list': [],
}
SANITIZED = {
    'source_file': 'x.ipynb',
    'task_id': 2,
    'prompt': 'Write a function to find the common elements.',
    'code': 'def similar(a, b):\n  return tuple(set(a) & set(b))',
    'test_imports': ['import math'],
    'test_list': [
        'assert set(similar((3, 4), (5, 4))) == {4}',
        'assert math.isclose(similar((1,), (1,))[0], 1)',
    ],
}


@needs_sandbox
@pytest.mark.parametrize(('row', 'name'), [(MBPP, 'Pair'), (SANITIZED, 'similar')])
def test_mbpp(tmp_path, monkeypatch, row, name):
    (loaded,) = written(tmp_path, monkeypatch, 'mbpp', [row])
    assert loaded['question'] == row.get('text', row.get('prompt'))
    assert loaded['entry_point'] == name or loaded['entry_point'] == 'chain'
    columns = {key: loaded[key] for key in ('entry_point', 'prefix')}
    assert unit_tests([loaded['solution'], 'pass'], loaded['test'], **columns) == [1, 0]


def test_mbpp_names_the_wrong_row(tmp_path, monkeypatch):
    with pytest.raises(
        ValueError, match=r'test.jsonl:2: the tests use no function of the solution'
    ):
        written(tmp_path, monkeypatch, 'mbpp', [MBPP, MBPP | {'test_list': ['assert other(1)']}])


@needs_sandbox
def test_apps(tmp_path, monkeypatch):
    reads = {
        'question': 'Double.',
        'input_output': json.dumps({'inputs': ['1\n', '2\n'], 'outputs': ['2\n', '4\n']}),
        'solutions': '[]',
        'starter_code': '',
    }
    calls = reads | {
        'question': 'Pair.',
        'input_output': json.dumps({'fn_name': 'f', 'inputs': [[1, 2]], 'outputs': [[[1, 2]]]}),
        'starter_code': 'class Solution:\n    def f(self, a, b):',
    }
    first, second = written(tmp_path, monkeypatch, 'apps', [reads, calls])
    assert (first['inputs'], first['outputs'], first['test']) == (
        ['1\n', '2\n'],
        ['2\n', '4\n'],
        '',
    )
    assert io(['print(2 * int(input()))'], first['inputs'], first['outputs']) == [1]
    assert (second['inputs'], second['entry_point']) == ([], 'Solution')
    solutions = [
        'class Solution:\n    def f(self, a: int, b: List[int]): return a, b\n',
        'class Solution:\n    def f(self, a, b): return b, a\n',
    ]
    columns = {key: second[key] for key in ('entry_point', 'prefix')}
    assert unit_tests(solutions, second['test'], **columns) == [1, 0]


@needs_sandbox
def test_livecodebench(tmp_path, monkeypatch):
    import base64
    import pickle
    import zlib

    case = {'input': '3\n', 'output': '6\n', 'testtype': 'stdin'}
    private = base64.b64encode(zlib.compress(pickle.dumps(json.dumps([case])))).decode()
    call = {'input': '[1, 2]\n2', 'output': '[2, 4]', 'testtype': 'functional'}
    row = {
        'question_content': 'Double.', 'starter_code': '', 'metadata': '{}',
        'public_test_cases': json.dumps([case]), 'private_test_cases': private,
    }  # fmt: skip
    functional = row | {
        'question_content': 'Multiply.',
        'starter_code': 'class Solution:',
        'metadata': '{"func_name": "times"}',
        'public_test_cases': json.dumps([call]),
        'private_test_cases': '[]',
    }
    first, second = written(tmp_path, monkeypatch, 'livecodebench', [row, functional])
    assert (first['inputs'], first['outputs']) == (['3\n', '3\n'], ['6\n', '6\n'])
    solution = 'class Solution:\n    def times(self, a, n): return [n * x for x in a]\n'
    assert unit_tests([solution, 'pass'], second['test'], entry_point='Solution') == [1, 0]

    class Opens:
        def __reduce__(self):
            return (open, (str(tmp_path / 'opened'), 'w'))

    bad = row | {
        'private_test_cases': base64.b64encode(zlib.compress(pickle.dumps(Opens()))).decode()
    }
    (tmp_path / 'again').mkdir()
    with pytest.raises(ValueError, match=r'private_test_cases.*cannot be read: it names'):
        written(tmp_path / 'again', monkeypatch, 'livecodebench', [bad])
    assert not (tmp_path / 'opened').exists()


@needs_sandbox
def test_the_problems_of_the_tiny_config():
    training, heldout = (code_tiny.problems(split, size=300) for split in ('train', 'test'))
    assert (len(training), len(heldout), code_tiny.problems('other')) == (300, 100, None)
    assert not {row['question'] for row in training} & {row['question'] for row in heldout}
    rows = [row for row in heldout if '(' in row['demonstration']][:2]
    careless = [row['demonstration'].replace('(', '').replace(')', '') for row in rows]
    columns = {name: [row[name] for row in rows] for name in ('test', 'entry_point', 'prefix')}
    right = rewards.code_tests(['', ''], [row['demonstration'] for row in rows], **columns)
    assert right == [1, 1]
    assert rewards.code_tests(['', ''], careless, **columns) == [0, 0]


def test_the_off_by_one_mutation_is_python():
    ast.parse(OFF_BY_ONE % ('f', 'f'))
