"""Tool calls in what models write, in every format."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from grpo_jax.environments import tool_calls
from grpo_jax.environments.tool_calls import MAX_CALLS, detect, parse

TOOLS = {'search': ['query', 'k'], 'python': ['code'], 'now': []}
JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(10**6), 10**6) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


def calls(text, format, tools=TOOLS):
    """(name, arguments, whether there is an error) of each call."""
    return [(c.name, dict(c.arguments), bool(c.error)) for c in parse(text, format, tools)]


def error(text, format, tools=TOOLS):
    (call,) = parse(text, format, tools)
    return call.error


SEARCH = '{"name": "search", "arguments": {"query": "a {b} \\"c\\" </tool_call>", "k": 2}}'
FOUND = ('search', {'query': 'a {b} "c" </tool_call>', 'k': 2}, False)


@pytest.mark.parametrize(
    ('text', 'expected'),
    [
        ('no call at all', []),
        (f'<tool_call>\n{SEARCH}\n</tool_call>', [FOUND]),
        (f'I look.<tool_call>{SEARCH}</tool_call>\nand wait', [FOUND]),
        (f'<tool_call>{SEARCH}</tool_call><tool_call>{{"name":"now"}}</tool_call>',
         [FOUND, ('now', {}, False)]),
        (f'<tool_call>{SEARCH}', [FOUND]),  # the stop string was cut off
        ('<tool_call>{"name": "python", "arguments": {"code": "s = \'<tool_call>{\'"}}</tool_call>',
         [('python', {'code': "s = '<tool_call>{'"}, False)]),
        ('<tool_call>{"name": "now", "parameters": {}}</tool_call>', [('now', {}, False)]),
        ('<tool_call>{"type": "function", "function": {"name": "now", "arguments": "{}"}}',
         [('now', {}, False)]),
        ('<tool_call>{"name": "python", "arguments": {"code": "a\nb"}}</tool_call>',  # a raw \n
         [('python', {'code': 'a\nb'}, False)]),
        ('<think><tool_call>{"name": "now"}</tool_call></think>done', []),
        ('<tool_call>{"name": "now"}{"name": "now"}</tool_call>', [('now', {}, True)]),
        ('<tool_call>{"name": "now", "arguments": null}</tool_call>', [('now', {}, False)]),
        ('<tool_call>{"name": "now", }</tool_call>', [('', {}, True)]),
        ('<tool_call></tool_call>', [('', {}, True)]),
        ('<tool_call>now()</tool_call>', [('', {}, True)]),
        ('<tool_call>[1]</tool_call>', [('', {}, True)]),
        ('<tool_call>{"name": 3}</tool_call>', [('', {}, True)]),
        ('<tool_call>{"name": "now", "arguments": [1]}</tool_call>', [('now', {}, True)]),
        ('<tool_call>{"name": "now", "arguments": {"x": NaN}}</tool_call>', [('', {}, True)]),
        ('<tool_call>{"name": "now", "arguments": {"x": 1e999}}</tool_call>', [('', {}, True)]),
        ('<tool_call>{"name": "now", "arguments": {"x": ' + '[' * 999 + '</tool_call>',
         [('', {}, True)]),
        ('<tool_call>{"name": "now", "arguments": {"x": ' + '[' * 99 + ']' * 99 + '}}</tool_call>',
         [('', {}, True)]),
        ('<tool_call>{"name": "now", "arguments": {"x": ' + '9' * 5000 + '}}</tool_call>',
         [('', {}, True)]),
        ('<tool_call>{bad}</tool_call><tool_call>{"name": "now"}</tool_call>',
         [('', {}, True), ('now', {}, False)]),
    ],
)  # fmt: skip
def test_hermes(text, expected):
    assert calls(text, 'hermes') == expected


LLAMA = '{"name": "search", "parameters": {"query": "x; {y}"}}'
LOOKED = ('search', {'query': 'x; {y}'}, False)


@pytest.mark.parametrize(
    ('text', 'expected'),
    [
        ('The answer is 4.', []),
        ('{"answer": 4}', []),
        (LLAMA, [LOOKED]),
        (f'\n {LLAMA}\n', [LOOKED]),
        (f'<|python_tag|>{LLAMA}', [LOOKED]),
        (f'Let me see. <|python_tag|>{LLAMA}; {{"name": "now", "parameters": {{}}}}',
         [LOOKED, ('now', {}, False)]),
        ('{"type": "function", "name": "now", "parameters": {}}', [('now', {}, False)]),
        ('<|python_tag|>print(1)\nprint(2)', [('python', {'code': 'print(1)\nprint(2)'}, False)]),
        ('<|python_tag|>search.call(query="a(b)", k=2)',
         [('search', {'query': 'a(b)', 'k': 2}, False)]),
        ('<|python_tag|>os.call(1)', [('python', {'code': 'os.call(1)'}, False)]),
        ('I look. <function=search>{"query": "x"}</function>', [('search', {'query': 'x'}, False)]),
        ('<function=search>{"query": "x"}', [('search', {'query': 'x'}, True)]),
        ('<function=now>{}</function> <function=now>oh</function>',
         [('now', {}, False), ('now', {}, True)]),
        (f'{LLAMA} and so on', [('search', {'query': 'x; {y}'}, True)]),
        ('{"name": "now", "parameters": ', [('', {}, True)]),
        ('<|python_tag|>', [('', {}, True)]),
    ],
)  # fmt: skip
def test_llama3(text, expected):
    assert calls(text, 'llama3') == expected


@pytest.mark.parametrize(
    ('text', 'expected'),
    [
        ('no code', []),
        ('```python\nx = "```"\nprint(x)\n```\nso', [('python', {'code': 'x = "```"\nprint(x)\n'},
                                                     False)]),
        ('a\n```\n1\n```\nb\n```py\n2\n```', [('python', {'code': '1\n'}, False),
                                              ('python', {'code': '2\n'}, False)]),
        ('- so:\n  ```Python\n  if 1:\n    2\n  ```',
         [('python', {'code': 'if 1:\n  2\n'}, False)]),
        ('```bash\nls\n```', []),
        ('```json\n{}\n```\n```tool_code\n3\n```', [('python', {'code': '3\n'}, False)]),
        ('```python\nwithout an end', [('python', {'code': 'without an end'}, True)]),
    ],
)  # fmt: skip
def test_fenced(text, expected):
    assert calls(text, 'fenced') == expected


CALCULATOR = {'calculator': ['expression'], 'move': ['x', 'y']}


@pytest.mark.parametrize(
    ('text', 'expected'),
    [
        ('12', []),
        ('calculator(12*(3+4))', [('calculator', {'expression': '12*(3+4)'}, False)]),
        ('so calculator(12*34)\n', [('calculator', {'expression': '12*34'}, False)]),
        ('calculator("1 + 2")', [('calculator', {'expression': '1 + 2'}, False)]),
        ('calculator(5)', [('calculator', {'expression': 5}, False)]),
        ('calculator(1,000)', [('calculator', {'expression': '1,000'}, False)]),
        ('calculator()', [('calculator', {}, False)]),
        ("move(1, y='b')\nmove(y=2, x=-1)", [('move', {'x': 1, 'y': 'b'}, False),
                                             ('move', {'x': -1, 'y': 2}, False)]),
        ('move(1, 2, 3)', [('move', {}, True)]),
        ('move(1, x=2)', [('move', {}, True)]),
        ('move(a, b)', [('move', {}, True)]),
        ('move(*[1], 2)', [('move', {}, True)]),
        ('calculator(12*34', [('calculator', {}, True)]),
        ('my_calculator(1) or x.calculator(1)', []),
        ('calculators(1)', []),
        ('calculator(' + '(' * 400 + ')', [('calculator', {'expression': '(' * 400}, False)]),
    ],
)  # fmt: skip
def test_plain(text, expected):
    assert calls(text, 'plain', CALCULATOR) == expected


def test_errors_tell_the_model_what_to_do():
    message = error('<tool_call>{"name": "serch"}</tool_call>', 'hermes')
    assert (
        message == "there is no tool 'serch', did you mean 'search'?: there are search, python, now"
    )
    assert 'it is no JSON' in error('<tool_call>{]</tool_call>', 'hermes')
    assert error('```python\nx', 'fenced') == 'the block has no end: ```'
    assert '\n' not in error('<tool_call>{"name": "' + 'x\\n' * 500 + '"}', 'hermes')


def test_a_turn_has_a_bounded_number_of_calls():
    found = parse('<tool_call>{"name": "now"}</tool_call>' * 1000, 'hermes', TOOLS)
    assert len(found) == 2 * MAX_CALLS
    assert [bool(call.error) for call in found] == [False] * MAX_CALLS + [True] * MAX_CALLS


def test_the_format_follows_from_the_template_and_the_tools():
    assert detect(['... <tool_call> ...'], TOOLS) == 'hermes'
    assert detect(['{{ "<|python_tag|>" }}'], TOOLS) == 'llama3'
    assert detect(['chatml'], TOOLS) == 'fenced'
    assert detect([], {'calculator': ['expression']}) == 'plain'
    assert tool_calls.code_tool({'a': ['code'], 'b': ['code']}) is None


@given(st.sampled_from(['search', 'python', 'now']), st.dictionaries(st.text(), JSON, max_size=3),
       st.text(), st.text())  # fmt: skip
def test_what_is_written_is_read(name, arguments, before, after):
    before = before.replace('<tool_call>', '')
    after = after.replace('<tool_call>', '').replace('</think>', '')
    written = json.dumps({'name': name, 'arguments': arguments})
    if '</think>' in written:
        return
    found = parse(f'{before}<tool_call>{written}</tool_call>{after}', 'hermes', TOOLS)
    assert found == ((name, arguments, ''),)


@given(st.text(alphabet=st.sampled_from('<tool_call>/{}[]":,name \n`python()|_'), max_size=80),
       st.sampled_from(sorted(tool_calls.FORMATS)))  # fmt: skip
def test_any_text_is_read(text, format):
    for call in parse(text, format, TOOLS):
        assert call.error or call.name in TOOLS
        json.dumps(call.arguments)
