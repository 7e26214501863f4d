"""The digest of a function's source changes with what it uses, and with nothing else."""

import pytest

from grpo_jax.run.sources import source_digest

REWARD = """
import math
from helper import scale
from . import words
import package.inside

LIMIT = 3
UNUSED = 4


class Base:
    pass


def length(text):
    '''How long.'''
    return min(len(text), LIMIT)


@staticmethod
def reward(completions, **columns):
    import late
    return [scale(length(text)) + math.pi + words.A + package.inside.B for text in completions]


def another(completions):
    return reward(completions)


def get_config():
    return {'steps': 8}
"""
FILES = {
    'rewards.py': REWARD,
    'helper.py': 'from deeper import C\n\ndef scale(x):\n    return x * C\n\ndef other():\n    1\n',
    'deeper.py': 'C = 1\nD = 2\n',
    'words.py': 'A = 1\n',
    'late.py': 'E = 1\n',
    'math.pyi': '',
    'package/__init__.py': '',
    'package/inside.py': 'B = 1\n',
}


def digest(folder, changes=(), name='reward'):
    for file, text in FILES.items():
        path = folder / file
        path.parent.mkdir(exist_ok=True, parents=True)
        for changed, old, new in changes:
            assert changed != file or old in text
            text = text.replace(old, new) if changed == file else text
        path.write_text(text)
    return source_digest(folder / 'rewards.py', name)


@pytest.mark.parametrize(
    'change',
    [
        ('rewards.py', 'LIMIT = 3', 'LIMIT = 4'),
        ('rewards.py', 'min(len', 'max(len'),
        ('rewards.py', '@staticmethod\n', ''),
        ('rewards.py', 'math.pi', 'math.e'),
        ('helper.py', 'x * C', 'x + C'),
        ('deeper.py', 'C = 1', 'C = 2'),
        ('words.py', 'A = 1', 'A = 2'),
        ('late.py', 'E = 1', 'E = 2'),
        ('package/inside.py', 'B = 1', 'B = 2'),
    ],
)
def test_what_a_function_uses_counts(tmp_path, change):
    assert digest(tmp_path / 'a') != digest(tmp_path / 'b', [change])


@pytest.mark.parametrize(
    'change',
    [
        ('rewards.py', 'UNUSED = 4', 'UNUSED = 5'),
        ('rewards.py', "'steps': 8", "'steps': 9"),
        ('rewards.py', 'LIMIT = 3', '# a comment\nLIMIT  =  3'),
        ('rewards.py', 'return reward(completions)', 'return []'),
        ('helper.py', '    1', '    2'),
        ('deeper.py', 'D = 2', 'D = 3'),
    ],
)
def test_what_it_does_not_use_does_not(tmp_path, change):
    assert digest(tmp_path / 'a') == digest(tmp_path / 'b', [change])


def test_other_functions_and_dotted_names(tmp_path):
    assert digest(tmp_path, name='another') != digest(tmp_path, name='reward')
    assert digest(tmp_path, name='Base.make') == digest(tmp_path, name='Base')
    whole = digest(tmp_path, name='set_at_run_time')  # by anything in the file
    assert whole != digest(tmp_path, [('rewards.py', '9' * 0 + 'UNUSED', 'OTHER')], name='missing')
