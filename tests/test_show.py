"""Completions of a step as text: what `grpo_jax.show` prints."""

import json

import pytest
import runs

from grpo_jax import show
from grpo_jax.run import saved_config
from grpo_jax.run.show import shown, visible


@pytest.fixture
def folder(tmp_path):
    """A run's folder with completions of two steps."""
    config = runs.get_config()
    config.grpo.group_size = 4
    (tmp_path / 'config.json').write_text(saved_config.to_json(config))
    write(tmp_path, *records())
    return tmp_path


def write(folder, *rows):
    (folder / 'completions.jsonl').write_text(''.join(json.dumps(row) + '\n' for row in rows))


def record(step, prompt, text, reward, **fields):
    part = {} if reward is None else {'right': reward}
    return {'stage': 'grpo', 'step': step, 'prompt': prompt, 'completion': text,
            'reward': reward, 'rewards': part, **fields}  # fmt: skip


def records():
    turns = [
        {'text': 'calculator(3 * 4)', 'calls': [['calculator', {'expression': '3 * 4'}, '']],
         'reply': '12', 'outcome': 'reply', 'seconds': 0.0123, 'cut': False},
        {'text': 'now(', 'calls': [{'name': '', 'arguments': {}, 'error': 'no `)`'}],
         'reply': 'error: no `)`', 'outcome': 'bad_call', 'seconds': 1.5, 'cut': True},
        {'text': '12', 'calls': [], 'reply': None, 'outcome': 'timeout', 'detail': 'too slow',
         'seconds': 0.0},
    ]  # fmt: skip
    return [
        record(6, 'old', 'x', 0.0),
        record(7, '3 *\t4?\n', ' a  b\n', 0.0),
        record(7, '3 *\t4?\n', 'all of it', 1.0, turns=turns, note='ok'),
        record(7, '3 *\t4?\n', 'none', None),
        record(7, '3 *\t4?\n', '\x1b[2J\ud800', 0.5),
        record(7, 'other', 'y', 0.25),
    ]


EXPECTED = """\
grpo, step 7, prompt 0
  | 3·*→\t4?↵
  |\x20

--- completion 1: reward 1 (right 1), advantage +1, note ok
  turn 1:
  | calculator(3·*·4)
  call: calculator(expression='3·*·4')
  reply (0.0123 s):
  < 12
  turn 2:
  | now(
  call: ?() error: no `)`
  reply (bad_call, cut, 1.5 s):
  < error:·no·`)`
  turn 3:
  | 12
  no reply (timeout, 0 s) too slow

--- completion 3: reward 0.5 (right 0.5), advantage +0
  | \\x1b[2J\\ud800

--- completion 0: reward 0 (right 0), advantage -1
  | ·a··b↵
  |\x20

--- completion 2: reward none
  | none
"""


def test_completions_are_shown_by_reward_with_all_that_is_known(folder, capsys, monkeypatch):
    monkeypatch.setattr('sys.argv', ['show', f'--workdir={folder}', '--prompt=0'])
    show.run()
    printed = capsys.readouterr().out.strip('\n') + '\n'
    assert printed.replace('+0.9998', '+1').replace('-0.9998', '-1') == EXPECTED


def test_all_prompts_of_the_newest_step_are_shown_once(folder):
    config = runs.get_config()
    config.grpo.group_size = 8
    text = '\n'.join(shown(config, str(folder)))
    assert [line for line in text.splitlines() if line.startswith('grpo')] == [
        'grpo, step 7, prompt 0', 'grpo, step 7, prompt 1',
    ]  # fmt: skip
    assert 'advantage' not in text  # of groups that are not there as a whole
    assert 'old' not in text
    assert 'old' in '\n'.join(shown(runs.get_config(), str(folder), step='6', stage='grpo'))


@pytest.mark.parametrize(
    ('options', 'message'),
    [
        ({'prompt': '2'}, r'^--prompt=2: step 7 of grpo has completions of 2 prompts'),
        ({'step': '5'}, r'^--step=5: completions.jsonl has the steps 6 to 7 of grpo'),
        ({'stage': 'sft'}, r'^--stage=sft: completions.jsonl has those of grpo'),
        ({'step': '-1'}, r'^--step=-1: give a whole number'),
        ({'prompt': 'x'}, r'^--prompt=x: give a whole number'),
    ],
)
def test_what_is_not_there_is_told(folder, options, message):
    with pytest.raises(ValueError, match=message):
        list(shown(runs.get_config(), str(folder), **options))


def test_files_that_hold_nothing_to_show(tmp_path):
    config = runs.get_config()
    with pytest.raises(ValueError, match='no such file: the run has sampled nothing yet'):
        list(shown(config, str(tmp_path)))
    write(tmp_path)
    with pytest.raises(ValueError, match='is empty: set log'):
        list(shown(config, str(tmp_path)))
    write(tmp_path, {'stage': 'grpo', 'step': 1})
    with pytest.raises(ValueError, match=r"line 1 has no 'prompt': restore the line"):
        list(shown(config, str(tmp_path)))


def test_white_space_is_visible():
    assert visible('a b\tc\n\r\u200b\u3000é') == 'a·b→\tc↵\n\\r\\u200b\\u3000é'
