"""Special tokens in texts, and stop strings that are special tokens."""

import folders
import numpy as np
import pytest
import tokenizers

from grpo_jax.data import byte_tokenizer, char_to_token, completion_texts, stop_table
from grpo_jax.data.chat import turn_end
from grpo_jax.data.special_tokens import hidden_ids, stop_ids

# A history has no thoughts, as in Qwen3 and DeepSeek-R1; the last message may have an empty one.
REASONING = (
    '{% for m in messages %}<|im_start|>{{ m.role }}\n'
    "{% if m.role == 'assistant' %}{% if loop.last %}<think>\n\n</think>\n\n{% endif %}"
    "{{ m.content.split('</think>')[-1] }}{% else %}"
    '{{ m.content }}{% endif %}<|im_end|>\n{% endfor %}'
    '{% if tools %}<tool_call>{% endif %}{% if add_generation_prompt %}<|im_start|>assistant\n'
    '<think>\n{% endif %}'
)
# As in GLM: an empty thought before every answer; turns end with the next one.
GLM = (
    '[gMASK]{% for m in messages %}<|{{ m.role }}|>\n{% if m.role == "assistant" %}<think></think>'
    '\n{% endif %}{{ m.content }}{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}'
)
MISTRAL = (
    "{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }}[/INST]{% else %} "
    '{{ m.content }}<eos>{% endif %}{% endfor %}{% if tools %}[TOOL_CALLS]{% endif %}'
)
GEMMA = (
    '{% for m in messages %}<start_of_turn>{{ m.role }}\n{{ m.content }}<end_of_turn>\n{% endfor %}'
    '{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}'
)
SPECIAL = [
    '<|im_start|>', '<|im_end|>', '<think>', '</think>', '<answer>', '</answer>', '<tool_call>',
    '</tool_call>', '<|unused|>', '<|user|>', '<|assistant|>', '[gMASK]', '[INST]', '[/INST]',
    '[TOOL_CALLS]', '<start_of_turn>', '<end_of_turn>',
]  # fmt: skip


def tokenizer_of(template, special=SPECIAL, plain=()):
    tokenizer = byte_tokenizer()
    tokenizer.split_special_tokens = False
    tokenizer.add_special_tokens({'additional_special_tokens': list(special)})
    tokenizer.add_tokens([tokenizers.AddedToken(text, special=False) for text in plain])
    tokenizer.chat_template = template
    return tokenizer


def shown(tokenizer, texts=(), visible=None):
    """The special tokens that are part of texts."""
    ends = {tokenizer.eos_token_id}
    if tokenizer.chat_template:
        ends.add(turn_end(tokenizer)[1])
    hidden = hidden_ids(tokenizer, ends, visible=visible, texts=texts)
    assert ends <= hidden
    return [token for token in SPECIAL if tokenizer.convert_tokens_to_ids(token) not in hidden]


@pytest.mark.parametrize(
    ('template', 'texts', 'expected'),
    [
        (folders.CHATML, (), []),
        (REASONING, (), ['<think>', '</think>', '<tool_call>', '</tool_call>']),
        (GLM, (), ['<think>', '</think>']),
        (MISTRAL, (), ['[TOOL_CALLS]']),
        (GEMMA, (), []),
        (None, (), []),
        (None, ('{question} Write <answer>...</answer>.',), ['<answer>', '</answer>']),
        (folders.CHATML, ('{question}', 'Think in <think> first.'), ['<think>', '</think>']),
        (None, ('Never write <|unused|>',), ['<|unused|>']),
        ("{{ raise_exception('no') }}<think>", (), []),
    ],
)
def test_tags_of_the_template_and_the_prompt_are_shown(template, texts, expected):
    tokenizer = tokenizer_of(template)
    if template and 'raise_exception' in template:
        hidden = hidden_ids(tokenizer, {257}, texts=texts)
        assert {tokenizer.convert_tokens_to_ids(token) for token in SPECIAL} <= hidden
    else:
        assert shown(tokenizer, texts) == expected


