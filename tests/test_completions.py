"""Grading completions produced elsewhere: the command, by hand and on real references."""

import json
import os
import pathlib
import random
import re
import subprocess
import sys

import pytest

from grpo_jax import rewards
from grpo_jax.run import completions

ROOT = pathlib.Path(__file__).parent.parent
DATA = os.environ.get('GRPO_JAX_DATA_DIR')
needs_data = pytest.mark.skipif(not DATA, reason='GRPO_JAX_DATA_DIR is not set')

ROWS = [
    {
        'answer': 'Two and two.\n#### 4',
        'completions': ['#### 4', 'So the answer is 5.', '#### 5', ''],
        'scores': [0.9, 0.9, -0.1, 0],
    },
    {'answer': '7', 'completions': ['#### 7', 'That makes $7.00'], 'scores': [1, 2], 'level': 3},
]


def write(path, rows):
    path.write_text(''.join(json.dumps(row) + '\n' for row in rows))
    return path


def lines(path):
    return [json.loads(line) for line in path.read_text(encoding='utf-8').splitlines()]


def command(*arguments, path=ROOT):
    """Runs the command in a process of its own, in which `path` comes first in what is imported."""
    environment = os.environ | {'PYTHONPATH': f'{path}{os.pathsep}{ROOT}'}
    return subprocess.run(
        [sys.executable, '-m', 'grpo_jax.evaluate', *map(str, arguments)],
        capture_output=True,
        text=True,
        env=environment,
        timeout=240,
    )


def test_the_command_by_hand_and_without_jax(tmp_path):
    trap = 'raise ImportError("the scorer of completions imports this")'
    for name in ('jax', 'flax', 'tensorflow_datasets'):
        (tmp_path / f'{name}.py').write_text(trap)
    source = write(tmp_path / 'mine.jsonl', ROWS)
    done = command(f'--completions={source}', '--dataset=gsm8k', path=tmp_path)
    assert (done.returncode, done.stderr) == (0, '')
    assert done.stdout.count('\n') == 1
    grades = tmp_path / 'mine.grades.jsonl'
    means = {
        'accuracy': 3 / 6,  # over completions; the others over rows
        'pass@1': (1 / 4 + 1) / 2,
        'maj@1': (1 / 4 + 1) / 2,
        'rm@1': (1 / 4 + 1) / 2,
        'pass@2': (3 / 6 + 1) / 2,
        'maj@2': (3 / 6 + 1) / 2,  # 4 with 5, with 5 and with nothing
        'rm@2': (5 / 6 / 2 + 1) / 2,  # the first two share the highest score of five pairs
    }
    ends = {f'{name}/high': 1.0 for name in means}
    ends |= {f'{name}/low': 1 / 4 for name in means}
    ends |= {'pass@2/low': 1 / 2, 'maj@2/low': 1 / 2, 'rm@2/low': 5 / 12}
    counts = {'rows': 2, 'completions': 6, 'no_answer': 1, 'timeouts': 0}
    found = json.loads(done.stdout)
    assert found.pop('grades') == str(grades)
    assert found == pytest.approx(means | ends | counts)
    assert lines(grades) == [
        {
            'line': 1,
            'answer': 'Two and two.\n#### 4',
            'extracted': ['4', '5', '5', None],
            'votes': [0, 1, 1, None],
            'correct': [True, False, False, False],
        },
        {
            'line': 2,
            'answer': '7',
            'extracted': ['7', '7'],
            'votes': [0, 0],
            'correct': [True, True],
        },
    ]
    assert {path.name for path in tmp_path.glob('mine*')} == {'mine.jsonl', grades.name}


def score(capsys, source, *arguments, dataset='gsm8k'):
    completions.main([f'--completions={source}', f'--dataset={dataset}', *arguments])
    return json.loads(capsys.readouterr().out)


