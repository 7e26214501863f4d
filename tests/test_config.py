"""The config: every key is used, and dictionaries with keys of their own."""

import json
import pathlib
import re
from collections.abc import Mapping

import pytest
import runs
from ml_collections import ConfigDict

from grpo_jax.run import arguments, config_checks, config_problems, errors, suggestions
from grpo_jax.run import config as grpo_config

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
    config.module_folders = (str(pathlib.Path(runs.__file__).parent),)
    with config.unlocked():
        config.log.left_alone = 1
    seen = set()
    runs.train(Recorder(config, seen), tmp_path)
    completions = runs.lines(tmp_path / 'completions.jsonl')
    assert [row['step'] for row in completions] == [step for step in range(8) for _ in range(3)]
    other = runs.get_config()  # with a critic and a reward model
    other.module_folders = config.module_folders
    other.model.update(layers=1, qk_norm='')
    other.sft.steps = 0
    other.grpo.update(steps=2, rewards={})
    other.grpo.algorithm.update(inner_updates=1, entropy=False)
    other.grpo.algorithm.update(baseline='critic', scale='none', kl='k1', kl_place='reward')
    other.reward_model.update(weight=1.0, steps=1, batch_size=2, group_size=2, microbatch=2)
    other.environment.name = 'episode_tools:echo'
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
        ('grpo.rewards', 3, 'dictionary'),
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


# All problems at once


def write_config(folder, *lines):
    path = folder / 'mine.py'
    head = ('from grpo_jax.run.config import defaults', 'def get_config():', '  c = defaults()')
    path.write_text('\n'.join((*head, *(f'  {line}' for line in lines), '  return c')))
    return path


def test_a_config_file_with_several_wrong_keys(tmp_path):
    path = write_config(
        tmp_path,
        'c.grpo.stepz = 3',
        'c.gpro.algorithm.update(beta=1.0)',
        "c.grpo.steps = 'ten'",
        "c.eval.update(evry=2, correct='exact_answer')",
        "assert not hasattr(c, 'my_section') or True",
        'c.seed = c.sead',
        'c.num_generations = 4',
    )
    config, problems = grpo_config.read(path)
    assert config.eval.correct == 'exact_answer'
    assert problems == [
        f'--config={path}: {text}'
        for text in (
            "unknown config key 'grpo.stepz': did you mean 'grpo.steps'?",
            "unknown config key 'gpro': did you mean 'grpo'?",
            "config key 'grpo.steps' is 'ten': give a value of type int",
            "unknown config key 'eval.evry': did you mean 'eval.every'?",
            "unknown config key 'sead': did you mean 'seed'?",
            "unknown config key 'num_generations': did you mean 'grpo.group_size'?",
        )
    ]
    with pytest.raises(errors.ConfigError) as error:
        grpo_config.load(path)
    assert list(error.value.problems) == problems


def test_an_error_of_the_file_comes_after_the_wrong_keys(tmp_path):
    path = write_config(tmp_path, 'c.grpo.stepz = 3', 'from grpo_jax import preset',
                        "preset('dapo', clip_hihg=0.3)")  # fmt: skip
    config, problems = grpo_config.read(path)
    assert config is None
    assert len(problems) == 2
    assert "'grpo.stepz'" in problems[0]
    assert "'clip_hihg', did you mean 'clip_high'?" in problems[1]


def test_keys_outside_of_a_config_file():
    config = grpo_config.defaults()
    for action in (
        lambda: config.grpo.sampling.temperatur,
        lambda: setattr(config.grpo.sampling, 'temperatur', 1.0),
        lambda: config.grpo.sampling.update(temperatur=1.0),
    ):
        with pytest.raises(AttributeError) as error:
            action()
        assert str(error.value) == (
            "unknown config key 'grpo.sampling.temperatur': did you mean "
            "'grpo.sampling.temperature'?"
        )
    with pytest.raises(TypeError, match=r"^config key 'seed' is 'a': give a value of type int$"):
        config.seed = 'a'
    copy = config.copy_and_resolve_references()
    with pytest.raises(AttributeError, match=r"'grpo.algorithm.betta'"):
        copy.grpo.algorithm.betta = 1.0
    assert copy == config


def test_values_are_checked_beside_the_keys(tmp_path):
    """Every kind of problem on the command line and in the file, in one error."""
    path = write_config(
        tmp_path,
        'c.grpo.stepz = 3',
        "c.grpo.algorithm.update(loss='clip', beta=-1.0)",
        "c.grpo.optimizer.decay = 'cosin'",
        "c.grpo.rewards = {'exact_anwser': 1.0}",
        'c.grpo.sampling.update(temperature=0.0, top_p=2.0)',
        'c.eval.every = 0',
        "c.grpo.drop = ('x',)",
        'c.sft.update(steps=1, microbatch=5)',
    )
    given = (
        f'--config={path}',
        '--config.lr=3',
        '--config.seed=x',
        '--config.eval.samples=-3',
        'm',
    )
    with pytest.raises(errors.ConfigError) as error:
        arguments.parse(given)
    expected = (
        '--workdir=FOLDER is missing',
        f'--config={path}: unknown config key',
        "unknown config key 'lr': did you mean 'critic.optimizer.learning_rate', ",
        '--config.seed=x: invalid literal',
        "unexpected argument 'm'",
        'eval.samples=-3 is out of range',
        'eval.every=0 is out of range',
        "grpo.algorithm.loss='clip' is unknown",
        'grpo.algorithm.beta=-1.0 is out of range',
        "grpo.drop names 'x'",
        'sft.microbatch=5 does not cut',
        'grpo.sampling.temperature=0.0: ',
        'grpo.sampling.top_p=2.0: ',
        "grpo.optimizer: decay='cosin'",
        "unknown reward 'exact_anwser', did you mean 'exact_answer'?",
    )
    assert len(error.value.problems) == len(expected)
    for found, beginning in zip(error.value.problems, expected, strict=True):
        assert found.startswith(beginning)


