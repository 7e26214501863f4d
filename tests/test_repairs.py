"""After a problem the checks go on with a repaired config."""

import pytest

from grpo_jax.run.config import defaults
from grpo_jax.run.errors import ConfigError
from grpo_jax.run.repairs import Finder


def config_of(**values):
    config = defaults()
    for path, value in values.items():
        section, _, name = path.rpartition('__')
        target = config
        for part in section.split('__') if section else ():
            target = target[part]
        target[name] = value
    return config


def refuse(*conditions):
    """A check with several (condition, message), of which it tells the first that holds."""

    def check(config):
        for holds, message in conditions:
            if holds(config):
                raise ValueError(message(config))
        return 'checked'

    return check


def test_the_first_key_of_a_message_gets_its_default():
    given = config_of(eval__every=0, eval__batch_size=0)
    finder = Finder(given)
    check = refuse(
        (lambda c: c.eval.every < 1, lambda c: f'eval.every={c.eval.every} is out of range'),
        (lambda c: c.eval.batch_size < 1, lambda c: f'eval: batch_size={c.eval.batch_size}: no'),
    )
    assert finder.run(check) == 'checked'
    assert finder.problems == ['eval.every=0 is out of range', 'eval: batch_size=0: no']
    assert (finder.config.eval.every, finder.config.eval.batch_size) == (50, 64)
    assert (given.eval.every, given.eval.batch_size) == (0, 0)


def test_another_key_of_the_section_is_the_culprit():
    """heads has its default, so kv_heads gets its own too."""
    finder = Finder(config_of(model__kv_heads=3, model__width=-1))
    check = refuse(
        (
            lambda c: c.model.heads % c.model.kv_heads,
            lambda c: f'model.heads={c.model.heads} is no multiple of kv_heads={c.model.kv_heads}',
        ),
        (lambda c: c.model.width < 1, lambda c: f'model.width={c.model.width}: make it 1'),
    )
    assert finder.run(check) == 'checked'
    assert len(finder.problems) == 2
    assert finder.config.model.kv_heads == 2


def test_the_only_key_that_a_message_names_is_repaired():
    finder = Finder(config_of(data__prompt_length=1))
    check = refuse((
        lambda c: c.data.prompt_length < 5,
        lambda c: f'all prompts are longer than prompt_length={c.data.prompt_length} tokens',
    ))  # fmt: skip
    assert finder.run(check) == 'checked'
    assert finder.config.data.prompt_length == 64


def test_items_and_entries_are_removed():
    finder = Finder(config_of(log__to=('a', 'b', 'm:f'), data__options={'x': 1, 'x_y': 2, 'z': 3}))
    known = ('m:f',)
    check = refuse(
        (
            lambda c: set(c.log.to) - {*known},
            lambda c: f'log.to names {sorted({*c.log.to} - {*known})[0]!r}, which is unknown',
        ),
        (lambda c: 'x_y' in c.data.options, lambda c: 'data.options.x_y=2: no such option'),
    )
    assert finder.run(check) == 'checked'
    assert [text.split()[2 if 'names' in text else 0] for text in finder.problems] == [
        "'a',", "'b',", 'data.options.x_y=2:',
    ]  # fmt: skip
    assert finder.config.log.to == ('m:f',)
    assert finder.config.data.options.to_dict() == {'x': 1, 'z': 3}


@pytest.mark.parametrize(
    'message',
    [
        "grpo.algorithm.tau_positive=2.0 has no effect with loss='clipped': remove it",
        'grpo.algorithm.loss is whatever',
        'something with grpo.algorithm.loss',
    ],
)
def test_what_may_be_about_a_repair_is_left_out(message):
    finder = Finder(config_of(grpo__algorithm__loss='x'))
    finder.run(refuse((lambda c: c.grpo.algorithm.loss == 'x', lambda c: 'grpo.algorithm.loss=x')))
    assert len(finder.problems) == 1
    finder.add([message, 'grpo.algorithm.loss_scale=3 is another key', "reward_model.loss='x': no"])
    assert finder.problems[1:] == [
        'grpo.algorithm.loss_scale=3 is another key', "reward_model.loss='x': no",
    ]  # fmt: skip


def test_an_empty_dictionary_after_a_repair_is_no_problem():
    finder = Finder(config_of(grpo__rewards={'a': 1.0}))
    assert finder.remove('grpo.rewards', ['a'])
    finder.add(['grpo.rewards is empty: name one'])
    assert not finder.problems


def test_what_cannot_be_repaired():
    finder = Finder(config_of(data__name='sums'))
    unknown = refuse((lambda c: c.data.name == 'sums', lambda c: "unknown data set 'sums'"))
    assert finder.run(unknown) is None
    finder.run(refuse((lambda c: True, lambda c: 'seed=0 is wrong, whatever it is')))
    assert finder.problems == ["unknown data set 'sums'", 'seed=0 is wrong, whatever it is']
    assert finder.config.data.name == 'sums'


def test_a_word_is_no_key():
    finder = Finder(config_of(start='runs/a:sft', seed=3))
    finder.run(refuse((lambda c: True, lambda c: 'start the other processes too')))
    assert (finder.config.start, finder.config.seed) == ('runs/a:sft', 3)
    finder.run(refuse((lambda c: c.seed, lambda c: 'seed is 3: make it 0')))
    assert (finder.config.start, finder.config.seed) == ('runs/a:sft', 0)


def test_several_messages_of_one_error():
    def check(config):
        found = [f'{key}=0 is small' for key in ('every', 'samples') if not config.eval[key]]
        if found:
            raise ConfigError([f'eval.{text}' for text in found])
        return config

    finder = Finder(config_of(eval__every=0, eval__samples=0))
    assert finder.run(check) is finder.config
    assert len(finder.problems) == 2


def test_a_check_is_skipped_without_what_it_needs():
    finder = Finder(config_of(tokenizer='x'))
    finder.run(refuse((lambda c: c.tokenizer, lambda c: "tokenizer 'x' cannot be loaded")))
    assert finder.run(lambda c: 'tokens', unless=('tokenizer',)) is None
    assert finder.run(lambda c: 'rows', unless=('data.name',)) == 'rows'


def test_keys_that_stand_for_something_wrong():
    """Of the command line and the file; a key that is set is meant as it is."""
    known = (
        "--config=mine.py: config key 'grpo.rewards' is 'f': give a value of type dictionary",
        "unknown config key 'grpo.bach_size': did you mean 'grpo.batch_size'?",
        '--config.eval.every=x: invalid literal',
        "unknown config key 'modle': did you mean 'model'?",
    )
    finder = Finder(config_of(grpo__batch_size=5000), known)
    followed = (
        'grpo.rewards is empty: name one',
        'eval.every=50 is wrong',
        'model.heads=4 is not a multiple of kv_heads=3',
    )
    told = (
        'grpo.batch_size is 5000: make it 1 to 50',
        "grpo.algorithm.lam=1.0 has no effect with baseline='mean'",
        'sft.microbatch=3 does not fit model.heads=4',
    )
    finder.add([*followed, *told])
    assert finder.problems == [*told]
