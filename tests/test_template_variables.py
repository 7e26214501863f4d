"""Variables and the date of chat templates."""

import datetime

import folders
import pytest

from grpo_jax.data.chat import chat_prompts
from grpo_jax.data.template_variables import bind_template, template_uses_date
from grpo_jax.data.tokenizers import byte_tokenizer

DATE = datetime.date(2026, 1, 9)
# As in Qwen3: the prompt ends with an empty thought unless thinking is enabled.
THINKING = folders.CHATML.replace(
    'assistant\n{% endif %}',
    "assistant\n{% if enable_thinking is defined and enable_thinking is false %}{{ '<think>\n\n"
    "</think>\n\n' }}{% endif %}{% endif %}",
)
# As in Llama 3, where the date is a variable, and as in SmolLM3.
LLAMA = (
    '{%- if not date_string is defined %}{%- set date_string = strftime_now("%d %b %Y") %}'
    '{%- endif %}Today: {{ date_string }}\n' + folders.CHATML
)
SMOLLM = '{%- set today = strftime_now("%-d %B %Y, %A") -%}{{ today }}: ' + folders.CHATML
TOOLS = '{% if tools %}{{ tools[0].name }} {{ tools | tojson }}{% endif %}' + folders.CHATML


def prompt(template, variables=None, date=None):
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = template
    bind_template(tokenizer, variables or {}, date)
    return chat_prompts(tokenizer, ['x'], '')[0]


PLAIN = '<|im_start|>user\nx<|im_end|>\n<|im_start|>assistant\n'


@pytest.mark.parametrize(
    ('template', 'variables', 'expected'),
    [
        (THINKING, {}, PLAIN),
        (THINKING, {'enable_thinking': True}, PLAIN),
        (THINKING, {'enable_thinking': False}, f'{PLAIN}<think>\n\n</think>\n\n'),
        ('{{ a }}|{{ b }}' + folders.CHATML, {'a': None, 'b': 'null "é"\n%}'}, None),
        (TOOLS, {'tools': [{'name': 'add', 'args': {'n': 1.5, 'all': True}}]}, None),
        ('\n\n{{ n }}\n' + folders.CHATML, {'n': -3}, '\n\n-3\n' + PLAIN),
        (LLAMA, {'date_string': '1 Jan 1900'}, 'Today: 1 Jan 1900\n' + PLAIN),
    ],
)
def test_variables_mean_what_they_mean_to_transformers(template, variables, expected):
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = template
    reference = tokenizer.apply_chat_template(
        [{'role': 'user', 'content': 'x'}], tokenize=False, add_generation_prompt=True, **variables
    )
    assert prompt(template, variables) == reference
    assert expected is None or reference == expected


def test_all_templates_of_a_tokenizer_are_bound():
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = {'default': THINKING, 'tool_use': TOOLS}
    bind_template(tokenizer, {'enable_thinking': False})
    assert chat_prompts(tokenizer, ['x'], '')[0].endswith('</think>\n\n')


def test_dates_are_fixed():
    assert prompt(LLAMA, date=DATE) == 'Today: 09 Jan 2026\n' + PLAIN
    assert prompt(SMOLLM, date=DATE) == '9 January 2026, Friday: ' + PLAIN
    formats = ('%Y-%m-%d', '%y%j', '%a %b %-d', 'at %H:%M:%S', '%B')
    for form in formats:
        written = prompt('{{ strftime_now("' + form + '") }}|' + folders.CHATML, date=DATE)
        midnight = datetime.datetime.combine(DATE, datetime.time())
        assert written == f'{midnight.strftime(form)}|{PLAIN}'
    now = datetime.datetime.now().strftime('%d %b %Y')
    assert prompt(LLAMA) == f'Today: {now}\n{PLAIN}'


def test_inside_a_macro_too():
    template = '{% macro day() %}{{ strftime_now("%d") }}{% endmacro %}{{ day() }}' + folders.CHATML
    assert prompt(template, date=DATE) == '09' + PLAIN


def test_which_templates_use_the_date():
    tokenizer = byte_tokenizer()
    assert not template_uses_date(tokenizer)
    tokenizer.chat_template = folders.CHATML
    assert not template_uses_date(tokenizer)
    bind_template(tokenizer, {}, DATE)
    assert tokenizer.chat_template == folders.CHATML
    tokenizer.chat_template = {'default': folders.CHATML, 'other': LLAMA}
    assert template_uses_date(tokenizer)


@pytest.mark.parametrize(
    ('template', 'variables', 'message'),
    [
        (THINKING, {'enable_thought': False}, "'enable_thought' is not in the template"),
        (THINKING, {'thinking': False}, "'thinking' is not in the template"),
        (None, {'enable_thinking': False}, "'enable_thinking' is not in the template"),
        (THINKING, {'messages': []}, "'messages' is set for every prompt"),
        (THINKING, {'add_generation_prompt': False}, "'add_generation_prompt' is set for every"),
    ],
)
def test_variables_without_effect_are_refused(template, variables, message):
    with pytest.raises(ValueError, match=message):
        prompt(template, variables)
