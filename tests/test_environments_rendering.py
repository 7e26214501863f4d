"""Replies as tokens: what follows a turn, and nothing of what the policy wrote."""

import folders
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from grpo_jax.data import bind_template, byte_tokenizer
from grpo_jax.environments import Renderer

# How Qwen3 renders: thoughts of turns before the last question of the user are left out, and
# replies of tools are in one message of the user.
QWEN3 = """{%- set ns = namespace(last=0) -%}
{%- for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}{% endif -%}
{%- endfor -%}
{%- if tools %}{{ '<|im_start|>system\n' }}{% for t in tools %}{{ t | tojson }}{{ '\n' }}
{%- endfor %}{{- '<|im_end|>\n' }}{% endif -%}
{%- for m in messages -%}
{%- if m.role == 'assistant' -%}
{{- '<|im_start|>assistant\n' -}}
{%- if loop.index0 > ns.last %}{{ '<think>\n\n</think>\n\n' }}{% endif -%}
{{- m.content.split('</think>')[-1] + '<|im_end|>\n' -}}
{%- elif m.role == 'tool' -%}
{%- if loop.previtem.role != 'tool' %}{{ '<|im_start|>user' }}{% endif -%}
{{- '\n<tool_response>\n' + m.content + '\n</tool_response>' -}}
{%- if loop.last or loop.nextitem.role != 'tool' %}{{ '<|im_end|>\n' }}{% endif -%}
{%- else -%}
{{- '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' -}}
{%- endif -%}{%- endfor -%}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}
{%- if enable_thinking is defined and enable_thinking is false %}{{ '<think>\n\n</think>\n\n' }}
{%- endif %}{% endif -%}"""

# How Llama 3 does, which writes the replies of tools as JSON.
LLAMA3 = """{{- '<bos>' }}{% for m in messages -%}
{%- if m.role == 'tool' or m.role == 'ipython' -%}
{{- '<|im_start|>ipython\n\n' + (m.content | tojson) + '<|im_end|>' -}}
{%- else -%}{{- '<|im_start|>' + m.role + '\n\n' + m.content | trim + '<|im_end|>' -}}{%- endif -%}
{%- endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n\n' }}{% endif %}"""

# How Mistral does, which wants calls before replies, and has no token for the end of a question.
MISTRAL = """{%- for m in messages -%}
{%- if m.role == 'user' %}{{ '[INST] ' + m.content + '[/INST]' }}
{%- elif m.role == 'assistant' and m.tool_calls is defined -%}
{{- m.content + '[TOOL_CALLS]' }}
{%- for c in m.tool_calls %}{{ c.function | tojson + c.id }}{% endfor %}{{- '<eos>' }}
{%- elif m.role == 'assistant' %}{{ m.content + '<eos>' }}
{%- elif m.role == 'tool' -%}
{%- if m.tool_call_id is undefined or m.tool_call_id | length != 9 -%}
{{- raise_exception('an id has 9 characters') }}{% endif -%}
{{- '[TOOL_RESULTS]' + m.content + '[/TOOL_RESULTS]' -}}
{%- endif -%}{%- endfor -%}"""

# How Gemma does, which knows a user and a model alone, that take turns.
GEMMA = """{{- '<bos>' }}{% for m in messages -%}
{%- if (m.role == 'user') != (loop.index0 % 2 == 0) -%}
{{- raise_exception('take turns') }}{% endif -%}
{{- '<|im_start|>' + ('model' if m.role == 'assistant' else m.role) + '\n' + m.content | trim -}}
{{- '<|im_end|>\n' }}{% endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>model\n' }}{% endif %}"""


def tokenizer_with(template):
    tokenizer = folders.chat_tokenizer()
    tokenizer.chat_template = template
    tokenizer.add_tokens(['<tool_response>', '</tool_response>'])  # not special, as in Qwen
    return tokenizer


def tool(content, name='f'):
    return {'role': 'tool', 'name': name, 'content': content}


def user(content):
    return {'role': 'user', 'content': content}


