"""Steps of completions and their rewards, by hand."""

import math

import pytest

from grpo_jax import rewards
from grpo_jax.rewards import RewardError, StepReward, right_steps, score_steps, separated_steps

PROMPT = '7+8+5+9='
RIGHT = '7+8=15;15+5=20;20+9=29'


@pytest.mark.parametrize(
    ('completion', 'expected'),
    [
        (RIGHT, [(7, 1.0), (15, 1.0), (22, 1.0)]),
        ('7+8=5;5+5=10;10+9=19', [(6, 0.0), (13, 1.0), (20, 1.0)]),  # one slip, then consistent
        ('7+8=15;7+5=12;12+9=21', [(7, 1.0), (14, 0.0), (21, 1.0)]),
        ('7+8=15', [(6, 1.0)]),  # two are missing
        (RIGHT + ';29+0=29', [(7, 1.0), (15, 1.0), (23, 1.0), (30, 0.0)]),  # one too many
        (RIGHT + ';', [(7, 1.0), (15, 1.0), (23, 1.0)]),  # the last one includes the rest
        ('7+8=15;; ;15+5=20', [(10, 1.0), (17, 1.0)]),  # blank pieces belong to the step before
        (' 7+8=15', [(7, 1.0)]),
        ('hm', [(2, 0.0)]),
        (' ; ', []),
        ('', []),
    ],
)
def test_right_steps(completion, expected):
    assert right_steps([PROMPT], [completion]) == [expected]


def test_right_steps_of_several_rows():
    result = right_steps(['1+1=', '2*3='], ['1+1=3', '2*3=6;'], answer=['2', '6'])
    assert result == [[StepReward(5, 0.0)], [StepReward(6, 1.0)]]


def test_right_steps_need_a_chain():
    with pytest.raises(ValueError, match="prompt 'What is 2\\+2\\?' is not a chain of whole"):
        right_steps(['1+1=', 'What is 2+2?'], ['1+1=2', '4'])


@pytest.mark.parametrize(
    ('completion', 'separator', 'ends'),
    [
        ('one\ntwo\n', '\n', [4, 8]),
        ('one\ntwo', '\n', [4, 7]),  # the last one does not need one
        ('one\n\n\ntwo', '\n', [6, 9]),  # several end one step
        ('\n\none', '\n', [5]),
        ('one\n \ntwo', '\n', [4, 9]),  # a blank line is no step
        ('one', '\n', [3]),
        ('a. b. c', '. ', [3, 6, 7]),
        ('a. . b', '. ', [5, 6]),
        ('a;b', '\n', [3]),
        ('é;答;', ';', [2, 4]),  # characters, not bytes
        ('\n', '\n', []),
        ('', '\n', []),
    ],
)
def test_separated_steps(completion, separator, ends):
    result = separated_steps(['?'], [completion], separator=separator, answer=['1'])
    assert result == [[(end, 0.0) for end in ends]]


def test_steps_are_separated_by_lines_by_default():
    assert separated_steps(['?', '?'], ['a\nb', '']) == [[(2, 0.0), (3, 0.0)], []]


def call(function, completions=('abc', 'de'), **columns):
    return score_steps('mine', function, ['p', 'q'], completions, columns)


def test_score_steps_converts_pairs_to_step_rewards():
    def pairs(prompts, completions, answer):
        assert (prompts, completions, answer) == (['p', 'q'], ['abc', 'de'], [1, 2])
        return [[(1, 0.5), (3, -1)], []]

    assert call(pairs, answer=[1, 2]) == [[StepReward(1, 0.5), StepReward(3, -1)], []]


def test_a_step_function_that_raises():
    def failing(**columns):
        raise KeyError('gone')

    message = r"step rewards 'mine', called with prompts, completions, raised KeyError: 'gone'"
    with pytest.raises(RewardError, match=message):
        call(failing)


