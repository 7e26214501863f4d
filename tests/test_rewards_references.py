"""What is found before training: missing columns, and references that cannot be read."""

import functools

import pytest

from grpo_jax.rewards import (
    RewardError,
    build,
    check_arguments,
    check_references,
    countdown_answer,
    exact_answer,
    gsm8k_answer,
    math_answer,
)

COLUMNS = ['question', 'answer', 'level']


def names_a_column(completions, answers, **kwargs):
    return [0.0] * len(completions)


def has_a_default(completions, answers=None, log_metric=None, *, scale=2, **kwargs):
    return [0.0] * len(completions)


def asks_for_services(prompts, completions, completion_ids, trainer_state, log_extra, **kwargs):
    return [0.0] * len(completions)


def closed(prompts, completions, completion_ids, answer, question, level):
    return [0.0] * len(completions)


def too_closed(prompts, completions, answer):
    return [0.0] * len(completions)


class Instance:
    def __call__(self, completions, missing, **kwargs):
        return [0.0] * len(completions)


@pytest.mark.parametrize(
    'function',
    [
        has_a_default,
        asks_for_services,
        closed,
        functools.partial(names_a_column, answers=[]),
        functools.partial(Instance(), missing=1),
        math_answer,
        max,
    ],
)
def test_functions_that_can_be_called(function):
    check_arguments({'f': function}, COLUMNS)


@pytest.mark.parametrize(
    ('function', 'message'),
    [
        (
            names_a_column,
            "reward 'f' needs 'answers', .*question, answer, level, did you mean 'ans",
        ),
        (Instance(), "reward 'f' needs 'missing', which is not a column of the data set"),
        (too_closed, r"'f' does not accept completion_ids, question, level: add \*\*kwargs"),
        (countdown_answer, "needs 'numbers'"),
    ],
)
def test_functions_that_cannot_be_called(function, message):
    with pytest.raises(RewardError, match=message):
        check_arguments({'f': function}, COLUMNS)


def test_options_of_a_config_are_bound():
    functions, _ = build({'soft_overlong': {'weight': 1, 'max_tokens': 9, 'cache_tokens': 2}})
    check_arguments(functions, COLUMNS)


@pytest.mark.parametrize('column', ['prompts', 'completion_ids', 'trainer_state', 'log_metric'])
def test_columns_with_the_name_of_an_argument(column):
    with pytest.raises(RewardError, match=f"column '{column}' is the name of a reward argument"):
        check_arguments({'f': has_a_default}, [column])


def test_unreadable_references():
    answers = ['5', 5, 2.5, 'so\n#### 7', None, '', 'n/a', [1], True]
    rows = [10 + i for i in range(len(answers))]
    columns = {'answer': answers, 'question': ['q'] * len(answers)}

    def never(completions, answer, **kwargs):
        raise AssertionError('functions of the user are not called')

    functions = {'number': gsm8k_answer, 'latex': math_answer, 'own': never}
    unreadable = check_references(functions, columns, rows)
    assert unreadable['number'] == [14, 15, 16, 17, 18]
    assert unreadable['latex'][:2] == [14, 15]
    assert 'own' not in unreadable
    assert check_references(functions, {'answer': answers[:4]}, rows[:4]) == {}


@pytest.mark.parametrize('bad', ['n/a', None, 2.5, True])
def test_references_that_raise(bad):
    with pytest.raises(RewardError, match=r"reward 'e', row 7 \(from 0\): .*is not a whole number"):
        check_references({'e': exact_answer}, {'answer': [3, bad]}, [4, 7])
    columns = {'numbers': [[1, 2], [3]], 'target': [3, 'three']}
    with pytest.raises(RewardError, match=r"reward 'c', row 7 \(from 0\)"):
        check_references({'c': countdown_answer}, columns, [4, 7])
