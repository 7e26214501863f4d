"""Read the tool calls in what a model wrote, in the formats that models use.

Formats, by name:

- `hermes`: `<tool_call>{"name": …, "arguments": {…}}</tool_call>`, any number of them, as Qwen and
  Hermes write.
- `llama3`: after `<|python_tag|>`, or as the whole text, JSON with `name` and `parameters`, several
  with `;` between; after the tag also `name.call(arguments)`, or Python for a tool that runs code;
  and `<function=name>{…}</function>` anywhere.
- `fenced`: a block of Python between fences of three backticks, for a tool that runs code.
- `plain`: a line that ends in `name(arguments)` with the name of a tool, for small models.

What looks like a call and cannot be read is a call with an error, so that the model is told.
"""

import ast
import json
import math
import re
import textwrap
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from grpo_jax.environments.turns import ToolCall, one_line
from grpo_jax.plugins import did_you_mean

MAX_CALLS = 16  # in a turn; the calls after them are answered by an error

Parameters = Mapping[str, Sequence[str]]  # tool -> names of its parameters

_THOUGHT = '</think>'
_HERMES, _HERMES_END = '<tool_call>', '</tool_call>'
_PYTHON_TAG = '<|python_tag|>'
_FENCE = re.compile(
    r'^[ \t]*```[ \t]*([\w+-]*)[^\n]*\n(.*?)(^[ \t]*```|\Z)', re.DOTALL | re.MULTILINE
)
_FUNCTION = re.compile(r'<function=([\w.-]+)>(.*?)(</function>|\Z)', re.DOTALL)
_DOT_CALL = re.compile(r'(\w+)\.call\((.*)\)', re.DOTALL)
_PYTHON = ('', 'py', 'python', 'python3', 'tool_code')
_DEEPEST = 64  # levels of JSON


def parse(text: str, format: str, parameters: Parameters) -> tuple[ToolCall, ...]:
    """Return the tool calls in a turn, in their order; none where it has none.

    Calls in a thought, before `</think>`, do not count.

    Args:
        text: what the model wrote.
        format: a key of `FORMATS`.
        parameters: the tools that there are.
    """
    calls = FORMATS[format](text.rpartition(_THOUGHT)[2], parameters)
    surplus = f'at most {MAX_CALLS} calls are carried out in a turn'
    return tuple(
        _checked(call, parameters) if number < MAX_CALLS else call._replace(error=surplus)
        for number, call in enumerate(calls[: 2 * MAX_CALLS])
    )


def detect(templates: Sequence[str], parameters: Parameters) -> str:
    """Return the format that a model writes, by its chat templates and the tools."""
    text = '\n'.join(templates)
    for marker, format in ((_HERMES, 'hermes'), (_PYTHON_TAG, 'llama3')):
        if marker in text:
            return format
    return 'fenced' if code_tool(parameters) else 'plain'


def code_tool(parameters: Parameters) -> str | None:
    """Return the tool that runs blocks of code: the only one with the single parameter `code`."""
    tools = [name for name, names in parameters.items() if list(names) == ['code']]
    return tools[0] if len(tools) == 1 else None


def hermes(text: str, parameters: Parameters) -> list[ToolCall]:
    """Return the calls between `<tool_call>` and `</tool_call>`."""
    calls, position = [], 0
    while (start := text.find(_HERMES, position)) >= 0:
        position = start + len(_HERMES)
        value, end, error = _json_at(text, position)
        if error:
            calls.append(ToolCall('', {}, error))
            continue
        position = end
        rest = text[end:].lstrip()
        closed = not rest or rest.startswith(_HERMES_END)
        error = '' if closed else f'after the JSON comes {rest!r:.40}, not {_HERMES_END}'
        calls.append(_call(value) if closed else _call(value)._replace(error=error))
    return calls


def llama3(text: str, parameters: Parameters) -> list[ToolCall]:
    """Return the calls after `<|python_tag|>`, those that are the whole text, or tagged ones."""
    if tagged := _FUNCTION.findall(text):
        return [_tagged(name, inside, end) for name, inside, end in tagged]
    _, tag, body = text.partition(_PYTHON_TAG)
    rest = (body if tag else text).strip()
    if not tag and not re.match(r'\{\s*"(name|type|parameters)"', rest):
        return []
    if not rest:
        return [ToolCall('', {}, f'after {_PYTHON_TAG} comes nothing')]
    if tag and (match := _DOT_CALL.fullmatch(rest)) and match[1] in parameters:
        return [_plain_call(match[1], match[2], parameters[match[1]])]
    if tag and not rest.startswith('{') and (name := code_tool(parameters)):
        return [ToolCall(name, {'code': rest})]
    calls: list[ToolCall] = []
    while rest:
        value, end, error = _json_at(rest, 0)
        if error:
            return [*calls, ToolCall('', {}, error)]
        calls.append(_call(value))
        rest = rest[end:].lstrip(' \t\r\n;')
        if rest and not rest.startswith('{'):
            return [*calls[:-1], calls[-1]._replace(error=f'after the JSON comes {rest!r:.40}')]
    return calls