@pytest.mark.parametrize(
    ('dataset', 'answer', 'right', 'wrong'),
    [
        ('gsm8k', 'It is 1,000.\n#### 1,000', 'The answer is 1000.', '#### 100'),
        ('math', 'Half of it is $\\boxed{\\frac{1}{2}}$.', '$\\boxed{0.5}$', '$\\boxed{2}$'),
        ('math', '\\frac{1}{2}', 'So it is $\\boxed{\\frac12}$.', ''),
        ('cmath', '18', '一共买了 3 × 6 = 18 小包。答案是18。', '答案是17。'),
        ('svamp', 145.0, 'The answer is 145.', 'The answer is 14.5.'),
        ('mawps', 43, 'She gave $\\boxed{43}$.', 'She gave $\\boxed{-43}$.'),
    ],
)
def test_every_data_set(tmp_path, capsys, dataset, answer, right, wrong):
    row = {'answer': answer, 'completions': [right, wrong, right]}
    found = score(capsys, write(tmp_path / 'a.jsonl', [row]), dataset=dataset)
    assert found['accuracy'] == pytest.approx(2 / 3)
    assert lines(tmp_path / 'a.grades.jsonl')[0]['correct'] == [True, False, True]
    assert 'rm@1' not in found


def test_equivalent_answers_vote_together(tmp_path, capsys):
    texts = ['\\boxed{3}', '\\boxed{\\frac{1}{2}}', '\\boxed{3}', '\\boxed{0.5}', '\\boxed{1/2}']
    source = write(tmp_path / 'a.jsonl', [{'answer': '\\frac{1}{2}', 'completions': texts}])
    assert score(capsys, source, dataset='math')['maj@4'] == pytest.approx(2 / 5)
    assert score(capsys, source, '--k=5', dataset='math')['maj@5'] == 1
    assert lines(tmp_path / 'a.grades.jsonl')[0]['votes'] == [0, 1, 0, 1, 1]


def sizes(found):
    return sorted(int(name[5:]) for name in found if name.startswith('pass@') and '/' not in name)


def test_sizes(tmp_path, capsys):
    texts = ['#### 4'] * 9
    rows = [{'answer': '4', 'completions': texts}, {'answer': '4', 'completions': texts[:7]}]
    source = write(tmp_path / 'a.jsonl', rows)
    assert sizes(score(capsys, source)) == [1, 2, 4]
    assert sizes(score(capsys, source, '--k=7,2,2')) == [2, 7]
    assert sizes(score(capsys, source, '--k=(3,)')) == [3]
    for text in ('0,1', 'x', ',', '1.5'):
        with pytest.raises(ValueError, match=r'--k=.*: give positive whole numbers, as in --k=1'):
            score(capsys, source, f'--k={text}')
    with pytest.raises(ValueError, match=r'--k=1,8: line 2 has 7 completions, so k is at most 7'):
        score(capsys, source, '--k=1,8')
    source = write(tmp_path / 'b.jsonl', rows[:1] * 2)
    source.write_text('\n' + source.read_text() + ' \n')  # blank lines do not count as rows
    found = score(capsys, source)
    assert sizes(found) == [1, 2, 4, 8]
    assert [row['line'] for row in lines(tmp_path / 'b.grades.jsonl')] == [2, 3]


def test_graded_in_chunks(tmp_path, capsys, monkeypatch):
    graded = []

    def late(dataset, references, groups):
        graded.append(references if any(groups) else [])
        pairs = zip(references, groups, strict=True)
        correct = [[text == reference for text in group] for reference, group in pairs]
        return rewards.Grades(correct, [list(group) for group in groups], timeouts=2)

    monkeypatch.setattr(rewards, 'grade_answers', late)
    monkeypatch.setattr(completions, 'CHUNK', 2)
    rows = [{'answer': str(i), 'completions': [str(i % 4)] * 3} for i in range(5)]
    found = score(capsys, write(tmp_path / 'a.jsonl', rows))
    assert [chunk for chunk in graded if chunk] == [['0', '1'], ['2', '3'], ['4']]
    assert (found['timeouts'], found['accuracy']) == (6, 4 / 5)
    grades = lines(tmp_path / 'a.grades.jsonl')
    assert [row['extracted'][0] for row in grades] == ['0', '1', '2', '3', '0']


