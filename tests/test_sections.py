"""Functions and their paths as values of a config, however they are assigned, copied and saved."""

import copy
import functools
import json
import pickle
import re
import sys

import pytest

from grpo_jax import plugins, rewards
from grpo_jax.run import arguments, config, saved_config
from grpo_jax.run.defaults import FREE, at, defaults

PATH = 'my_package.my_module:my_reward'
HERE = 'test_sections'
TUPLES = (
    'eval.k', 'log.to', 'data.stops', 'data.visible_tokens', 'grpo.drop', 'grpo.record',
    'module_folders', 'model.unrotated_layers', 'model.window_layers', 'model.lora.targets',
)  # fmt: skip


def short(completions, **columns):
    return [float(len(text) < 3) for text in completions]


def scaled(completions, *, scale=1.0, **columns):
    return [scale] * len(completions)


instance = functools.partial(scaled, scale=2.0)


def everywhere(change):
    """The rewards of a config after a change, and of its copies and its saved text."""
    changed = defaults()
    change(changed)
    copies = [
        changed,
        copy.deepcopy(changed),
        pickle.loads(pickle.dumps(changed)),
        changed.copy_and_resolve_references(),
        saved_config.from_json(saved_config.to_json(changed)),
    ]
    values = [c.grpo.rewards.to_dict() for c in copies]
    assert all(value == values[0] for value in values)
    assert all(saved_config.to_json(c) == saved_config.to_json(changed) for c in copies)
    return values[0]


@pytest.mark.parametrize('value', [1.0, {'weight': 1.0, 'scale': 2, 'table': {'a.b': 1}}])
@pytest.mark.parametrize(
    'change',
    [
        lambda c, new: setattr(c.grpo, 'rewards', new),
        lambda c, new: c.grpo.__setitem__('rewards', new),
        lambda c, new: c.grpo.update(rewards=new),
        lambda c, new: c.update({'grpo': {'rewards': new}}),
        lambda c, new: c.grpo.rewards.update(new),
        lambda c, new: c.grpo.rewards.__setitem__(PATH, new[PATH]),
        lambda c, new: c.update_from_flattened_dict({'grpo.rewards': new}),
        lambda c, new: config.set_value(c, 'grpo.rewards', new),
    ],
)
def test_paths_with_dots(change, value):
    assert everywhere(lambda c: change(c, {PATH: value})) == {PATH: value}


def test_every_free_dictionary_takes_dots():
    for path in FREE:
        changed = defaults()
        config.set_value(changed, path, {'a.b:c': 1.0})
        assert at(copy.deepcopy(changed), path).to_dict() == {'a.b:c': 1.0}
        assert at(saved_config.from_json(saved_config.to_json(changed)), path)['a.b:c'] == 1.0


def test_assigning_replaces_the_earlier_functions():
    def change(c):
        c.grpo.rewards = {'math_answer': 1.0}
        c.grpo.rewards = {PATH: 2.0}

    assert everywhere(change) == {PATH: 2.0}


@pytest.mark.parametrize(
    ('value', 'expected'),
    [
        (short, {f'{HERE}:short': 1.0}),
        ({short: 2.0}, {f'{HERE}:short': 2.0}),
        (
            [short, 'math_answer', scaled],
            {f'{HERE}:short': 1.0, 'math_answer': 1.0, f'{HERE}:scaled': 1.0},
        ),
        (
            {'twice': {'function': scaled, 'weight': 0.5, 'scale': 2.0}},
            {'twice': {'function': f'{HERE}:scaled', 'weight': 0.5, 'scale': 2.0}},
        ),
        ({'short one': short}, {'short one': {'function': f'{HERE}:short', 'weight': 1.0}}),
    ],
)
def test_functions_become_their_paths(value, expected):
    assert everywhere(lambda c: setattr(c.grpo, 'rewards', value)) == expected
    functions, weights = rewards.build(expected)
    arguments_ = {'prompts': ['p'], 'completions': ['c'], 'columns': {'answer': ['1']}}
    total = rewards.score(functions, weights, **arguments_).total
    assert list(functions) == list(expected)
    assert total.shape == (1,)


def test_functions_in_the_place_of_paths():
    changed = defaults()
    changed.eval.correct = short
    changed.grpo.algorithm.loss = short
    changed.grpo.optimizer.name = short
    assert changed.eval.correct == changed.grpo.algorithm.loss == f'{HERE}:short'
    assert changed.grpo.optimizer.name == f'{HERE}:short'
    assert json.loads(saved_config.to_json(changed))['eval']['correct'] == f'{HERE}:short'


@pytest.mark.parametrize('key', TUPLES)
def test_a_tuple_may_be_given_as_one_value(key):
    """In a config file as on the command line."""
    value = 4 if key == 'eval.k' or key.endswith('_layers') else 'wandb'
    section, _, name = key.rpartition('.')
    for change in (
        lambda c: setattr(at(c, section) if section else c, name, value),
        lambda c: (at(c, section) if section else c).update({name: value}),
        lambda c: config.set_value(c, key, value),
        lambda c: arguments._change(c, key, str(value)),
    ):
        changed = defaults()
        change(changed)
        assert at(changed, key) == (value,)
        assert saved_config.from_json(saved_config.to_json(changed)) == changed
        set_again = [value, value]
        config.set_value(changed, key, set_again)
        assert at(changed, key) == (value, value)
        with pytest.raises(ValueError, match='give a value of type tuple'):
            config.set_value(changed, key, {'a': 1})


