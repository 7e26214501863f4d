"""Prompts: formats by name, worked examples from the data, templates and chat templates."""

import sys

import jinja2
import pytest
import tiny

from grpo_jax.data import FORMATS, get_format, question_key, render_prompts, turn_end

ROW = {'question': 'How many {x}?', 'answer': '1', 'solution': 'a\n#### 1'}

# Short forms of well-known chat templates.
CHATML = (
    '{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}'
    '{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}'
)
WITH_BOS = '{{ bos_token }}' + CHATML
NO_SYSTEM = (
    "{% if messages[0].role == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
    + CHATML
)
SPACED = (  # ends with a space and the end-of-sequence token, and trims messages
    "{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content | trim }} [/INST]"
    '{% else %} {{ m.content | trim }} {{ eos_token }}{% endif %}{% endfor %}'
)
THINKING = (  # writes an empty thought before the message, in added tokens that are not special
    '{% for m in messages %}<|im_start|>{{ m.role }}\n'
    "{% if m.role == 'assistant' %}<think>\n\n</think>\n\n{% endif %}"
    '{{ m.content }}<|im_end|>\n{% endfor %}'
    '{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}'
)
ENDLESS = "{% for m in messages %}{{ m.role + ': ' + m.content + '\n' }}{% endfor %}"


def chat_tokenizer(template, extra=()):
    """A byte tokenizer with the special tokens of ChatML that adds `<pad>` before every text."""
    tokenizer = tiny.adding('<pad> $A', bos_token='<pad>')
    tokenizer.add_special_tokens({'additional_special_tokens': ['<|im_start|>', '<|im_end|>']})
    tokenizer.add_tokens(list(extra))
    tokenizer.split_special_tokens = False
    tokenizer.chat_template = template
    return tokenizer


# Formats


def test_zero_shot_by_hand():
    assert render_prompts('deepseekmath', [ROW]) == [
        'User: How many {x}?\nPlease reason step by step, and put your final answer within '
        '\\boxed{}.\n\nAssistant:'
    ]
    (text,) = render_prompts('deepseekmath_zh', [{'question': '几个？'}])
    assert text.startswith('User: 几个？\n')
    assert text.endswith('\\boxed{}里。\n\nAssistant:')
    assert get_format('deepseekmath').stops == ()
    assert get_format('deepseekmath').shots == 0


def test_r1_by_hand():
    (text,) = render_prompts('r1', [ROW])
    assert text.endswith('\n\nUser: How many {x}?\nAssistant:')
    tags = [text.index(tag) for tag in ('<think>', '</think>', '<answer>', '</answer>')]
    assert tags == sorted(tags)
    assert render_prompts('r1', [ROW], system='S') == ['S\n\nUser: How many {x}?\nAssistant:']


def test_templates():
    rows = [ROW, ROW | {'question': 'b'}]
    assert render_prompts('{{{question}}} {answer}', rows) == ['{How many {x}?} 1', '{b} 1']
    assert get_format('{question}').stops == ()
    with pytest.raises(ValueError, match="unknown prompt format 'r2': choose deepseekmath, "):
        render_prompts('r2', [ROW])
    with pytest.raises(ValueError, match=r'does not fit the data .*columns are \{q\}'):
        render_prompts('deepseekmath', [{'q': 'a'}])
    with pytest.raises(ValueError, match=r'has no place for a system message: set data.chat=True'):
        render_prompts('{question}', [ROW], system='S')
    with pytest.raises(ValueError, match=r'has no place for a system message: set data.chat=True'):
        render_prompts('deepseekmath', [ROW], system='S')


def test_every_format_asks_the_question_last():
    examples = [{'question': f'q{n}', 'answer': 'a', 'solution': 's'} for n in range(9)]
    for name, chosen in FORMATS.items():
        (text,) = render_prompts(name, [ROW], examples=examples)
        assert text.count('How many {x}?') == 1
        assert text.count('q1') == (chosen.shots > 0)
        assert all(
            stop in text for stop in chosen.stops
        )  # so they end what the model continues with
        assert text == text.strip()


# Worked examples


def examples(count):
    return [
        {'question': f'q{n}', 'answer': f'{n}', 'solution': f'a<<1+{n}={n}>>\nb {n}\n#### {n}'}
        for n in range(count)
    ]


def test_few_shot_by_hand():
    (text,) = render_prompts('math_4shot', [ROW], examples=examples(20))
    shown = ''.join(
        f'Problem: q{n}\nSolution: a\nb {n}\nThe answer is ${n}$.\n\n' for n in range(4)
    )
    assert text == shown + 'Problem: How many {x}?\nSolution:'
    assert get_format('math_4shot').stops == ('\nProblem:',)
    (text,) = render_prompts('gsm8k_8shot', [ROW], examples=examples(8))
    assert text.startswith('Q: q0\nA: a\nb 0\nThe answer is 0.\n\nQ: q1\nA: a\n')
    assert text.count('\n\nQ: ') == 8
    assert text.endswith('The answer is 7.\n\nQ: How many {x}?\nA:')
    assert get_format('gsm8k_8shot').stops == ('\nQ:',)
    assert (get_format('gsm8k_8shot').shots, get_format('math_4shot').shots) == (8, 4)
    bare = [{'question': f'q{n}', 'answer': str(n)} for n in range(4)]  # SVAMP has no solutions
    (text,) = render_prompts('math_4shot', [ROW], examples=bare)
    assert text.startswith('Problem: q0\nSolution: The answer is $0$.\n\nProblem: q1\n')