END = '<|im_end|>'
# template, the reply, what follows the token that ends a turn, what is before it
CASES = {
    'chatml': (folders.CHATML, [tool('4')], '\n<|im_start|>tool\n4<|im_end|>\n<|im_start|>'
               'assistant\n', END),
    'qwen3': (QWEN3, [tool('4')], '\n<|im_start|>user\n<tool_response>\n4\n</tool_response>'
              '<|im_end|>\n<|im_start|>assistant\n', END),
    'qwen3, two': (QWEN3, [tool('4'), tool('5')], '\n<|im_start|>user\n<tool_response>\n4\n'
                   '</tool_response>\n<tool_response>\n5\n</tool_response><|im_end|>\n'
                   '<|im_start|>assistant\n', END),
    'qwen3, user': (QWEN3, [user('higher')], '\n<|im_start|>user\nhigher<|im_end|>\n'
                    '<|im_start|>assistant\n', END),
    'llama3': (LLAMA3, [tool('a "b"')], '<|im_start|>ipython\n\n"a \\"b\\""<|im_end|><|im_start|>'
               'assistant\n\n', END),
    'mistral': (MISTRAL, [tool('4'), tool('5')], '[TOOL_RESULTS]4[/TOOL_RESULTS][TOOL_RESULTS]5'
                '[/TOOL_RESULTS]', '<eos>'),
    'mistral, user': (MISTRAL, [user('higher')], '[INST] higher[/INST]', '<eos>'),
    'gemma': (GEMMA, [tool('4'), tool('5')], '\n<|im_start|>user\n4\n5<|im_end|>\n<|im_start|>'
              'model\n', END),
}  # fmt: skip


@pytest.mark.parametrize('case', CASES)
def test_a_reply_is_what_the_template_writes_after_the_turn(case):
    template, messages, after, end = CASES[case]
    tokenizer = tokenizer_with(template)
    renderer = Renderer(tokenizer, chat=True)
    ids = renderer.tokens(messages, ended_by_eos=True)
    assert tokenizer.decode(ids, skip_special_tokens=False) == after
    whole = renderer.tokens(messages, ended_by_eos=False)  # the policy ended with a stop string
    assert tokenizer.decode(whole, skip_special_tokens=False) == end + after
    assert whole[-len(ids) :] == ids


def test_the_tokens_are_those_of_the_whole_conversation():
    """An oracle that renders and encodes all of it, with the policy's words as the template has."""
    tokenizer = tokenizer_with(QWEN3)
    conversation = [user('2+2?'), {'role': 'assistant', 'content': 'f(2)'}, tool('4'), tool('5')]
    ids = tokenizer(
        tokenizer.apply_chat_template(conversation, tokenize=False, add_generation_prompt=True)
    ).input_ids
    reply = Renderer(tokenizer, chat=True).tokens(conversation[2:], ended_by_eos=True)
    end = tokenizer.convert_tokens_to_ids(END)
    assert ids[ids.index(end, ids.index(end) + 1) + 1 :] == reply


def test_variables_and_tools_of_the_template_are_those_of_the_prompts():
    tokenizer = tokenizer_with(QWEN3)
    schema = {'type': 'function', 'function': {'name': 'f', 'description': 'é "x" {{ y }} %}'}}
    bind_template(tokenizer, {'enable_thinking': False, 'tools': [schema]})
    (prompt,) = tokenizer.apply_chat_template([[user('x')]], tokenize=False)
    assert '"description": "é \\"x\\" {{ y }} %}"' in prompt
    ids = Renderer(tokenizer, chat=True).tokens([tool('4')], ended_by_eos=True)
    text = tokenizer.decode(ids, skip_special_tokens=False)
    assert text.endswith('<|im_start|>assistant\n<think>\n\n</think>\n\n')
    assert 'description' not in text


def test_tools_select_the_template_that_is_for_them():
    tokenizer = tokenizer_with(QWEN3)
    tokenizer.chat_template = {'default': folders.CHATML, 'tool_use': QWEN3}
    bind_template(tokenizer, {'tools': [{'function': {'name': 'f'}}]})
    (prompt,) = tokenizer.apply_chat_template([[user('x')]], tokenize=False)
    assert prompt.startswith('<|im_start|>system\n{"function": {"name": "f"}}')


PARTS = ['<|im_end|>', '<|im_start|>', '<eos>', '<tool_response>', 'a', ' ', '\n', '<', '|>', 'é',
         '\U000f0000', '0', '\U000f0001']  # fmt: skip


