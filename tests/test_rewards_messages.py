"""Rewards as published for other trainers: on texts and on messages, with what they may ask for.

The functions here have the signatures and the behavior of published ones, in words of our own.
"""

import functools
import math
import re

import pytest

from grpo_jax import rewards
from grpo_jax.rewards import RewardError, TrainerState, score

QUESTIONS = ['2+2?', '3+3?']
TEXTS = ['<think>\na\n</think>\n<answer>\n4\n</answer>', 'so so so so 5']
IDS = [[1, 2, 3, 4], [5, 5, 5, 5, 5, 5]]
CONVERSATIONS = [
    [{'role': 'system', 'content': 'S'}, {'role': 'user', 'content': text}] for text in QUESTIONS
]
COLUMNS = {'solution': ['4', '6'], 'level': [1, None]}


def run(function, *, messages=True, **options):
    arguments = {
        'prompts': [f'<user>{text}<assistant>' for text in QUESTIONS],
        'completions': TEXTS,
        'completion_ids': IDS,
        'columns': COLUMNS,
        'conversations': CONVERSATIONS if messages else None,
        **options,
    }
    return score({'f': function}, {'f': 1.0}, **arguments)


# Of messages: `completions[i][0]['content']`


def accuracy(
    completions: list[list[dict[str, str]]], solution: list[str], log_extra=None, **kwargs
):
    found = [re.search(r'<answer>\n(.*)\n</answer>', c[0]['content']) for c in completions]
    if log_extra is not None:
        log_extra('gold', list(solution))
        log_extra('found', [match and match[1] for match in found])
    return [
        float(match[1] == gold) if match else None
        for match, gold in zip(found, solution, strict=True)
    ]


def format_of_tags(completions, **kwargs):
    pattern = r'^<think>\n.*?\n</think>\n<answer>\n.*?\n</answer>$'
    return [1.0 if re.match(pattern, c[0]['content'], re.DOTALL) else 0.0 for c in completions]


def tag_count(completions, **kwargs) -> list[float]:
    tags = ('<think>\n', '\n</think>\n', '\n<answer>\n', '\n</answer>')
    return [sum(c[0]['content'].count(tag) == 1 for tag in tags) / 4 for c in completions]


def length_within_the_batch(completions, solution, **kwargs):
    lengths = [len(c[0]['content']) for c in completions]
    spread = max(lengths) - min(lengths)
    return [0.5 - (n - min(lengths)) / spread for n in lengths] if spread else [0.0] * len(lengths)


def cosine(max_len):
    def cosine_scaled_reward(completions, solution, **kwargs):
        return [
            0.75 + 0.25 * math.cos(min(len(c[0]['content']) / max_len, 1) * math.pi)
            for c in completions
        ]

    return cosine_scaled_reward


def repetition(ngram_size, max_penalty):
    def penalty(completions, **kwargs):
        values = []
        for completion in completions:
            words = completion[0]['content'].lower().split()
            grams = list(zip(*(words[i:] for i in range(ngram_size)), strict=False))
            values.append((1 - len(set(grams)) / len(grams)) * max_penalty if grams else 0.0)
        return values

    return penalty


class Overlong:
    """A callable object with a name, of token ids alone."""

    __name__ = 'overlong'

    def __init__(self, limit):
        self.limit = limit

    def __call__(self, completion_ids: list[list[int]], **kwargs) -> list[float]:
        return [min(0.0, (self.limit - len(ids)) / self.limit) for ids in completion_ids]


def of_prompts(prompts, completions, **kwargs):
    responses = [c[-1]['content'] for c in completions]
    asked = [p[-1]['content'] for p in prompts]
    return [float(q[0] in r) for q, r in zip(asked, responses, strict=True)]


# Of texts


def unique_characters(completions, **kwargs):
    return [len(set(text)) for text in completions]


def close_to_20(completions, **kwargs):
    return [-abs(20 - len(text)) for text in completions]


TEXT_LENGTHS = [len(text) for text in TEXTS]
OF_MESSAGES = [
    (accuracy, [1.0, None]),
    (format_of_tags, [1.0, 0.0]),
    (tag_count, [1.0, 0.0]),
    (length_within_the_batch, [-0.5, 0.5]),
    (cosine(20), [0.5, 0.75 + 0.25 * math.cos(13 / 20 * math.pi)]),
    (repetition(2, -1.0), [0.0, -0.5]),
    (of_prompts, [0.0, 0.0]),
]
OF_TEXTS = [
    (unique_characters, [len(set(text)) for text in TEXTS]),
    (close_to_20, [-abs(20 - length) for length in TEXT_LENGTHS]),
]


def expect(scores, values):
    numbers = [math.nan if value is None else value for value in values]
    assert scores.parts['f'].tolist() == pytest.approx(numbers, abs=1e-6, nan_ok=True)


