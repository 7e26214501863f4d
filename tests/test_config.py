"""The config: every key is used, and dictionaries with keys of their own."""

import json
from collections.abc import Mapping

import pytest
import runs
from ml_collections import ConfigDict

from grpo_jax.run import config as grpo_config
from grpo_jax.run import config_checks

# Every key is read


class Recorder(Mapping, ConfigDict):
    """A config that records which values are taken from it, by attribute, item or `**`."""

    def __init__(self, config, seen, prefix=''):
        for name, value in (('_config', config), ('_seen', seen), ('_prefix', prefix)):
            object.__setattr__(self, name, value)

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
        """Records a section; to save the whole config is not to use it."""
        values = self._config.to_dict()
        if self._prefix:
            self._seen.update(leaves(values, self._prefix))
        return values


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


# Dictionaries with keys of their own


REWARDS = {'my_package.my_module:my_reward': 1.0, 'chain_format': {'weight': 0.5}}


def test_keys_may_have_dots_where_they_are_free():
    config = grpo_config.defaults()
    config.grpo.rewards = REWARDS
    config.grpo.step_rewards['a.b:c'] = 2.0
    config.grpo.update(rewards={'a.b:c': 3.0})
    assert config.is_locked
    assert config.to_dict()['grpo']['rewards'] == REWARDS | {'a.b:c': 3.0}
    assert dict(config.grpo.step_rewards) == {'a.b:c': 2.0}
    assert grpo_config.flatten(config)['grpo.step_rewards']['a.b:c'] == 2.0
    with pytest.raises(ValueError, match='does not accept dots'):
        config.grpo['rewards.chain'] = 1.0


def test_set_value():
    config = grpo_config.defaults()
    grpo_config.set_value(config, 'seed', 4)
    grpo_config.set_value(config, 'eval.k', [1, 2])
    grpo_config.set_value(config, 'grpo.compute.microbatch', 4)
    grpo_config.set_value(config, 'grpo.rewards', REWARDS)
    assert (config.seed, config.eval.k, config.grpo.compute.microbatch) == (4, (1, 2), 4)
    assert config.grpo.rewards.to_dict() == REWARDS
    for path, value, kind in (
        ('grpo.compute.microbatch', 'many', 'int'),
        ('grpo.rewards', 3, 'ConfigDict'),
        ('grpo.algorithm.beta', 'x', 'float'),
    ):
        with pytest.raises(ValueError, match=f'^{path}={value!r}: give a value of type {kind}$'):
            grpo_config.set_value(config, path, value)
    grpo_config.set_value(config, 'grpo.compute.microbatch', None)
    assert config.grpo.compute.microbatch is None


def test_check_keys():
    config = grpo_config.defaults()
    config_checks.check_keys(config)
    with config.unlocked():
        config.grpo.stepz = 3
    with pytest.raises(ValueError, match=r"unknown config key 'grpo.stepz': did .* 'grpo.steps'\?"):
        config_checks.check_keys(config)
    with config.unlocked():
        del config.grpo.stepz
        del config.grpo.steps
    with pytest.raises(ValueError, match=r"config key 'grpo.steps' is missing: start from"):
        config_checks.check_keys(config)


def test_differing_defaults():
    config = grpo_config.defaults()
    config.critic.optimizer.options = {'a': 1}
    config.reward_model.steps = 3
    sections = {'critic': 'no critic', 'reward_model.steps': 'no model', 'grpo.optimizer': 'none'}
    assert list(config_checks.differing_defaults(config, sections)) == [
        ("critic.optimizer.options={'a': 1}", 'no critic'),
        ('reward_model.steps=3', 'no model'),
    ]