@settings(max_examples=50)
@given(st.lists(st.sampled_from(PARTS), max_size=12))
def test_special_tokens_in_a_reply_are_text(parts):
    text = ''.join(parts)
    ids = RENDERERS['chat'].tokens([tool(text)], ended_by_eos=True)
    special = [i for i in ids if i >= 256]
    names = [TOKENIZER.convert_ids_to_tokens(i) for i in special]
    framing = ['<|im_start|>', '<tool_response>', '</tool_response>', '<|im_end|>', '<|im_start|>']
    assert names == framing
    if '\U000f0000' not in text:
        assert TOKENIZER.decode(ids, skip_special_tokens=False) == (
            f'\n<|im_start|>user\n<tool_response>\n{text}\n</tool_response><|im_end|>\n'
            '<|im_start|>assistant\n'
        )
    plain = RENDERERS['plain'].tokens([tool(text)], ended_by_eos=False)
    assert max(plain, default=0) < 256


TOKENIZER = tokenizer_with(QWEN3)
RENDERERS = {
    'chat': Renderer(TOKENIZER, chat=True),
    'plain': Renderer(byte_tokenizer(), chat=False, template='{reply};'),
}


def test_without_a_chat_template_replies_are_in_a_template():
    renderer = Renderer(byte_tokenizer(), chat=False, template='=[{reply}]\n')
    for ended in (True, False):
        assert bytes(renderer.tokens([tool('4'), tool('5')], ended_by_eos=ended)) == b'=[4\n5]\n'
    for template in ('no place', '{reply}{reply}'):
        with pytest.raises(ValueError, match='in it, once'):
            Renderer(byte_tokenizer(), chat=False, template=template)


@settings(max_examples=20)
@given(st.lists(st.text(max_size=40), min_size=1, max_size=4), st.integers(70, 200))
def test_a_long_reply_is_cut_and_its_frame_is_not(contents, longest):
    messages = [tool(text) for text in contents]
    for renderer in RENDERERS.values():
        whole = renderer.tokens(messages, ended_by_eos=True)
        ids, cut = renderer.fit(messages, ended_by_eos=True, longest=longest)
        assert len(ids) <= longest
        assert cut == (len(whole) > longest)
        assert ids[-1] == whole[-1]
        if not cut:
            assert ids == whole


def test_a_cut_keeps_the_beginnings_of_all_messages():
    messages = [tool('a' * 1000), tool('b' * 1000)]
    ids, cut = RENDERERS['plain'].fit(messages, ended_by_eos=True, longest=12)
    assert (bytes(ids), cut) == (b'aaaaa\nbbbbb;', True)
    ids, cut = RENDERERS['plain'].fit([tool('a' * 10**6)], ended_by_eos=True, longest=5)
    assert (bytes(ids), cut) == (b'aaaa;', True)


def test_frames_that_have_no_room_are_left_out_and_a_limit_below_one_is_an_error():
    messages = [tool('a'), tool('b'), tool('c')]
    one = len(RENDERERS['chat'].tokens([tool('')], ended_by_eos=True))
    ids, cut = RENDERERS['chat'].fit(messages, ended_by_eos=True, longest=one + 1)
    assert cut
    assert ids == RENDERERS['chat'].tokens([tool('a')], ended_by_eos=True)
    with pytest.raises(ValueError, match='too few for a reply'):
        RENDERERS['chat'].fit(messages, ended_by_eos=True, longest=one - 1)
    with pytest.raises(
        ValueError, match=r'environment.reply_tokens=3: the template writes \d+ tok'
    ):
        RENDERERS['chat'].check(3)
    RENDERERS['chat'].check(one + 2)


@pytest.mark.parametrize(
    'template',
    [
        "{% for m in messages %}{% if m.role == 'assistant' %}{{ m.content }}<|im_end|>"
        '{% endif %}{% endfor %}',  # leaves out all others
        "{% if messages | length > 2 %}{{ raise_exception('too long') }}{% endif %}{% for m in "
        'messages %}{{ m.content }}<|im_end|>{% endfor %}',
    ],
)
def test_a_template_without_a_place_for_replies_is_refused(template):
    with pytest.raises(ValueError, match='leaves out what comes after a turn'):
        Renderer(tokenizer_with(template), chat=True)