def test_the_tokens_can_be_named():
    tokenizer = tokenizer_of(REASONING)
    assert shown(tokenizer, visible=()) == []
    assert shown(tokenizer, visible=('<|unused|>', '<|im_start|>')) == [
        '<|im_start|>',
        '<|unused|>',
    ]
    with pytest.raises(
        ValueError, match=r"data.visible_tokens=\('<thought>',\): '<thought>' is no"
    ):
        shown(tokenizer, visible=('<thought>',))
    with pytest.raises(ValueError, match=r"'<\|im_end\|>' ends a completion: remove it"):
        shown(tokenizer, visible=('<|im_end|>',))


def ids_of(tokenizer, text):
    return np.array([tokenizer(text, add_special_tokens=False).input_ids])


def test_rewards_see_the_tags():
    tokenizer = tokenizer_of(REASONING)
    ids = ids_of(tokenizer, '<think>a é</think><answer>4</answer><|im_end|>')
    mask = np.ones(ids.shape, bool)
    hidden = hidden_ids(tokenizer, {257, 259}, texts=('<answer>',))
    (text,) = completion_texts(tokenizer, ids, mask, hidden=hidden)
    assert text == '<think>a é</think><answer>4</answer>'
    assert completion_texts(tokenizer, ids, mask) == ['a é4']
    assert completion_texts(tokenizer, ids, mask, ['</answer>', '4'], hidden) == [text[:-9]]
    counts = [[1, len('<think>'), len('<think>a é'), len(text)]]
    found = char_to_token(tokenizer, ids, mask, [text], counts, hidden=hidden)
    assert found == [[0, 0, 4, ids.shape[1] - 1]]  # é is two bytes


def test_the_end_of_a_turn_that_is_not_special_is_found_and_hidden():
    others = [token for token in SPECIAL if token != '<|im_end|>']
    tokenizer = tokenizer_of(REASONING, special=others, plain=['\n', '<|im_end|>', 'ab'])
    end = tokenizer.convert_tokens_to_ids('<|im_end|>')
    assert turn_end(tokenizer) == ('', end)
    ids = ids_of(tokenizer, 'ab<|im_end|>')
    hidden = hidden_ids(tokenizer, {257, end})
    assert completion_texts(tokenizer, ids, ids > 0, hidden=hidden) == ['ab']


def test_the_end_of_a_turn_in_the_vocabulary_proper():
    model = tokenizers.models.WordLevel({'<eos>': 0, 'x': 1, '<|end|>': 2, '</b>': 3}, '<eos>')
    backend = tokenizers.Tokenizer(model)
    backend.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    words = type(byte_tokenizer())(tokenizer_object=backend, eos_token='<eos>')
    words.chat_template = '{% for m in messages %}{{ m.content }} </b><|end|>\n{% endfor %}'
    assert turn_end(words) == (' </b>', 2)


def test_stop_strings_that_are_tokens():
    """Hidden ones stop by their id; shown ones are found in the text as well."""
    tokenizer = tokenizer_of(REASONING)
    hidden = hidden_ids(tokenizer, {257, 259})
    token = tokenizer.convert_tokens_to_ids
    assert stop_ids(tokenizer, ['<|im_start|>', '</think>', '\n'], hidden) == [
        token('<|im_start|>'), token('</think>'),
    ]  # fmt: skip
    table = stop_table(tokenizer, ['</think>\n', '<|im_start|>'], 300, hidden)
    assert table[table[0, token('</think>')], ord('\n')] == len(table) - 1
    assert table[0, token('<|im_start|>')] == 0  # it is not part of the text
    assert stop_table(tokenizer, ['</think>'], 300)[0, token('</think>')] == 0
    with pytest.raises(
        ValueError, match=r"'<\|im_end\|>\\n' contains the special token '<\|im_end"
    ):
        stop_ids(tokenizer, ['<|im_end|>\n'], hidden)
    assert stop_ids(tokenizer, ['</think>\n'], hidden) == []
