"""What reward functions are given and what is found before training, from config to grader."""

import json
import logging

import folders
import numpy as np
import pytest
import runs

from grpo_jax.rewards import RewardError
from grpo_jax.run import graders, heldout, problems, setup
from grpo_jax.run.methods import algorithm_of

HERE = 'test_graders'


def needs_a_column(completions, missing, **columns):
    return [0.0] * len(completions)


def bonus(completions, **columns):
    return [0.0] * len(completions)


def steps(completions, missing, **columns):
    return [[] for _ in completions]


def prepared(tmp_path, rows, rewards=None, **data):
    """The setup and the training problems of a config with these rows."""
    lines = '\n'.join(map(json.dumps, rows))
    (tmp_path / 'train.jsonl').write_text(lines)
    config = runs.get_config()
    config.data.name, config.data.options = 'jsonl', {'folder': str(tmp_path)}
    config.data.update(cache_dir=str(tmp_path / 'cache'), prompt_length=60, **data)
    config.grpo.rewards = rewards or {f'{HERE}:bonus': 1.0}
    made = setup.prepare(config, tmp_path)
    return made, problems.training_problems(made, None)


ROWS = [{'question': 'a?', 'answer': 3}, {'question': 'b?', 'answer': 'n/a'}]


def make(setup_and_problems):
    made, training = setup_and_problems
    return graders.make_grader(made, training, algorithm_of(made.config))


def test_a_missing_column_is_found_first(tmp_path):
    message = f"reward '{HERE}:needs_a_column' needs 'missing', .*it has answer, question"
    with pytest.raises(RewardError, match=message):
        make(prepared(tmp_path, ROWS, {f'{HERE}:needs_a_column': 1.0}))
    made, training = prepared(tmp_path, ROWS)
    made.config.eval.correct = f'{HERE}:needs_a_column'
    with pytest.raises(RewardError, match=r"reward 'eval\.correct' needs 'missing'"):
        heldout.make_evaluator(made, training)
    made.config.grpo.algorithm.supervision = 'process'
    made.config.grpo.step_rewards = {f'{HERE}:steps': 1.0}
    with pytest.raises(RewardError, match=f"step rewards '{HERE}:steps' needs 'missing'"):
        make((made, training))


def test_unreadable_references_are_found_first(tmp_path, caplog):
    message = r"reward 'gsm8k_answer' cannot read the reference of 1 rows, first row 1 \(from 0\)"
    with pytest.raises(RewardError, match=f"{message}, answer 'n/a': fix these rows"):
        make(prepared(tmp_path, ROWS, {'gsm8k_answer': 1.0}))
    with pytest.raises(
        RewardError, match=r"reward 'exact_answer', row 1 \(from 0\): .*'n/a' is not"
    ):
        make(prepared(tmp_path, ROWS, {'exact_answer': 1.0}))
    with caplog.at_level(logging.WARNING):
        make(prepared(tmp_path, ROWS, {'gsm8k_answer': 1.0, f'{HERE}:bonus': 0.1}))
    assert 'first row 1 (from 0)' in caplog.text
    assert 'it does not apply to them' in caplog.text
    make(prepared(tmp_path, ROWS[:1], {'gsm8k_answer': 1.0}))


def test_what_reward_functions_get(tmp_path):
    _, training = prepared(tmp_path, ROWS)
    assert training.conversations is None
    for inputs, expected in (
        ('texts', None),
        ('messages', [[{'role': 'user', 'content': row['question']}] for row in ROWS]),
    ):
        _, training = prepared(tmp_path, ROWS, reward_inputs=inputs)
        assert training.conversations == expected
    with pytest.raises(ValueError, match=r"data\.reward_inputs='text' is unknown: use one of auto"):
        prepared(tmp_path, ROWS, reward_inputs='text')


def test_conversations_of_a_data_set(tmp_path):
    asked = [{'role': 'user', 'content': 'a'}]
    rows = [{'messages': [*asked, {'role': 'assistant', 'content': 'b'}], 'answer': 3}]
    options = {'prompt': '{messages}', 'chat': True}
    tokenizer = folders.chat_tokenizer()
    tokenizer.save_pretrained(tmp_path / 'tokenizer')

    def conversations(**more):
        (tmp_path / 'train.jsonl').write_text('\n'.join(map(json.dumps, rows)))
        config = runs.get_config()
        config.tokenizer = str(tmp_path / 'tokenizer')
        config.data.name, config.data.options = 'jsonl', {'folder': str(tmp_path)}
        config.data.update(cache_dir=str(tmp_path / 'cache'), prompt_length=60, **options, **more)
        made = setup.prepare(config, tmp_path)
        return problems.training_problems(made, None)

    training = conversations()
    assert training.conversations == [asked]
    text = tokenizer.decode(training.table.tokens[0, : training.table.length[0]])
    assert text == '<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\n'
    assert conversations(reward_inputs='texts').conversations is None
    system = [{'role': 'system', 'content': 'S'}, *asked]
    assert conversations(system='S').conversations == [system]
    assert np.array_equal(training.table.index, [0])
