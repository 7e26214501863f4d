"""A run goes on with the data, the tokenizer and the rewards that it had, or says what changed."""

import json
import re
import shutil

import folders
import numpy as np
import pytest
import runs

from grpo_jax import plugins
from grpo_jax.run import inputs
from grpo_jax.run.errors import ConfigError

ROWS = [{'question': f'{i}+1=', 'answer': i + 1, 'tags': ['é', None]} for i in range(5)]
STEPS = {'sft': [4], 'grpo': [2, 6]}


@pytest.fixture
def rewards(tmp_path):
    """A file of rewards, and a config that names one of them."""
    file = tmp_path / 'mine.py'
    file.write_text('LIMIT = 1\n\ndef right(completions, **_):\n    return [LIMIT]\n')
    plugins.set_folders([tmp_path])
    config = runs.get_config()
    config.grpo.rewards = {'short': {'weight': 1.0, 'function': './mine.py:right'}}
    yield file, config
    plugins.set_folders([])


def digest(config, *, tokenizer=None, training=ROWS, heldout=ROWS[:2]):
    return inputs.digest_inputs(config, tokenizer or folders.chat_tokenizer(), training, heldout)


def refused(workdir, now):
    """What is told of each input that has changed, without the digests."""
    with pytest.raises(ConfigError) as error:
        inputs.check_inputs(now, workdir, override=False)
    inputs.check_inputs(now, workdir, override=True)
    whole = r'(.*) has changed since the run in .* was started \((.*)digest [0-9a-f]{16} there, '
    whole += r'[0-9a-f]{16} here\): restore it, use another --workdir, or .* by --override'
    return dict(re.fullmatch(whole, text).groups() for text in error.value.problems)


def test_what_an_environment_reads_is_an_input(tmp_path, rewards):
    file, config = rewards
    file.write_text(file.read_text() + '\nclass Game:\n    size = 1\n')
    (tmp_path / 'corpus.jsonl').write_text('{"text": "a"}\n')
    config.environment.name = './mine.py:Game'
    config.environment.options = {'functions': {'./mine.py:Game': {'corpus': 'corpus.jsonl'}}}
    inputs.keep_inputs(digest(config), tmp_path, {})
    inputs.check_inputs(digest(config), tmp_path, override=False)
    file.write_text(file.read_text().replace('size = 1', 'size = 2'))
    (tmp_path / 'corpus.jsonl').write_text('{"text": "b"}\n')
    assert refused(tmp_path, digest(config)) == {
        "the code of environment.name='./mine.py:Game'": '',
        "the code of environment.options='./mine.py:Game'": '',
        "the file 'corpus.jsonl' of environment.options": '',
    }


def test_the_same_inputs_are_not_refused(tmp_path, rewards):
    file, config = rewards
    inputs.check_inputs(digest(config), tmp_path, override=False)  # an earlier version kept none
    inputs.keep_inputs(digest(config), tmp_path, {})
    tokenizer = folders.chat_tokenizer()
    tokenizer(['a', 'bc'], padding=True, truncation=True, max_length=4)
    file.write_text('# a comment\n' + file.read_text())
    config.grpo.steps = 50
    inputs.check_inputs(digest(config, tokenizer=tokenizer), tmp_path, override=False)
    arrays = [row | {'answer': np.int64(row['answer'])} for row in ROWS]
    inputs.check_inputs(digest(config, training=arrays), tmp_path, override=False)
    inputs.check_inputs(digest(config, heldout=None), tmp_path, override=False)
    assert len(digest(config).digests) == 2 + 3 + 2  # of the reward and eval.correct