def test_every_key_with_several_values_is_among_them():
    values = config.flatten(defaults())
    assert {key for key in values if type(values[key]) is tuple} == {*TUPLES} - {
        'data.visible_tokens'
    }


def test_a_function_in_the_place_of_a_tuple():
    changed = defaults()
    changed.log.to = short
    assert changed.log.to == (f'{HERE}:short',)


@pytest.mark.parametrize(
    ('key', 'value', 'message'),
    [
        ('grpo.rewards', PATH, f'of type dictionary, such as {{{PATH!r}: 1.0}}'),
        ('grpo.step_rewards', PATH, f'of type dictionary, such as {{{PATH!r}: 1.0}}'),
        ('grpo.algorithm', 'dapo', "methods.apply(config, 'dapo') sets its options"),
        ('grpo.algorithm', 'trl', "methods.apply(config, 'trl') sets its options"),
        ('data.options', 'folder', 'give a value of type dictionary'),
    ],
)
def test_a_text_in_the_place_of_a_dictionary(key, value, message):
    section, _, name = key.rpartition('.')
    for change in (
        lambda c: setattr(at(c, section), name, value),
        lambda c: config.set_value(c, key, value),
        lambda c: arguments._change(c, key, value),
    ):
        with pytest.raises((TypeError, ValueError), match=re.escape(message)) as error:
            change(defaults())
        assert str(error.value).endswith(message)


def local():
    def inner(completions, **columns):
        return [0.0] * len(completions)

    return inner


@pytest.mark.parametrize(
    'function', [lambda **_: [0.0], local(), functools.partial(short), instance]
)
@pytest.mark.parametrize('wrap', [lambda f: f, lambda f: [f], lambda f: {'a': {'function': f}}])
def test_functions_without_a_path(function, wrap):
    with pytest.raises(plugins.PluginError, match=r'cannot be saved .*define it at the top level'):
        defaults().grpo.rewards = wrap(function)
    with pytest.raises(plugins.PluginError, match='cannot be saved with the run'):
        defaults().eval.correct = function


def test_two_functions_of_one_name():
    with pytest.raises(ValueError, match=r'grpo.rewards=.* names a function twice'):
        defaults().grpo.rewards = [short, short]


def test_a_name_of_its_own_is_found_by_path():
    spec = {'mine': {'function': PATH, 'weight': 1.0}, 'math_answer': 1.0}
    assert rewards.name_in(spec, PATH) == 'mine'
    assert rewards.name_in(spec, 'math_answer') == 'math_answer'


# Files and folders


CONFIG = """
from grpo_jax.run import config as grpo_config

def mine(completions, **columns):
    return [float(len(text)) for text in completions]

def get_config():
    config = grpo_config.defaults()
    config.grpo.rewards = {'beside:bonus': 1.0, './beside.py:bonus': 2.0, 'mine': mine}
    config.eval.correct = mine
    return config
"""


@pytest.mark.parametrize('argument', [[], ["--config.grpo.rewards={'beside:bonus': 3.0}"]])
def test_a_module_beside_the_config_is_found_from_any_folder(tmp_path, monkeypatch, argument):
    (tmp_path / 'exp').mkdir()
    (tmp_path / 'other').mkdir()
    (tmp_path / 'exp' / 'config.py').write_text(CONFIG)
    (tmp_path / 'exp' / 'beside.py').write_text('def bonus(completions, **_):\n    return [7.0]\n')
    monkeypatch.chdir(tmp_path)
    read, _ = arguments.parse(['--config=exp/config.py', '--workdir=w', *argument])
    assert read.module_folders[0] == str(tmp_path / 'exp')
    assert read.eval.correct == './config.py:mine'
    text = saved_config.to_json(read)
    monkeypatch.chdir(tmp_path / 'other')
    plugins.set_folders([])
    again = saved_config.from_json(text)
    plugins.set_folders(again.module_folders)
    functions, weights = rewards.build(again.grpo.rewards)
    scores = rewards.score(functions, weights, prompts=['p'], completions=['cc'], columns={})
    assert scores.total.tolist() == ([21] if argument else [7 + 14 + 2])
    assert rewards.resolve(again.eval.correct)(completions=['abc']) == [3.0]
    assert not {'beside', 'config'} & set(sys.modules)
    moved = again.copy_and_resolve_references()
    moved.module_folders = ('elsewhere',)
    assert not saved_config.differences(moved, again)


def test_a_config_that_exits(tmp_path):
    (tmp_path / 'config.py').write_text('import sys\nsys.exit(0)\n')
    with pytest.raises(ValueError, match=r'config.py: SystemExit: 0: fix the file'):
        config.load(tmp_path / 'config.py')