def test_output(tmp_path, capsys):
    source = write(tmp_path / 'a.jsonl', [{'answer': '4', 'completions': ['“四” \ud800 #### 4']}])
    for _ in range(2):  # the second time it replaces the file of the first
        found = score(capsys, source, f'--output={tmp_path / "b.jsonl"}')
        assert found['grades'] == str(tmp_path / 'b.jsonl')
        assert lines(tmp_path / 'b.jsonl')[0]['correct'] == [True]
    assert not (tmp_path / 'a.grades.jsonl').exists()
    with pytest.raises(ValueError, match='is the file of completions: name another'):
        score(capsys, source, f'--output={tmp_path / "." / "a.jsonl"}')
    with pytest.raises(ValueError, match='is a folder: name a file'):
        score(capsys, source, f'--output={tmp_path}')
    with pytest.raises(OSError, match='nowhere'):
        score(capsys, source, f'--output={tmp_path / "nowhere" / "b.jsonl"}')
    odd = write(tmp_path / 'c.jsonl', [{'answer': '五 \ud800 #### 5', 'completions': ['五']}])
    score(capsys, odd)
    assert '五 \\ud800' in (tmp_path / 'c.grades.jsonl').read_text(encoding='utf-8')


GOOD = '{"answer": "4", "completions": ["4", "5"], "scores": [1, 2]}'


@pytest.mark.parametrize(
    ('line', 'message'),
    [
        ('{"answer": "4"', "Expecting ',' delimiter"),
        ('["4"]', 'is not a JSON object'),
        ('[' * 100_000, 'recursion'),
        ('"\xff"', 'invalid start byte'),
        ('{}', "has no 'answer', only nothing"),
        ('{"completions": ["4"], "gold": "4"}', "has no 'answer', only 'completions', 'gold'"),
        ('{"answer": "4", "completion": "4"}', "has no 'completions', only 'answer', 'completion'"),
        ('{"answer": null, "completions": ["4"]}', "'answer' is null: give a text or a number"),
        ('{"answer": NaN, "completions": ["4"]}', "'answer' is NaN: give a text or a number"),
        ('{"answer": true, "completions": ["4"]}', "'answer' is true: give a text or a number"),
        ('{"answer": "4", "completions": []}', "'completions' is []: give a list of texts"),
        ('{"answer": "4", "completions": "4"}', '\'completions\' is "4": give a list of texts'),
        ('{"answer": "4", "completions": ["4", 4]}', '\'completions\' is ["4", 4]: give a list of'),
        (GOOD.replace('[1, 2]', '[1]'), "'scores' is [1]: give 2, one per completion"),
        (GOOD.replace('[1, 2]', '3'), "'scores' is 3: give 2, one per completion"),
        (GOOD.replace('[1, 2]', '[1, NaN]'), "'scores'[1] is NaN: give a finite number"),
        (GOOD.replace('[1, 2]', '[-1e999, 1]'), "'scores'[0] is -Infinity: give a finite number"),
        (
            GOOD.replace('[1, 2]', f'[1, {10**310}]'),
            f"'scores'[1] is {str(10**310)[:57]}...: give a finite number",
        ),
        (GOOD.replace('[1, 2]', '[1, "2"]'), '\'scores\'[1] is "2": give a finite number'),
        (GOOD.replace('[1, 2]', 'null'), 'has no scores, but line 1 has some'),
    ],
)
def test_a_line_that_is_wrong(tmp_path, capsys, line, message):
    source = tmp_path / 'a.jsonl'
    source.write_bytes(f'{GOOD}\n\n{line}\n{GOOD}\n'.encode('latin-1'))
    with pytest.raises(ValueError, match=rf'^{source}, line 3: .*{re.escape(message)}'):
        score(capsys, source)
    assert [path.name for path in tmp_path.iterdir()] == ['a.jsonl']


