"""Rewards and extractors by name, and the options of a reward in a config."""

import numpy as np
import pytest
from ml_collections import ConfigDict

from grpo_jax.rewards import (
    RewardError,
    build,
    exact_answer,
    extract_answers,
    extractor,
    gsm8k_answer,
    resolve,
    score,
)

HERE = 'test_rewards_registry'


def test_resolve_built_in_and_paths():
    assert resolve('exact_answer') is exact_answer
    assert resolve('grpo_jax.rewards:exact_answer') is exact_answer
    assert resolve('grpo_jax.rewards.builtin.math.gsm8k_answer') is gsm8k_answer
    assert resolve('math:gcd') is not None


def test_every_reward_of_the_package_is_built_in():
    with pytest.raises(RewardError, match='built in are') as error:
        resolve('?')
    assert str(error.value).partition('built in are ')[2].partition(';')[0].split(', ') == [
        'arithmetic_steps',
        'chain_format',
        'cmath_answer',
        'code_io',
        'code_tests',
        'countdown_answer',
        'exact_answer',
        'gsm8k_answer',
        'hash_format',
        'language_mix',
        'llm_judge',
        'math_answer',
        'remote',
        'repetition',
        'soft_overlong',
        'tag_count',
        'think_format',
    ]


def test_extractors():
    answers = {
        name: extractor(name)('so 1+1=2, answer is $x$, 答案是5')
        for name in ('final_result', 'extract_answer', 'extract_math', 'extract_chinese')
    }
    assert answers == {
        'final_result': '2, answer is $x$, 答案是5',
        'extract_answer': '5',
        'extract_math': 'x',
        'extract_chinese': '5',
    }
    with pytest.raises(RewardError, match="extractor 'extract_mat', did you mean 'extract_math'"):
        extractor('extract_mat')


def first_word(text):
    return text.split()[0] if text else None


def test_extractors_are_checked():
    def leaving(text):
        raise SystemExit(0)

    assert extract_answers(first_word, ['a b', '']) == ['a', None]
    with pytest.raises(RewardError, match="extractor 'leaving' raised SystemExit: 0"):
        extract_answers(leaving, ['a'])
    with pytest.raises(RewardError, match="extractor 'len' returned 1: return a text, or None"):
        extract_answers(len, ['a'])


def test_own_extractors():
    assert extractor(f'{HERE}:first_word') is first_word
    assert extractor(f'{HERE}.first_word') is first_word
    message = f"extractor '{HERE}:first_wort': .* did you mean 'first_word'"
    with pytest.raises(RewardError, match=message):
        extractor(f'{HERE}:first_wort')


@pytest.mark.parametrize(
    ('name', 'message'),
    [
        ('exct_answer', r"unknown reward 'exct_answer', did you mean 'exact_answer'\?"),
        ('extract_answer', r"unknown reward 'extract_answer', did you mean 'exact_answer'\?"),
        ('gsm8k', r"did you mean 'gsm8k_answer'\?.*package.module:function"),
        ('score', 'unknown reward'),
        ('math', 'unknown reward'),
        ('', 'unknown reward'),
        ('grpo_jax.no_such:f', 'importing grpo_jax.no_such raised ModuleNotFoundError'),
        ('grpo_jax.rewards:exct_answer', "has no 'exct_answer', did you mean 'exact_answer'"),
        ('grpo_jax.rewards:__doc__', 'cannot be called'),
        ('grpo_jax.rewards:', 'not of the form'),
        ('.rewards.f', 'not of the form'),
        ('a:b:c', 'not of the form'),
    ],
)
def test_resolve_errors(name, message):
    with pytest.raises(RewardError, match=message):
        resolve(name)


# Options


def scaled(prompts, completions, answer, *, scale, offset=0.0, **columns):
    return [scale * float(a) + offset for a in answer]


def named(completions, answer, times=1, **kwargs):
    return [times * float(a) for a in answer]


def keyword_only(*, prompts, completions, answer):
    return [float(a) for a in answer]


async def slow(prompts, completions, *, value=1.0, **columns):
    return [value] * len(completions)


class Instance:
    async def __call__(self, prompts, completions, *, value=1.0, **columns):
        return [value] * len(completions)


instance = Instance()


def total(spec, **columns):
    columns = {'answer': ['1', '2'], **columns}
    arguments = {'prompts': ['p', 'q'], 'completions': ['c', 'd'], 'columns': columns}
    return score(*build(spec), **arguments).total.tolist()