@pytest.mark.parametrize(
    ('changed', 'told'),
    [
        ([*ROWS[:3], ROWS[3] | {'answer': 0}, ROWS[4]], 'row 3 from 0 is the first that differs, '),
        ([*ROWS[:3], ROWS[4], ROWS[3]], 'row 3 from 0 is the first that differs, '),
        ([{'question': 'é'}, *ROWS[1:]], 'row 0 from 0 is the first that differs, '),
        (ROWS[:-1], ''),
        ([*ROWS, {}], ''),
    ],
)
def test_rows(tmp_path, rewards, changed, told):
    _, config = rewards
    inputs.keep_inputs(digest(config), tmp_path, {})
    told += f'5 rows there, {len(changed)} here, '
    assert refused(tmp_path, digest(config, training=changed)) == {"data.train_split='train'": told}
    found = refused(tmp_path, digest(config, training=changed, heldout=ROWS[1:3]))
    assert found.keys() == {"data.train_split='train'", "data.heldout_split='test'"}


def without_a_token(tokenizer):
    tokenizer.add_tokens(['<new>'])


def another_template(tokenizer):
    tokenizer.chat_template = folders.CHATML.replace('assistant', 'Assistant')


def another_end(tokenizer):
    tokenizer.eos_token = '<|im_end|>'


@pytest.mark.parametrize(
    ('change', 'name'),
    [
        (without_a_token, 'the tokens and merges of the tokenizer'),
        (another_template, 'the chat template of the tokenizer'),
        (another_end, 'the special tokens of the tokenizer'),
    ],
)
def test_tokenizers(tmp_path, rewards, change, name):
    _, config = rewards
    inputs.keep_inputs(digest(config), tmp_path, {})
    tokenizer = folders.chat_tokenizer()
    change(tokenizer)
    assert refused(tmp_path, digest(config, tokenizer=tokenizer)) == {name: ''}


def test_code(tmp_path, rewards):
    file, config = rewards
    inputs.keep_inputs(digest(config), tmp_path, {})
    file.write_text(file.read_text().replace('LIMIT = 1', 'LIMIT = 2'))
    name = "the code of grpo.rewards='./mine.py:right'"
    now = digest(config)
    assert refused(tmp_path, now) == {name: ''}
    before = json.loads((tmp_path / inputs.FILE).read_text())['digests'][name]
    inputs.keep_inputs(now, tmp_path, STEPS)
    (record,) = runs.lines(tmp_path / 'changes.jsonl')
    assert record == {
        'stage': 'grpo',
        'step': 6,
        'changes': {name: {'from': before, 'to': now.digests[name]}},
    }
    inputs.check_inputs(now, tmp_path, override=False)
    inputs.keep_inputs(now, tmp_path, STEPS)
    assert len(runs.lines(tmp_path / 'changes.jsonl')) == 1


@pytest.mark.parametrize(
    'text', ['', '[1]', '{"digests": {}}', '{"digests": {}, "a": 1}', '{"digests": 1, "rows": {}}']
)
def test_a_damaged_file_is_named(tmp_path, rewards, text):
    (tmp_path / inputs.FILE).write_text(text)
    message = r'(?s)inputs\.json cannot be read .*: restore it, or remove'
    with pytest.raises(ValueError, match=message):
        inputs.check_inputs(digest(rewards[1]), tmp_path, override=False)


def test_a_run_keeps_its_inputs_and_is_not_resumed_with_others(finished, tmp_path):
    shutil.copytree(finished, tmp_path / 'run')
    path = tmp_path / 'run' / inputs.FILE
    kept = json.loads(path.read_text())
    rewards = {f'the code of grpo.rewards={f"runs:{name}"!r}' for name in ('lucky', 'bonus')}
    assert rewards < kept['digests'].keys()
    assert "the code of eval.correct='runs:lucky'" in kept['digests']
    config = runs.get_config()
    config.grpo.steps = 9
    kept['digests']["data.train_split='train'"] = 'another'
    path.write_text(json.dumps(kept))
    with pytest.raises(ConfigError, match=r"^data.train_split='train' has changed since the run"):
        runs.train(config, tmp_path / 'run', extend=True)