@pytest.mark.parametrize('returned', [[[]], [[], [], []], ([], []), None, 1.0])
def test_one_list_for_each_completion(returned):
    message = (
        "step rewards 'mine' did not return a list with one entry for each of the 2 completions"
    )
    with pytest.raises(RewardError, match=message):
        call(lambda **columns: returned)


@pytest.mark.parametrize(
    ('row', 'message'),
    [
        (None, 'is not a list of'),
        ([1.0], 'is not a list of'),
        ([(1,)], 'is not a list of'),
        ([(1, 'high')], 'is not a list of'),
        ([(2, 1.0), (1, 1.0)], 'ends must grow'),
        ([(1, 1.0), (1, 1.0)], 'ends must grow'),
        ([(0, 1.0)], 'ends must grow'),
        ([(-1, 1.0)], 'ends must grow'),
        ([(3, 1.0)], 'ends must grow'),  # 'de' has two characters
        ([(2, math.nan)], 'values be finite'),
        ([(2, math.inf)], 'values be finite'),
        ([(2, -math.inf)], 'values be finite'),
    ],
)
def test_a_row_that_is_no_list_of_steps(row, message):
    with pytest.raises(RewardError, match=f"step rewards 'mine', row 1: .*{message}"):
        call(lambda **columns: [[(3, 1.0)], row])


def test_an_option_of_a_step_function_takes_precedence_over_a_column_of_its_name():
    _, function, _ = rewards.build_steps({'separated_steps': {'weight': 1.0, 'separator': ';'}})
    steps = call(function, ('a;b', 'c\nd'), separator=['\n', '\n'])
    assert steps == [[(2, 0.0), (3, 0.0)], [(3, 0.0)]]


def test_a_step_function_cannot_change_the_columns():
    columns = {'answer': [1, 2]}
    call(lambda prompts, completions, answer: answer.clear() or [[], []], **columns)
    assert columns == {'answer': [1, 2]}


# From a config


def test_build_steps():
    name, function, weight = rewards.build_steps({'right_steps': 2})
    assert (name, weight) == ('right_steps', 2.0)
    assert function([PROMPT], [RIGHT]) == right_steps([PROMPT], [RIGHT])
    spec = {'separated_steps': {'weight': 0.5, 'separator': ';'}}
    name, function, weight = rewards.build_steps(spec)
    assert (name, weight) == ('separated_steps', 0.5)
    assert function(prompts=['?'], completions=['a;b']) == [[(2, 0.0), (3, 0.0)]]


def test_own_step_functions():
    _, function, _ = rewards.build_steps({'test_rewards_steps:whole': 1.0})
    assert function(['?'], ['abc']) == [[(3, 1.0)]]


def whole(prompts, completions, **columns):
    return [[StepReward(len(text), 1.0)] for text in completions]


@pytest.mark.parametrize(
    ('spec', 'message'),
    [
        ({}, 'grpo.step_rewards names 0 functions: process supervision needs one'),
        ({'right_steps': 1.0, 'separated_steps': 1.0}, 'grpo.step_rewards names 2 functions'),
        ({'right_step': 1.0}, "unknown step reward 'right_step', did you mean 'right_steps'"),
        ({'exact_answer': 1.0}, "unknown step reward 'exact_answer'"),
        ({'right_steps': math.nan}, 'grpo.step_rewards.right_steps=nan: a weight is a finite'),
        ({'right_steps': math.inf}, 'a weight is a finite number'),
        ({'right_steps': 'much'}, 'a weight is a finite number'),
        ({'right_steps': {'separator': ';'}}, 'grpo.step_rewards.right_steps has no weight'),
        ({'separated_steps': {'weight': 1.0, 'by': ';'}}, "no option 'by', did you mean 'separato"),
    ],
)
def test_build_steps_errors(spec, message):
    with pytest.raises(RewardError, match=message):
        rewards.build_steps(spec)


def test_step_functions_are_no_rewards():
    with pytest.raises(RewardError, match="unknown reward 'right_steps'"):
        rewards.build({'right_steps': 1.0})
