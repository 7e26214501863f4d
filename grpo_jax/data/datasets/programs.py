"""Derive the columns of programming problems from the rows of published data sets.

They are those that the rewards for programs take: `test` (source of unit tests), `entry_point` (the
name of the tested function) and `prefix` (source before the program), or `inputs` and `outputs`
(lists of texts that a program reads and prints). A row with tests has empty lists, and a row with
inputs an empty `test`. Each function raises ValueError for a row that has neither.
"""

import ast
import base64
import io
import json
import pickle
import zlib
from collections.abc import Sequence
from typing import Any

from grpo_jax.data.datasets.records import Row

# Tests of a function whose results are JSON: a tuple counts as a list. Some data sets put the
# expected value into a list.
_CALLS = """
def same(value, expected):
    value = list(value) if isinstance(value, tuple) else value
    return value == expected or [value] == expected

"""


def humaneval(row: Row) -> Row:
    """The question is the beginning of the program, which the tests may use too."""
    return {'prefix': row['question']}


def mbpp(row: Row) -> Row:
    """The columns of the full and of the sanitized data set; the first tested function."""
    tests = _list(row, 'test_list')
    imports = _list(row, 'test_imports') if 'test_imports' in row else []
    setup = row.get('test_setup_code', '').strip()
    text = row.get('text') or row.get('prompt')
    if not text:
        raise ValueError("there is neither a column 'text' nor 'prompt'")
    return {
        'question': text,
        'solution': row['code'],
        'test': '\n'.join(tests),
        'entry_point': _tested(row['code'], '\n'.join(tests)),
        'prefix': ''.join(f'{part}\n' for part in [*imports, setup] if part),
    }


def apps(row: Row) -> Row:
    """Inputs and outputs of programs, or calls of the function `fn_name`."""
    cases = _json(row, 'input_output')
    if not isinstance(cases, dict) or not cases.get('inputs'):
        raise ValueError("the column 'input_output' has no inputs")
    inputs, outputs = cases['inputs'], cases.get('outputs')
    if not isinstance(outputs, list) or len(outputs) != len(inputs):
        raise ValueError("the column 'input_output' has not one output for each input")
    name = cases.get('fn_name')
    if name:
        return _calls(name, list(zip(inputs, outputs, strict=True)), row.get('starter_code', ''))
    return _cases([_joined(text) for text in inputs], [_joined(text) for text in outputs])


def livecodebench(row: Row) -> Row:
    """Public and private cases, of a program or of the function that the metadata name."""
    cases = _json(row, 'public_test_cases') + _private_cases(row['private_test_cases'])
    functional = [case for case in cases if case.get('testtype') == 'functional']
    if not cases or len(functional) not in (0, len(cases)):
        raise ValueError('the test cases are neither all of a program nor all of a function')
    if functional:
        calls = [
            ([json.loads(line) for line in case['input'].split('\n')], json.loads(case['output']))
            for case in cases
        ]
        return _calls(_json(row, 'metadata')['func_name'], calls, row.get('starter_code', ''))
    return _cases([case['input'] for case in cases], [case['output'] for case in cases])


def _cases(inputs: Sequence[str], outputs: Sequence[str]) -> Row:
    return {
        'inputs': list(inputs), 'outputs': list(outputs),
        'test': '', 'entry_point': '', 'prefix': '',
    }  # fmt: skip


def _calls(name: str, calls: Sequence[tuple[Any, Any]], starter: str) -> Row:
    """Return the columns of a function, or of a method of the class `Solution`."""
    called = f'Solution().{name}' if 'class Solution' in starter else name
    lines = [f'assert same({called}(*{given!r}), {expected!r})\n' for given, expected in calls]
    return {
        'inputs': [], 'outputs': [], 'test': _CALLS + ''.join(lines),
        'entry_point': 'Solution' if 'class Solution' in starter else name,
        'prefix': 'from typing import *\n',
    }  # fmt: skip


def _tested(solution: str, tests: str) -> str:
    """Return the name of the first function of a solution that the tests use."""
    try:
        defined = {getattr(node, 'name', '') for node in ast.parse(solution).body}
        used = [node.id for node in ast.walk(ast.parse(tests)) if isinstance(node, ast.Name)]
    except SyntaxError as error:
        raise ValueError(f'the solution or a test is not Python: {error}') from error
    for name in used:
        if name in defined:
            return name
    raise ValueError('the tests use no function of the solution')


def _joined(text: object) -> str:
    """Return a text, of its lines where it is a list."""
    return '\n'.join(map(str, text)) if isinstance(text, list) else str(text)


def _json(row: Row, column: str) -> Any:
    try:
        return json.loads(row[column])
    except KeyError:
        raise ValueError(f'column {column!r} is missing') from None
    except ValueError as error:
        raise ValueError(f'column {column!r} is not JSON: {error}') from error


def _list(row: Row, column: str) -> list[str]:
    value = _json(row, column)
    if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
        raise ValueError(f'column {column!r} is not a list of texts')
    return value


class _Text(pickle.Unpickler):
    """Reads pickled texts, and nothing that would import a module."""

    def find_class(self, module: str, name: str) -> Any:
        raise pickle.UnpicklingError(f'it names {module}.{name}, where a text is expected')


def _private_cases(text: str) -> list[Any]:
    """Return cases that are JSON, or JSON pickled, compressed and in base 64."""
    try:
        return json.loads(text)
    except ValueError:
        pass
    try:
        packed = zlib.decompress(base64.b64decode(text))
        return json.loads(_Text(io.BytesIO(packed)).load())
    except (ValueError, TypeError, zlib.error, pickle.UnpicklingError, EOFError) as error:
        raise ValueError(f"column 'private_test_cases' cannot be read: {error}") from error
