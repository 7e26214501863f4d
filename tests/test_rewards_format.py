"""Rewards for form: hand cases."""

import pytest
from reward_cases import HOSTILE, PROMPT, RIGHT, one

from grpo_jax.rewards import chain_format, hash_format, tag_count, think_format


@pytest.mark.parametrize(
    ('completion', 'expected'),
    [
        (RIGHT, 1.0),
        ('1+1=3', 1.0),  # the form only
        (f' {RIGHT}\n', 1.0),
        ('-4--3=-1', 1.0),
        (RIGHT + ';', 0.0),
        ('1+1=2; 2+2=4', 0.0),
        ('1+1=02', 0.0),
        ('1+1=-0', 0.0),
        ('1+1', 0.0),
        ('1+1+1=3', 0.0),
        ('1/1=1', 0.0),
        ('', 0.0),
    ],
)
def test_chain_format(completion, expected):
    assert one(chain_format, completion) == expected


@pytest.mark.parametrize(
    ('completion', 'expected'),
    [
        ('9*2=18\n#### 18', 1.0),
        ('#### -1,000\n', 1.0),
        ('x #### 18', 0.0),
        ('####18', 0.0),
        ('##### 18', 0.0),
        ('#### 18 eggs', 0.0),
        ('#### 18\nmore', 0.0),
        ('#### 17\n#### 18', 0.0),
        ('18', 0.0),
        ('', 0.0),
    ],
)
def test_hash_format(completion, expected):
    assert one(hash_format, completion) == expected


@pytest.mark.parametrize(
    ('completion', 'expected'),
    [
        ('<think>hm</think><answer>18</answer>', 1.0),
        (' <think>\nhm\n</think>\n<answer>\n18\n</answer>\n', 1.0),
        ('<think>hm</think> so <answer>18</answer>', 0.0),
        ('<think>hm</think><answer>18</answer>!', 0.0),
        ('Well <think>hm</think><answer>18</answer>', 0.0),
        ('<think> </think><answer>18</answer>', 0.0),
        ('<think>hm</think><answer></answer>', 0.0),
        ('<think>hm</think>', 0.0),
        ('<think>a</think><think>b</think><answer>18</answer>', 0.0),
        ('<answer>18</answer><think>hm</think>', 0.0),
        ('<think>hm<answer>18</answer></think>', 0.0),
        ('<think>hm<answer></think>18</answer>', 0.0),
        ('', 0.0),
    ],
)
def test_think_format(completion, expected):
    assert one(think_format, completion, 'Q') == expected


def test_think_format_after_a_prompt_that_opens_the_thought():
    assert one(think_format, 'hm</think><answer>18</answer>', 'Assistant: <think>\n') == 1.0
    assert one(think_format, '<think>hm</think><answer>18</answer>', '<think>\n') == 0.0


@pytest.mark.parametrize(
    ('completion', 'expected'),
    [
        ('<think>hm</think><answer>18</answer>', 1.0),
        ('<think>hm</think> so <answer>18</answer>!', 1.0),
        ('<think>hm</think><answer>18', 0.75),
        ('<think>hm</think>', 0.5),
        ('<think>a</think><think>b</think><answer>18</answer>', 0.5),
        ('<answer>', 0.25),
        ('18', 0.0),
    ],
)
def test_tag_count(completion, expected):
    assert one(tag_count, completion, 'Q') == expected


def test_tag_count_after_a_prompt_that_opens_the_thought():
    assert one(tag_count, 'hm</think><answer>18</answer>', 'Assistant: <think>\n') == 1.0


@pytest.mark.parametrize('text', [text for _, text in HOSTILE], ids=[name for name, _ in HOSTILE])
def test_hostile_text_ends(text):
    for reward in (chain_format, hash_format, think_format, tag_count):
        assert 0 <= one(reward, text, PROMPT) <= 1
        one(reward, RIGHT, text)