def test_no_question_is_among_its_own_examples():
    rows = examples(12)
    texts = render_prompts('gsm8k_8shot', rows, examples=rows)
    for place, text in enumerate(texts):
        *shown, asked = [block.split('\n')[0] for block in text.split('\n\n')]
        assert asked == f'Q: q{place}'
        expected = [n for n in range(9) if n != place][:8]
        assert shown == [f'Q: q{n}' for n in expected]
    (text,) = render_prompts('gsm8k_8shot', [{'question': ' Q3\n'}], examples=rows)
    assert 'Q: q3' not in text


def test_examples_are_different():
    rows = examples(8)
    repeated = [rows[0], rows[0] | {'question': ' Q0 '}, *rows[1:]]
    (text,) = render_prompts('gsm8k_8shot', [ROW], examples=repeated)
    assert text == render_prompts('gsm8k_8shot', [ROW], examples=rows)[0]
    message = "'gsm8k_8shot' shows 8 worked examples, but there are 7 other than the question"
    for few in (rows[:7], [rows[0], *rows[:7]], [*rows[:7], ROW]):
        with pytest.raises(ValueError, match=message):
            render_prompts('gsm8k_8shot', [ROW], examples=few)


def test_question_keys_by_hand():
    equal = ['How many ?', 'how  many?', ' HOW MANY\n?', 'How\tmany？']
    assert {question_key(text) for text in equal} == {'how many?'}
    different = ['1 2', '12', '1-2', '1+2', '-1 2', 'f(1) 2']
    assert len({question_key(text) for text in different}) == len(different)
    assert question_key('( 3 + 4 ) / 5') == question_key('(3+4)/5')
    question_key(' ' * 100_000 + 'a')  # takes linear time


# Chat templates


@pytest.mark.parametrize('template', [CHATML, WITH_BOS, THINKING])
@pytest.mark.parametrize('system', ['', 'Be brief.'])
def test_chat_prompts_are_those_of_the_tokenizer(template, system):
    tokenizer = chat_tokenizer(template)
    rows = [ROW, {'question': 'b'}]
    texts = render_prompts('deepseekmath', rows, system=system, chat=tokenizer)
    for row, text in zip(rows, texts, strict=True):
        asked = row['question'] + (
            '\nPlease reason step by step, and put your final answer within \\boxed{}.'
        )
        messages = [{'role': 'system', 'content': system}] if system else []
        messages.append({'role': 'user', 'content': asked})
        oracle = tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, tokenize=True, return_dict=False
        )
        ids = tokenizer(text, add_special_tokens=False).input_ids
        assert ids == oracle
        assert ids.count(tokenizer.bos_token_id) == (template == WITH_BOS)
        assert text.endswith('<|im_start|>assistant\n')


def test_a_format_brings_its_system_message():
    tokenizer = chat_tokenizer(CHATML)
    system = FORMATS['r1'].system
    expected = '<|im_start|>system\n{}<|im_end|>\n<|im_start|>user\nHow many {{x}}?<|im_end|>\n'
    (text,) = render_prompts('r1', [ROW], chat=tokenizer)
    assert text == expected.format(system) + '<|im_start|>assistant\n'
    (text,) = render_prompts('r1', [ROW], chat=tokenizer, system='S')
    assert text == expected.format('S') + '<|im_start|>assistant\n'


@pytest.mark.parametrize(
    ('template', 'before', 'token'),
    [
        (CHATML, '', '<|im_end|>'),
        (WITH_BOS, '', '<|im_end|>'),
        (THINKING, '', '<|im_end|>'),
        (SPACED, ' ', '<eos>'),
        (ENDLESS, '', '<eos>'),
        (ENDLESS.replace("'\n'", "'</think>.<|im_end|><eos>'"), '</think>.', '<|im_end|>'),
    ],
)
def test_how_the_assistant_ends(template, before, token):
    tokenizer = chat_tokenizer(template, extra=['<think>', '</think>', '\n'])
    assert turn_end(tokenizer) == (before, tokenizer.convert_tokens_to_ids(token))


def test_chat_templates_that_do_not_fit():
    with pytest.raises(ValueError, match=r'has no chat template: set data.chat=False'):
        render_prompts('{question}', [ROW], chat=chat_tokenizer(None))
    with pytest.raises(ValueError, match='has no chat template'):
        turn_end(chat_tokenizer(None))
    strict = chat_tokenizer(NO_SYSTEM)
    assert render_prompts('{question}', [ROW], chat=strict)[0].startswith('<|im_start|>user')
    with pytest.raises(ValueError, match=r'rejects the system message \(no system') as caught:
        render_prompts('{question}', [ROW], chat=strict, system='S')
    assert isinstance(caught.value.__cause__, jinja2.TemplateError)
    deaf = chat_tokenizer(SPACED.replace('else', "elif m.role == 'assistant'"))
    assert render_prompts('{question}', [ROW], chat=deaf) == ['[INST] How many {x}? [/INST]']
    with pytest.raises(ValueError, match="ignores the system message 'S'"):
        render_prompts('{question}', [ROW], chat=deaf, system='S')
    broken = chat_tokenizer("{{ raise_exception('never') }}")
    for system in ('', 'S'):
        with pytest.raises(ValueError, match='the chat template fails: never'):
            render_prompts('{question}', [ROW], chat=broken, system=system)
    with pytest.raises(ValueError, match="ignores the assistant's message"):
        turn_end(chat_tokenizer('nothing'))


def test_jinja2_is_absent(monkeypatch):
    monkeypatch.setitem(sys.modules, 'jinja2', None)
    with pytest.raises(ValueError, match='chat templates need jinja2: pip install jinja2'):
        render_prompts('{question}', [ROW], chat=chat_tokenizer(CHATML))
