"""Configs as runs saved them, in this version and in earlier ones."""

import json
import logging
import pathlib
import re

import pytest
import runs

from configs import smoke
from grpo_jax.run import config as grpo_config
from grpo_jax.run import config_checks, methods, saved_config

# Of configs/smoke.py, when there was `grpo.objective` and no number of the schema.
SCHEMA_1 = pathlib.Path(__file__).with_name('config_of_schema_1.json').read_text()


def differing_keys(config, saved):
    different = saved_config.differences(config, saved)
    return [saved_config.describe(key, values) for key, values in different.items()]


def test_json_and_back(caplog):
    config = runs.get_config()
    config.grpo.optimizer.eps = 1e-11
    config.grpo.optimizer.update(name='optax.contrib:muon', options={'beta': 0.9})
    config.grpo.step_rewards = {'my_package.my_module:steps': 1.0}
    text = saved_config.to_json(config)
    again = saved_config.from_json(text)
    assert again.to_dict() == config.to_dict()
    assert again.is_locked
    assert saved_config.to_json(again) == text
    assert text.isascii()
    assert json.loads(text)['schema'] == saved_config.SCHEMA
    assert json.loads(text)['grpo']['rewards'] == {
        'runs:lucky': 1.0,
        'chain_format': 0.5,
        'runs:bonus': 1.0,
    }
    again.grpo.compute.rows = 3  # what is None keeps its type
    with pytest.raises(TypeError):
        again.grpo.compute.rows = 'three'
    assert not caplog.records


def test_differing_keys():
    config = runs.get_config()
    saved = saved_config.from_json(saved_config.to_json(config))
    assert differing_keys(config, saved) == []
    config.seed = 1
    config.eval.k = (1, 2)
    config.grpo.rewards = {'runs:lucky': 2.0, 'chain_format': 0.5, 'runs:bonus': 1.0, 'x:y': 1.0}
    assert differing_keys(config, saved) == [
        'eval.k (there [1, 4], here [1, 2])',
        'grpo.rewards.runs:lucky (there 1.0, here 2.0)',
        'grpo.rewards.x:y (there None, here 1.0)',
        'seed (there 0, here 1)',
    ]


def test_a_run_goes_on_with_its_own_automatic_choices():
    config = runs.get_config()
    assert saved_config.with_saved_choices(config, config) is config
    saved = saved_config.from_json(saved_config.to_json(config))
    saved.grpo.compute.update(microbatch=4, rows=2)
    config.grpo.compute.microbatch = None
    assert differing_keys(config, saved) == []
    resumed = saved_config.with_saved_choices(config, saved)
    assert resumed.to_dict() == saved.to_dict()
    assert config.grpo.compute.microbatch is None
    config.grpo.compute.microbatch = 1  # explicit
    assert differing_keys(config, saved) == ['grpo.compute.microbatch (there 4, here 1)']
    assert saved_config.with_saved_choices(config, saved).grpo.compute.to_dict() == {
        'microbatch': 1, 'rows': 2, 'packed': None, 'widths': None, 'unroll': None,
        'logprob_chunk': 4,
    }  # fmt: skip


def test_schema_1(caplog):
    """The same run, with numbers that are chosen automatically by now."""
    with caplog.at_level(logging.WARNING):
        old = saved_config.from_json(SCHEMA_1)
    config = smoke.get_config()
    config.sft.microbatch = 8
    assert differing_keys(config, old) == []
    assert old.grpo.compute.to_dict() == {
        'microbatch': 2, 'rows': 0, 'packed': False, 'widths': 4, 'unroll': False,
        'logprob_chunk': 4,
    }  # fmt: skip
    assert (old.sft.microbatch, old.reward_model.microbatch) == (8, None)
    assert old.grpo.algorithm.beta == 0.04
    methods.algorithm_of(old)
    methods.compute_of(old)
    (line,) = [record.message for record in caplog.records]
    assert line.startswith(
        'this config was saved by an earlier version; keys added with their defaults: '
        'checkpoint.best, checkpoint.folder, checkpoint.keep_every, critic.optimizer.moments, '
        'critic.optimizer.name, critic.optimizer.options, data.'
    )
    assert ', grpo.algorithm.advantage_estimator, ' in line
    assert line.endswith('; dropped: grpo.algorithm.entropy_mask, grpo.sample_batch')
    again = saved_config.from_json(saved_config.to_json(old))
    assert again.to_dict() == old.to_dict()


def test_keys_added_since(caplog):
    values = json.loads(saved_config.to_json(runs.get_config()))
    del values['grpo']['optimizer']['options']
    del values['log']
    config = saved_config.from_json(json.dumps(values))
    expected = runs.get_config()
    expected.log.completions = grpo_config.defaults().log.completions
    assert config.to_dict() == expected.to_dict()
    (record,) = caplog.records
    assert record.message == (
        'this config was saved by an earlier version; keys added with their defaults: '
        'grpo.optimizer.options, log.completions, log.name, log.project, log.to'
    )


@pytest.mark.parametrize(
    ('change', 'message'),
    [
        (
            lambda values: values['grpo']['algorithm'].update(entropy_mask=True),
            "config key 'grpo.algorithm.entropy_mask' no longer exists, and "
            'grpo.algorithm.entropy_mask=True has no equivalent: use the version',
        ),
        (
            lambda values: values['grpo'].update(stepz=3),
            "unknown config key 'grpo.stepz': did you mean 'grpo.steps'?",
        ),
        (lambda values: values.update(schema=3), 'schema=3 was written by a later version'),
        (lambda values: values.update(seed='x'), "seed='x': give a value of type int"),
    ],
)
def test_configs_that_cannot_be_read(change, message, tmp_path):
    values = json.loads(SCHEMA_1)
    change(values)
    if 'schema' in values:
        values = json.loads(saved_config.to_json(runs.get_config())) | {'schema': values['schema']}
    path = tmp_path / 'config.json'
    path.write_text(json.dumps(values))
    with pytest.raises(ValueError) as error:  # noqa: PT011 the message follows
        saved_config.read(path)
    assert str(error.value).startswith(f'{path}: {message}')
    assert '\n' not in str(error.value)


@pytest.mark.parametrize(
    ('text', 'message'),
    [
        ('[]', 'holds list, not a JSON object'),
        ('null', 'holds NoneType, not a JSON object'),
        ('[' * 100_000, 'not valid JSON'),
        ('{"schema": "2"}', "schema='2' is no number of a schema"),
        ('{"schema": true}', 'schema=True is no number'),
        ('{"grpo": 1, "reward_model": []}', 'it has no schema, and is not of the form'),
        ('{}', 'it has no schema, and is not of the form'),
        ('{"schema": 2, "seed": 1' + '0' * 400 + '}', 'seed='),
    ],
)
def test_files_of_another_form(text, message, tmp_path):
    (tmp_path / 'config.json').write_text(text)
    with pytest.raises(ValueError, match=re.escape(message)):
        config_checks.check_values(saved_config.read(tmp_path / 'config.json', quiet=True))


def test_a_file_that_is_torn(tmp_path):
    (tmp_path / 'config.json').write_text(SCHEMA_1[:100])
    with pytest.raises(ValueError, match=r'config.json: not valid JSON: '):
        saved_config.read(tmp_path / 'config.json')
