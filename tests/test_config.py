"""The config: every key is read, what is wrong is one line, what is saved comes back."""

import json
import pathlib
from collections.abc import Mapping

import pytest
import runs
from ml_collections import ConfigDict

from grpo_jax import config as grpo_config

ROOT = pathlib.Path(__file__).parents[1]
SMOKE = f'--config={ROOT}/configs/smoke.py'


# Every key is read


class Recorder(Mapping):
    """A config that notes which values are taken from it, by attribute, item or `**`."""

    def __init__(self, config, seen, prefix=''):
        self._config, self._seen, self._prefix = config, seen, prefix

    def __getitem__(self, name):
        value, path = self._config[name], self._prefix + name
        if isinstance(value, ConfigDict):
            return Recorder(value, self._seen, f'{path}.')
        self._seen.add(path)
        return value

    __getattr__ = __getitem__

    def __iter__(self):
        return iter(self._config)

    def __len__(self):
        return len(self._config)

    def to_dict(self):
        """To save the config is not to read it."""
        return self._config.to_dict()


def leaves(tree, prefix=''):
    for name, value in tree.items():
        if isinstance(value, dict):
            yield from leaves(value, f'{prefix}{name}.')
        else:
            yield prefix + name


def test_the_recorder_notes_values_only():
    config = ConfigDict({'a': {'x': 1, 'y': 2, 'z': 3}, 'b': {'u': 1, 'v': 2}, 'c': 3, 'd': {}})
    seen = set()
    recorder = Recorder(config, seen)
    assert json.dumps(recorder.to_dict())
    assert (len(recorder.b), bool(recorder.d), list(recorder)) == (2, False, ['a', 'b', 'c', 'd'])
    assert not seen
    assert (recorder.a.x, recorder['a']['z'], dict(**recorder.b)) == (1, 3, {'u': 1, 'v': 2})
    assert seen == {'a.x', 'a.z', 'b.u', 'b.v'}
    assert sorted({*leaves(config.to_dict())} - seen) == ['a.y', 'c']


def test_every_key_is_read(tmp_path):
    config = runs.get_config()
    config.log.completions = 3
    with config.unlocked():
        config.log.left_alone = 1
    seen = set()
    runs.train(Recorder(config, seen), tmp_path)
    completions = runs.lines(tmp_path / 'completions.jsonl')
    assert [row['step'] for row in completions] == [step for step in range(8) for _ in range(3)]
    other = runs.get_config()  # with a critic and a reward model
    other.grpo.update(steps=2, rewards={})
    other.grpo.algorithm.update(baseline='critic', scale='none', kl='k1', kl_place='reward')
    other.reward_model.update(weight=1.0, steps=1, batch_size=2, group_size=2, microbatch=2)
    runs.train(Recorder(other, seen), tmp_path / 'other')
    unread = {*leaves(config.to_dict())} - seen
    assert unread == {'log.left_alone'}


# Text and back


def test_json_and_back():
    config = runs.get_config()
    config.grpo.optimizer.eps = 1e-11
    text = grpo_config.to_json(config)
    again = grpo_config.from_json(text)
    assert again.to_dict() == config.to_dict()
    assert again.is_locked
    assert grpo_config.to_json(again) == text
    assert text.isascii()
    assert json.loads(text)['grpo']['rewards'] == {
        'runs:lucky': 1.0,
        'chain_format': 0.5,
        'runs:bonus': 1.0,
    }


def test_from_json_refuses_other_keys():
    saved = json.loads(grpo_config.to_json(grpo_config.defaults()))
    saved['grpo']['stepz'] = saved['grpo'].pop('steps')
    with pytest.raises(ValueError, match=r"unknown config key 'grpo.stepz': did .* 'grpo.steps'\?"):
        grpo_config.from_json(json.dumps(saved))
    del saved['grpo']['stepz']
    with pytest.raises(ValueError, match=r"config key 'grpo.steps' is missing: start from"):
        grpo_config.from_json(json.dumps(saved))


def test_differing_keys():
    config = runs.get_config()
    saved = grpo_config.to_json(config)
    assert grpo_config.differing_keys(config, saved) == []
    config.seed = 1
    config.eval.k = (1, 2)
    config.grpo.rewards = {'runs:lucky': 2.0, 'chain_format': 0.5, 'runs:bonus': 1.0, 'x:y': 1.0}
    assert grpo_config.differing_keys(config, saved) == [
        'eval.k (there [1, 4], here [1, 2])',
        'grpo.rewards.runs:lucky (there 1.0, here 2.0)',
        'grpo.rewards.x:y (there None, here 1.0)',
        'seed (there 0, here 1)',
    ]