def test_what_follows_from_a_wrong_value_is_left_out():
    """With loss='clipped' instead, label_smoothing would have no effect: that is not its fault."""
    config = grpo_config.defaults()
    config.grpo.rewards = {'exact_answer': 1.0}
    config.grpo.algorithm.update(loss='dp', scale='none', baseline='none', label_smoothing=0.1)
    problems, repaired = config_problems.find_problems(config)
    assert len(problems) == 1
    assert problems[0].startswith("grpo.algorithm.loss='dp' is unknown")
    assert (repaired.grpo.algorithm.loss, config.grpo.algorithm.loss) == ('clipped', 'dp')


def test_data_and_model_are_checked_beside_the_values(tmp_path):
    config = runs.get_config()
    config.data.name = 'arithmetc'
    config.model.heads = 3
    config.eval.every = 0
    with pytest.raises(errors.ConfigError) as error:
        runs.train(config, tmp_path)
    begins = ('eval.every=0 is', 'model.heads=3 is', "unknown data set 'arithmetc'")
    assert [text[: len(b)] for text, b in zip(error.value.problems, begins, strict=True)] == [
        *begins
    ]


# Suggestions

RATES = [f'{s}.optimizer.learning_rate' for s in ('critic', 'grpo', 'reward_model', 'sft')]


@pytest.mark.parametrize(
    ('key', 'expected'),
    [
        ('learning_rate', RATES),
        ('lr', RATES),
        ('optimizer.learning_rate', RATES),
        ('grpo.lr', RATES[1:2]),
        ('grpo.learning_rate', RATES[1:2]),
        ('steps', ['grpo.steps', 'reward_model.steps', 'sft.steps']),
        ('temperature', ['grpo.sampling.temperature']),
        ('eval.temprature', ['eval.temperature']),
        ('grpo.temperature', ['grpo.sampling.temperature']),
        ('grpo.sampling.temp', ['grpo.sampling.temperature']),
        ('max_completion_length', ['data.completion_length']),
        ('num_generations', ['grpo.group_size']),
        ('actor_rollout_ref.rollout.n', ['grpo.group_size']),
        ('epsilon', ['grpo.algorithm.clip_low', 'grpo.algorithm.clip_high']),
        ('beta', ['grpo.algorithm.beta']),
        ('grpo.beta', ['grpo.algorithm.beta']),
        ('checkpoint.kept', ['checkpoint.keep']),
        ('gpro', ['grpo']),
        ('gropu_size', ['grpo.group_size']),
        ('zzz', []),
    ],
)
def test_suggestions(key, expected):
    assert suggestions.candidates(key) == expected


def test_the_page_of_other_trainers_names_what_is_suggested():
    """Each name in the table of TRL is suggested as one of the keys that its row names."""
    page = (pathlib.Path(__file__).parents[1] / 'docs/migrating.md').read_text()
    table = page.partition('| TRL `GRPOConfig` | here |')[2].partition('\n\n')[0]
    rows = [line.split('|')[1:3] for line in table.splitlines() if line.startswith('| `')]
    assert len(rows) > 20
    for names, keys in rows:
        for name in re.findall(r'`(\w+)`', names):
            found = suggestions.candidates(name)
            assert found, name
            parents = {path.rpartition('.')[0] for path in found}
            of_section = any(f'`{parent}{end}`' in keys for parent in parents for end in ('', '.*'))
            assert of_section or any(path.rpartition('.')[2] in keys for path in found), name


def test_names_of_other_trainers_lead_to_keys():
    known = suggestions._known()
    for name, targets in suggestions._ALIASES.items():
        assert set(targets) <= set(known), name
        assert suggestions.candidates(name) == list(targets)
    text = suggestions.suggest('epsilon')
    assert text == "did you mean 'grpo.algorithm.clip_low' or 'grpo.algorithm.clip_high'?"


@pytest.mark.parametrize(
    ('path', 'value', 'kind'),
    [
        ('grpo.steps', True, 'int'),
        ('grpo.steps', None, 'int'),
        ('grpo.algorithm.dual_clip', None, 'float'),
        ('data.chat', 1, 'bool'),
        ('tokenizer', 3, 'str'),
    ],
)
def test_values_of_other_types(path, value, kind):
    """A ConfigDict takes None for any key, and a truth value for a number."""
    config = grpo_config.defaults()
    parent, _, name = path.rpartition('.')
    section = grpo_config.at(config, parent) if parent else config
    section._fields[name] = value  # past the checks of a section
    message = f'{path}={value!r}: give a value of type {kind}'
    with pytest.raises(ValueError, match=re.escape(message)):
        config_checks.check_values(config)
    config_checks.check_values(grpo_config.defaults())