def _tagged(name: str, inside: str, end: str) -> ToolCall:
    value, _, error = _json_at(inside, 0)
    call = _call({'name': name, 'arguments': value})
    error = error or ('' if end else 'it has no end: </function>')
    return call._replace(error=error or call.error)


def fenced(text: str, parameters: Parameters) -> list[ToolCall]:
    """Return the blocks of Python, as calls of the tool that runs code."""
    name = code_tool(parameters) or ''
    return [
        ToolCall(name, {'code': textwrap.dedent(code)}, '' if end else 'the block has no end: ```')
        for language, code, end in _FENCE.findall(text)
        if language.lower() in _PYTHON
    ]


def plain(text: str, parameters: Parameters) -> list[ToolCall]:
    """Return the lines that end in `name(arguments)`.

    Arguments are Python's literals. Of a tool with one parameter, what is between the parentheses
    is its text where it is no literal, as in `calculator(12*34)`.
    """
    names = '|'.join(map(re.escape, sorted(parameters, key=len, reverse=True)))
    start = re.compile(rf'(?<![\w.])({names})\(')
    calls = []
    for line in text.splitlines():
        if names and (match := start.search(line)):
            name, rest = match[1], line[match.end() :].rstrip()
            if rest.endswith(')'):
                calls.append(_plain_call(name, rest[:-1], parameters[name]))
            else:
                calls.append(ToolCall(name, {}, 'the line does not end with its `)`'))
    return calls


FORMATS: dict[str, Callable[[str, Parameters], list[ToolCall]]] = {
    'hermes': hermes,
    'llama3': llama3,
    'fenced': fenced,
    'plain': plain,
}


def _plain_call(name: str, inside: str, names: Sequence[str]) -> ToolCall:
    try:
        call = ast.parse(f'f({inside})', mode='eval').body
        if not isinstance(call, ast.Call) or any(word.arg is None for word in call.keywords):
            raise ValueError
        values = [ast.literal_eval(value) for value in call.args]
        words = {str(word.arg): ast.literal_eval(word.value) for word in call.keywords}
    except (ValueError, SyntaxError, TypeError, RecursionError, MemoryError):
        if len(names) == 1:
            return ToolCall(name, {names[0]: inside})
        return ToolCall(name, {}, f'{inside!r:.60} are no values of Python')
    if len(names) == 1 and len(values) > 1:  # as in `calculator(1,000)`
        return ToolCall(name, {names[0]: inside})
    if len(values) > len(names):
        return ToolCall(name, {}, f'{len(values)} arguments, but {name} takes {len(names)}')
    arguments = dict(zip(names, values, strict=False))
    if twice := arguments.keys() & words.keys():
        return ToolCall(name, {}, f'the argument {min(twice)!r} is there twice')
    return ToolCall(name, arguments | words)


def _json_at(text: str, start: int) -> tuple[Any, int, str]:
    """Return the JSON value at a position of a text, where it ends, and what is wrong, or ''."""
    match = _SPACE.match(text, start)
    try:
        value, end = _DECODER.raw_decode(text, match.end() if match else start)
    except (ValueError, RecursionError) as error:
        return None, 0, f'it is no JSON: {error}'
    if _is_deeper(value, _DEEPEST):
        return None, 0, f'it is more than {_DEEPEST} levels deep'
    return value, end, ''


def _number(text: str) -> float:
    if not math.isfinite(value := float(text)):
        raise ValueError(f'{text:.20} is too large')
    return value


def _constant(name: str) -> float:
    raise ValueError(f'{name} is not in JSON')


_SPACE = re.compile(r'\s*')
_DECODER = json.JSONDecoder(strict=False, parse_float=_number, parse_constant=_constant)


def _is_deeper(value: Any, levels: int) -> bool:
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return not levels or any(_is_deeper(part, levels - 1) for part in parts)


def _call(value: Any) -> ToolCall:
    """Return the call that a JSON value describes."""
    if isinstance(value, dict) and isinstance(value.get('function'), dict):
        value = value['function']
    if not isinstance(value, dict) or not isinstance(value.get('name'), str):
        return ToolCall('', {}, 'a call is {"name": …, "arguments": {…}}')
    arguments = value.get('arguments', value.get('parameters'))
    if arguments is None:
        return ToolCall(value['name'], {})
    if isinstance(arguments, str):  # JSON in JSON, as in the API of OpenAI
        arguments = _json_at(arguments, 0)[0]
    if not isinstance(arguments, dict):
        return ToolCall(value['name'], {}, 'its arguments are no JSON object')
    return ToolCall(value['name'], arguments)


def _checked(call: ToolCall, parameters: Parameters) -> ToolCall:
    """Return a call with an error if there is no such tool."""
    if call.error or call.name in parameters:
        return call._replace(error=one_line(call.error))
    hint = did_you_mean(call.name, parameters, cutoff=0.6)
    listed = ', '.join(parameters)
    return call._replace(error=f'there is no tool {call.name!r:.60}{hint}: there are {listed}')
