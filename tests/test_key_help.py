"""What `--help` says of a key: its comment, and the values of a choice."""

import re

import pytest

from grpo_jax.algorithm import presets
from grpo_jax.algorithm.config import Algorithm
from grpo_jax.data import FORMATS
from grpo_jax.run import catalog, key_help
from grpo_jax.run.defaults import defaults

# An option that may be anything of its type, or that an error for a wrong value does not list.
CHOICES = {
    'loss', 'ratio', 'importance', 'supervision', 'baseline', 'scale', 'advantage_estimator',
    'reward_aggregation', 'aggregation', 'kl', 'kl_place', 'covariance', 'step',
}  # fmt: skip


def test_the_values_of_a_choice_are_all_that_is_listed():
    options = key_help.algorithm_options()
    listed = {name for name, text in options.items() if text.startswith('one of ')}
    assert listed == CHOICES
    for name in listed:
        values = re.match(r'one of (.*?): ', options[name])[1]
        assert re.fullmatch(r'`\w+`(, `\w+`)*', values)
        default = getattr(Algorithm(), name)
        assert f'`{default}`' in values
    assert options['unbiased_kl'].startswith('The KL of a token times its ratio')
    assert not any('remove it' in text or 'is unknown' in text for text in options.values())


def test_a_config_has_no_none_in_the_place_of_a_text():
    assert defaults().grpo.algorithm.advantage_estimator == ''
    text = ' '.join(key_help.help_text('grpo.algorithm.advantage_estimator').split())
    assert "advantage_estimator='' one of opo, best_minus_second, pass_at_k, '': Of" in text


@pytest.mark.parametrize('section', ['', 'grpo.algorithm', 'grpo', 'sft.optimizer', 'data.name'])
def test_every_key_has_a_description(section):
    described = key_help.descriptions()
    assert all(text for path, text in described.items() if path.startswith(section))


def test_what_a_config_can_name():
    printed = {topic: key_help.help_text(topic) for topic in catalog.TOPICS}
    for topic, names in (
        ('presets', (*presets.PRESETS, *presets.CONVENTIONS)),
        ('formats', FORMATS),
        ('rewards', ('math_answer', 'right_steps', 'final_result')),
    ):
        lines = printed[topic].splitlines()
        assert all(f'  {name}' in lines for name in names)
        assert '`' not in printed[topic]
    assert '\n      in a config also: grpo.refill=3\n' in printed['presets']
    assert 'options: max_tokens, cache_tokens' in printed['rewards']
    shown = [title for titles in catalog.TOPICS.values() for title in titles]
    assert sorted(shown) == sorted(catalog.LISTINGS)
    for topic in catalog.TOPICS:  # no key or section has the name of a topic
        assert topic not in {part for key in key_help.descriptions() for part in key.split('.')[:1]}
