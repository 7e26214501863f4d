"""What the tests of the rewards share: calling one on a row, hostile texts, real data."""

import json
import os
from pathlib import Path

import pytest

PROMPT = '37+58+21='
RIGHT = '37+58=95;95+21=116'


def one(reward, completion, prompt='', **columns):
    """The reward of a single row."""
    (value,) = reward([prompt], [completion], **{name: [v] for name, v in columns.items()})
    return value


def real(path):
    """The rows of a public data set; skips where the files are absent."""
    file = Path(os.environ.get('GRPO_JAX_DATA_DIR', ''), path)
    if not os.environ.get('GRPO_JAX_DATA_DIR') or not file.is_file():
        pytest.skip(f'real data absent: GRPO_JAX_DATA_DIR should hold {path}')
    return [json.loads(line) for line in file.read_text().splitlines()]


# Each would run for hours or overflow where matching backtracks or restarts.
HOSTILE = [
    ('digits', '7' * 200_000),
    ('spaces', ' ' * 200_000),
    ('hashes', '#' * 200_000),
    ('minus signs', '-' * 200_000),
    ('braces', '\\boxed{' + '{' * 200_000),
    ('boxes', '\\boxed{' * 30_000),
    ('boxes with numbers', '\\boxed{1}' * 20_000),
    ('thousands', '1' + ',000' * 50_000 + '0'),
    ('commas', '1,' * 100_000),
    ('dots', '1.' * 100_000),
    ('divisions', '1/' * 100_000),
    ('zero divisors', '1/0 ' * 50_000),
    ('fractions', '\\frac{1' * 30_000),
    ('fraction', '\\frac{' + '1' * 200_000),
    ('marker and spaces', '####' + ' ' * 200_000 + 'x'),
    ('markers', '#### ' * 40_000),
    ('markers with numbers', '#### 1,0001 ' * 15_000),
    ('phrases', 'answer is ' * 20_000),
    ('phrase and filler', 'answer is' + '$*( ' * 50_000),
    ('semicolons', ';' * 200_000),
    ('equals signs', '=' * 200_000),
    ('steps', '37+58=95;' * 20_000),
    ('half a step', '37+' * 60_000),
    ('long result', '37+58=' + '9' * 200_000 + ';' + '9' * 200_000 + '+21=1'),
    ('long product', '9' * 100_000 + '*' + '9' * 100_000 + '='),
    ('tags', '<think>' * 30_000),
    ('closing tags', '<think>' + '</think>' * 25_000 + '<answer>'),
]