def test_an_answer_that_nothing_can_equal(tmp_path, capsys):
    source = tmp_path / 'a.jsonl'
    source.write_text(f'{GOOD}\n{GOOD.replace("4", "four", 1)}\n')
    with pytest.raises(ValueError, match=rf"^{source}, line 2: 'answer': .*'four'.* not a number"):
        score(capsys, source)
    assert [path.name for path in tmp_path.iterdir()] == ['a.jsonl']


def test_nothing_is_left_of_a_run_that_ends_early(tmp_path, capsys, monkeypatch):
    def interrupt(dataset, references, groups):
        if any(groups):
            assert [path.name for path in tmp_path.glob('*/*')] == ['a.grades.jsonl']
            raise KeyboardInterrupt
        return rewards.Grades([[]], [[]], 0)

    monkeypatch.setattr(rewards, 'grade_answers', interrupt)
    source = write(tmp_path / 'a.jsonl', ROWS)
    with pytest.raises(KeyboardInterrupt):
        score(capsys, source)
    assert [path.name for path in tmp_path.iterdir()] == ['a.jsonl']


def test_scores_that_begin_late(tmp_path, capsys):
    rows = [{'answer': '4', 'completions': ['4']}, json.loads(GOOD)]
    with pytest.raises(ValueError, match='line 2: has scores, but line 1 has none'):
        score(capsys, write(tmp_path / 'a.jsonl', rows))


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        (['--completions=FILE', '--dataset=gsm8'], 'unknown data set --dataset=gsm8: known are cm'),
        (['--completions=FILE'], 'the following arguments are required: --dataset'),
        (['--dataset=gsm8k'], 'the following arguments are required: --completions'),
        (['--completions=FILE', '--dataset=gsm8k', '--n=3'], 'unrecognized arguments: --n=3'),
        (
            ['--completions=none.jsonl', '--dataset=gsm8k'],
            '--completions=none.jsonl: no such file: name a file of JSON lines',
        ),
        (['--completions=FILE', '--dataset=gsm8k'], 'FILE has no rows'),
    ],
)
def test_the_command_ends_with_one_line(tmp_path, arguments, message):
    empty = tmp_path / 'empty.jsonl'
    empty.write_text('\n')
    done = command(*(argument.replace('FILE', str(empty)) for argument in arguments))
    assert (done.returncode, done.stdout) == (2, '')
    assert done.stderr.startswith('error: ')
    assert done.stderr.count('\n') == 1
    assert message.replace('FILE', str(empty)) in done.stderr


@needs_data
@pytest.mark.parametrize('dataset', ['gsm8k', 'math'])
def test_real_references(tmp_path, dataset):
    name, column = {'gsm8k': ('test', 'answer'), 'math': ('test500', 'solution')}[dataset]
    solutions = [row[column] for row in lines(pathlib.Path(DATA, dataset, f'{name}.jsonl'))]
    others = solutions.copy()
    random.Random(0).shuffle(others)
    pairs = zip(solutions, others, strict=True)
    rows = [{'answer': one, 'completions': [one, two]} for one, two in pairs]
    source = write(tmp_path / 'a.jsonl', rows)
    done = command(f'--completions={source}', f'--dataset={dataset}')
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    grades = [row['correct'] for row in lines(tmp_path / 'a.grades.jsonl')]
    own, other = (sum(column) / len(grades) for column in zip(*grades, strict=True))
    assert own >= (0.999 if dataset == 'gsm8k' else 0.99)
    assert other < 0.06  # small numbers are right by chance
    assert found['accuracy'] == pytest.approx((own + other) / 2)
    assert found['rows'] == len(solutions)


@pytest.mark.parametrize('answer', ['0.10', '1e-7', '145.0', '12345678901234567890123', '-0'])
def test_numbers_are_not_spelled_in_another_way(tmp_path, answer):
    path = tmp_path / 'mine.jsonl'
    path.write_text(f'{{"answer": {answer}, "completions": ["x"], "scores": [0.10]}}')
    (row,) = completions.read(path)
    assert row.answer == answer
    assert row.scores == [0.1]