def test_build_binds_options():
    functions, weights = build(
        {f'{HERE}:scaled': {'weight': 2, 'scale': 3}, 'chain_format': 0.5, f'{HERE}:named': 1}
    )
    assert weights == {f'{HERE}:scaled': 2.0, 'chain_format': 0.5, f'{HERE}:named': 1.0}
    assert list(functions) == list(weights)
    assert functions['chain_format'] is resolve('chain_format')
    assert total({f'{HERE}:scaled': {'weight': 2, 'scale': 3}}) == [6, 12]
    assert total({f'{HERE}:scaled': {'weight': 2, 'scale': 3, 'offset': 1}}) == [8, 14]
    assert total({f'{HERE}:named': {'weight': 1, 'times': 5}}) == [5, 10]
    assert total({f'{HERE}:keyword_only': 1}) == [1, 2]


def test_functions_under_names_of_their_own():
    spec = {
        'path': {'function': f'{HERE}:scaled', 'weight': 2, 'scale': 3},
        'built in': {'function': 'chain_format', 'weight': 1},
        'object': {'function': named, 'weight': 0.5, 'times': 4},
    }
    functions, weights = build(spec)
    assert list(functions) == list(spec)
    assert functions['built in'] is resolve('chain_format')
    assert weights == {'path': 2.0, 'built in': 1.0, 'object': 0.5}
    assert total(spec) == [2 * 3 + 0.5 * 4, 2 * 6 + 0.5 * 8]


def test_numbers_of_numpy_are_weights():
    assert build({'chain_format': np.float32(0.5)})[1] == {'chain_format': 0.5}
    assert build({'chain_format': np.int64(2)})[1] == {'chain_format': 2.0}


def test_build_accepts_a_config_dict():
    spec = ConfigDict({f'{HERE}:scaled': {'weight': 2, 'scale': 3}, 'chain_format': 1.0})
    assert total(spec) == [6, 12]


@pytest.mark.parametrize('name', ['slow', 'instance'])
def test_build_keeps_async_functions_async(name):
    assert total({f'{HERE}:{name}': 1}) == [1, 1]
    assert total({f'{HERE}:{name}': {'weight': 1, 'value': 4.0}}) == [4, 4]


def test_an_option_takes_precedence_over_a_column_of_its_name():
    columns = {'scale': ['x', 'y'], 'offset': ['x', 'y'], 'times': [9, 9]}
    assert total({f'{HERE}:scaled': {'weight': 1, 'scale': 3}}, **columns) == [3, 6]
    assert total({f'{HERE}:named': {'weight': 1, 'times': 5}}, times=[9, 9]) == [5, 10]


@pytest.mark.parametrize(
    ('spec', 'message'),
    [
        ({}, 'grpo.rewards is empty: name at least one'),
        ({'chain_format': '1'}, "grpo.rewards.chain_format='1': a weight is a finite number"),
        ({'chain_format': True}, 'grpo.rewards.chain_format=True: a weight is a finite number'),
        ({'chain_format': {'weight': False}}, 'chain_format=False: a weight'),
        ({'chain_format': 10**400}, 'grpo.rewards.chain_format=1000.*: a weight is a finite'),
        ({'chain_format': -(10**5000)}, 'grpo.rewards.chain_format=.*: a weight is a finite'),
        ({'own': {'function': 3, 'weight': 1}}, 'own.function=3: give a name, a path or a func'),
        ({'own': {'function': 'chain_fromat', 'weight': 1}}, "did you mean 'chain_format'"),
        ({'chain_format': float('nan')}, 'grpo.rewards.chain_format=nan: a weight'),
        ({'chain_format': {'weight': None}}, 'chain_format=None: a weight'),
        ({'soft_overlong': {'max_tokens': 9}}, 'soft_overlong has no weight: add one'),
        ({'chain_fromat': 1}, "did you mean 'chain_format'"),
        ({'soft_overlong': 1}, "reward 'soft_overlong' needs the option 'max_tokens'"),
        (
            {'soft_overlong': {'weight': 1, 'max_tokens': 9}},
            "reward 'soft_overlong' needs the option 'cache_tokens'",
        ),
        (
            {'soft_overlong': {'weight': 1, 'max_token': 9}},
            "has no option 'max_token', did you mean 'max_tokens'",
        ),
        ({'repetition': {'weight': 1, 'completion_ids': []}}, "no option 'completion_ids'"),
        ({'chain_format': {'weight': 1, 'n': 2}}, "no option 'n': it has none"),
        ({f'{HERE}:scaled': 1}, "needs the option 'scale'"),
    ],
)
def test_build_errors(spec, message):
    with pytest.raises(RewardError, match=message):
        build(spec)