@pytest.mark.parametrize(('function', 'values'), OF_MESSAGES)
def test_functions_of_messages(function, values):
    expect(run(function), values)
    expect(run(functools.partial(function)), values)


@pytest.mark.parametrize(('function', 'values'), [*OF_TEXTS, (Overlong(4), [0.0, -0.5])])
def test_functions_of_texts(function, values):
    expect(run(function, messages=False), values)


def test_functions_of_token_ids_take_both():
    expect(run(Overlong(4)), [0.0, -0.5])


def test_the_wrong_form_of_inputs_is_explained():
    with pytest.raises(RewardError, match=r"TypeError: string.*set data.reward_inputs='messages'"):
        run(accuracy, messages=False)

    def of_texts(completions, **kwargs):
        return [float(text.strip() == '4') for text in completions]

    with pytest.raises(RewardError, match=r"AttributeError: .*set data.reward_inputs='texts'"):
        run(of_texts)


def test_built_in_functions_get_texts():
    def right(prompts, completions, solution, **columns):
        return rewards.gsm8k_answer(prompts, completions, solution)

    expect(run(right), [1.0, 0.0])  # called with messages
    expect(run(rewards.think_format), [1.0, 0.0])
    expect(run(functools.partial(rewards.repetition, n=2)), [0.0, -0.8])
    opened = {'prompts': ['<think>'] * 2, 'completions': ['a</think><answer>4</answer>'] * 2}
    expect(run(rewards.think_format, **opened), [1.0, 1.0])  # sees the rendered prompt


def test_a_function_cannot_change_the_data():
    def vandal(prompts, completions, level, solution, nums, **columns):
        prompts[0][0]['content'] = completions[0][0]['content'] = 'x'
        nums[0].append(9)
        nums[1]['a'].clear()
        return [float(len(nums[0])), 0.0]

    nums = [[7, 7], {'a': [1]}]
    for _ in range(2):
        scores = run(vandal, columns={**COLUMNS, 'nums': nums})
        assert scores.total.tolist() == [3, 0]
    assert nums == [[7, 7], {'a': [1]}]
    assert CONVERSATIONS[0][0] == {'role': 'system', 'content': 'S'}


# What a function gets if it names it


def test_trainer_state_and_logs():
    def asks(completions, trainer_state, log_metric, log_extra, **columns):
        assert not {'trainer_state', 'log_metric'} & columns.keys()
        log_metric('mean_level', 0.5)
        log_metric('mean_level', 1.0)
        log_extra('step', [trainer_state.global_step] * 2)
        log_extra('object', [{1, 2}, math.nan])
        return [trainer_state.global_step / trainer_state.max_steps, trainer_state.epoch]

    scores = run(asks, trainer_state=TrainerState(5, 10, 0.25))
    assert scores.total.tolist() == [0.5, 0.25]
    assert scores.logs.metrics == {'mean_level': [0.5, 1.0]}
    assert scores.logs.extra == {'step': [5, 5], 'object': ['{1, 2}', 'nan']}
    assert rewards.statistics(scores)['mean_level'] == 0.75


def test_they_are_not_among_other_arguments():
    def nosy(completions, **columns):
        assert sorted(columns) == ['completion_ids', 'level', 'prompts', 'solution']
        return [0.0, 0.0]

    run(nosy)


@pytest.mark.parametrize(
    ('log', 'message'),
    [
        (lambda metric, extra: metric('x', math.inf), r"log_metric\('x', inf\): give a finite"),
        (lambda metric, extra: extra('x', [1]), r"log_extra\('x', …\) got 1 values for 2 comp"),
        (lambda metric, extra: extra('prompt', [1, 2]), r"log_extra\('prompt', …\): a field has"),
    ],
)
def test_wrong_logs(log, message):
    def logs(completions, log_metric, log_extra, **columns):
        log(log_metric, log_extra)
        return [0.0, 0.0]

    with pytest.raises(RewardError, match=rf"reward 'f', .*{message}"):
        run(logs)


def test_a_metric_of_a_taken_name():
    def logs(completions, log_metric, **columns):
        log_metric('rewards/f/mean', 1.0)
        return [0.0, 0.0]

    with pytest.raises(RewardError, match=r"log_metric\('rewards/f/mean', …\): a metric has this"):
        rewards.statistics(run(logs))


def test_logs_are_joined_and_selected():
    parts = [
        (rewards.Logs({'m': [1.0]}, {'a': [1, 2]}), 2),
        (rewards.Logs({'m': [2.0, 3.0], 'n': [4.0]}, {'b': [3]}), 1),
    ]
    joined = rewards.join_logs(parts)
    assert joined.metrics == {'m': [1.0, 2.0, 3.0], 'n': [4.0]}
    assert joined.extra == {'a': [1, 2, None], 'b': [None, None, 3]}
    assert joined.select([2, 0]).extra == {'a': [None, 1], 'b': [3, None]}
    assert joined.means() == {'m': 2.0, 'n': 4.0}
