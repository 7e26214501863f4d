"""Data sets from a function of the user's own."""

import datetime

import pytest

from grpo_jax import data

HERE = 'test_own_rows'


def problems(split, count=2):
    if split == 'missing':
        return None
    return ({'question': f'{split} {n}?', 'nums': [n, None]} for n in range(count))


def raising(split):
    raise KeyError(split)


def leaving(split):
    raise SystemExit(0)


def uneven(split):
    return [{'a': 1}, {'b': 1}]


def dates(split):
    return [{'a': datetime.date(2020, 1, 1)}]


def texts(split):
    return ['a']


def load(name, split='train', **options):
    return data.load(f'{HERE}:{name}', split, cache_dir='unused', **options)


def test_rows_by_hand():
    assert load('problems', count=1) == [{'question': 'train 0?', 'nums': [0, None]}]
    assert len(load('problems')) == 2
    with pytest.raises(data.MissingSplitError, match="split 'missing': there is none"):
        load('problems', 'missing')


@pytest.mark.parametrize(
    ('name', 'message'),
    [
        ('problem', r"data set 'test_own_rows:problem': .* did you mean 'problems'"),
        ('raising', r"data set 'test_own_rows:raising', split 'train': raised KeyError: 'train'"),
        ('raising', r"raised KeyError: 'train' \(test_own_rows.py:19\)$"),
        ('leaving', 'raised SystemExit: 0'),
        ('uneven', 'row 1: the columns are b where the first row has a'),
        ('dates', 'row 0, a: Object of type date is not JSON serializable'),
        ('texts', 'row 0: "a" is not a JSON object with columns'),
    ],
)
def test_functions_that_do_not_return_rows(name, message):
    with pytest.raises(ValueError, match=message):
        load(name)


def test_unknown_options():
    with pytest.raises(ValueError, match=r"raised TypeError: .*unexpected keyword argument 'size'"):
        load('problems', size=1)
