"""The environment of a run: its config, its place in the chat template, and its problems."""

import folders
import pytest
from test_environments_rendering import QWEN3, tokenizer_with
from test_preparation import assert_begin, config_of_rows, problems_of, rows  # noqa: F401

from grpo_jax.run import config_problems
from grpo_jax.run.config import defaults
from grpo_jax.run.interaction import make_environment, make_renderer
from grpo_jax.run.setup import prepare
from grpo_jax.run.tokenization import bind_chat_template


def config_with(**options):
    config = defaults()
    config.environment.update({'name': 'calculator', **options})
    return config


def test_a_config_without_an_environment_has_none():
    assert make_environment(defaults()) is None


def test_options_of_no_environment_are_told():
    config = config_with(name='', turns=3, options={'k': 1})
    problems, _ = config_problems.find_problems(config)
    assert [text.partition(' has')[0] for text in problems if 'environment' in text] == [
        "environment.options={'k': 1}", 'environment.turns=3',
    ]  # fmt: skip


@pytest.mark.parametrize(
    ('options', 'messages'),
    [
        ({'name': 'calculater'}, ["environment.name='calculater' is unknown, did you mean 'calc"]),
        ({'name': './nowhere.py:f'}, ["environment.name='./nowhere.py:f'"]),
        ({'name': 'pathlib:Path'}, ["environment.name='pathlib:Path' is a class without such"]),
        ({'options': {'x': 1}}, ["environment.options.x: environment.name='calculator' is a tool"]),
        ({'name': 'gym'}, ["environment.options: environment.name='gym' needs 'game': set"]),
        ({'name': 'gym', 'options': {'game': 'a.b:c'}}, ["environment.options.game='a.b:c': Plug"]),
        ({'turns': 0, 'reply_tokens': 0},
         ['environment.turns=0 is out of range', 'environment.reply_tokens=0 is out of range']),
        ({'reply_seconds': -1.0, 'on_error': 'stop', 'format': 'xml'},
         ['environment.reply_seconds=-1.0: give', "environment.format='xml' is unknown",
          "environment.on_error='stop' is unknown"]),
        ({'format': 'fenced'}, ["environment.format='fenced' needs one tool"]),
        ({'name': 'guess', 'format': 'plain'}, ["environment.format='plain' has no effect"]),
    ],
)  # fmt: skip
def test_all_problems_of_the_section_are_found(options, messages):
    config = config_with(**options)
    config.grpo.rewards = {'exact_anser': 1.0}
    problems, _ = config_problems.find_problems(config)
    others = [text for text in problems if not text.startswith('environment.')]
    assert len(others) == 1  # and what else is wrong is found too
    assert_begin([text for text in problems if text not in others], *messages)


def test_what_depends_on_the_tokenizer_is_found_before_anything_is_compiled(rows, tmp_path):  # noqa: F811
    config = config_of_rows()
    config.environment.update(name='calculator', template='none', reply_tokens=2)
    config.grpo.batch_size = 1000
    first, second, third = sorted(problems_of(config, tmp_path / 'run'))
    assert (
        first == 'environment.reply_tokens=2: the template writes 2 tokens around a reply: raise it'
    )
    assert second == "environment.template='none': write '{reply}' in it, once"
    assert third.startswith('grpo.batch_size is 1000')


def test_an_environment_tells_which_column_it_lacks(rows, tmp_path):  # noqa: F811
    config = config_of_rows()
    config.environment.name = 'guess'
    (problem,) = problems_of(config, tmp_path / 'run')
    assert "environment 'guess': Guess.reset needs 'number', which is not a column" in problem


def chat_config(template, **options):
    config = config_with(**options)
    config.data.chat = True
    return config, tokenizer_with(template)


def prompt_of(tokenizer):
    return tokenizer.apply_chat_template([{'role': 'user', 'content': 'x'}], tokenize=False)


def test_the_chat_template_shows_the_tools():
    config, tokenizer = chat_config(QWEN3)
    environment = make_environment(config, tokenizer)
    assert '"name": "calculator"' not in prompt_of(tokenizer)
    bind_chat_template(config, tokenizer, environment.tools)
    assert '"name": "calculator"' in prompt_of(tokenizer)
    ids = make_renderer(config, tokenizer, ()).tokens(
        [{'role': 'tool', 'name': 'calculator', 'content': '4'}], ended_by_eos=True
    )
    assert 'calculator' not in tokenizer.decode(ids)


def test_a_template_without_a_place_for_tools_needs_a_prompt_that_names_them():
    config, tokenizer = chat_config(folders.CHATML)
    tools = make_environment(config, tokenizer).tools
    with pytest.raises(ValueError, match='describe calculator in data'):
        bind_chat_template(config, tokenizer, tools)
    config.data.system = 'Use calculator(expression).'
    bind_chat_template(config, tokenizer, tools)
    assert 'parameters' not in prompt_of(tokenizer)
    config, tokenizer = chat_config(QWEN3)
    config.data.chat_template_kwargs = {'tools': []}
    with pytest.raises(
        ValueError, match=r'data.chat_template_kwargs.tools are those of environment'
    ):
        bind_chat_template(config, tokenizer, tools)


def test_the_format_follows_from_the_chat_template():
    config, tokenizer = chat_config(QWEN3.replace('tool_response', 'tool_call'))
    assert make_environment(config, tokenizer).format == 'hermes'
    config.data.chat = False
    assert make_environment(config, tokenizer).format == 'plain'
    config.environment.format = 'llama3'
    assert make_environment(config, tokenizer).format == 'llama3'


def test_a_setup_has_the_environment_and_its_renderer(tmp_path):
    config = folders.get_config()
    config.environment.name = 'calculator'
    setup = prepare(config, tmp_path)
    assert setup.environment.name == 'calculator'
    assert bytes(setup.renderer.tokens([{'role': 'tool', 'content': '4'}], ended_by_eos=False)) == (
        b'\n4\n'
    )
    config.environment.name = ''
    setup = prepare(config, tmp_path)
    assert (setup.environment, setup.renderer) == (None, None)


def a_function(prompts, completions, turns):
    return [None] * len(completions)


def test_a_function_in_a_config_becomes_its_path():
    config = config_with(name=a_function)
    assert config.environment.name.endswith(':a_function')
    assert make_environment(config).tools == []
