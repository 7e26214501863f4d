r"""Derive the columns `question` and `answer` from the rows of published data sets.

Each function takes a row and returns the columns that it adds or replaces. It raises ValueError for
a row that has no answer.
"""

import re

from grpo_jax.data.datasets.records import Row

_BRACE = re.compile(r'\\.|[{}]', re.DOTALL)
_BOX = re.compile(r'\\(?:boxed|fbox|framebox)(?![a-zA-Z])[ ]*')
_INTEGER = re.compile(r'(-?[0-9]+)\.0+')


def gsm8k(row: Row) -> Row:
    """The number after the last `####` of the solution, without thousands separators."""
    _, marker, answer = row['solution'].rpartition('####')
    answer = answer.strip().replace(',', '')
    if not marker or not answer:
        raise ValueError("the solution has no '#### ' and a number at its end")
    return {'answer': answer}


def math(row: Row) -> Row:
    """The column `answer` if the file has one, otherwise the last box of the solution."""
    return {'answer': row['answer'] if 'answer' in row else boxed(row['solution'])}


def cmath(row: Row) -> Row:
    """The answer without white space around it."""
    return {'answer': row['answer'].strip()}


def svamp(row: Row) -> Row:
    """The story and its question as one text, and the answer without `.0`.

    Some stories lack the comma at their end: `If he has 34 books` / `How many shelves...?`
    """
    story, ending = row['Body'].strip(), row['Question'].strip()
    if story.endswith(('.', '!', '?')):
        question = f'{story} {ending}'
    elif re.search(r'(^|[.!?]\s+)If\b[^.!?]*$', story):
        question = f'{story}, {ending[:1].lower()}{ending[1:]}'
    else:
        question = f'{story}. {ending}'
    return {'question': question, 'answer': number(row['answer'])}


def mawps(row: Row) -> Row:
    """The answer without `.0`."""
    return {'answer': number(row['answer'])}


def number(text: str) -> str:
    """Return a JSON number without the decimal zeros of an integer: `145.0` becomes `145`."""
    try:
        float(text)
    except ValueError:
        raise ValueError(f'the answer {text!r} is not a number') from None
    integer = _INTEGER.fullmatch(text.strip())
    return integer[1] if integer else text.strip()


def boxed(text: str) -> str:
    r"""Return the content of the last `\boxed{...}` or `\fbox{...}`, with balanced braces.

    Without braces (`\boxed 5$`) the content ends before the next dollar sign or line break. Escaped
    braces, as in `\{1, 2\}`, are not counted.

    Raises:
      ValueError: there is no box, it is empty, or its brace is never closed.
    """
    boxes = list(_BOX.finditer(text))
    if not boxes:
        raise ValueError(r'the solution has no \boxed{...}')
    rest = text[boxes[-1].end() :]
    content = _braced(rest) if rest.startswith('{') else re.split(r'[$\n]', rest)[0]
    if not content.strip():
        raise ValueError(r'the last \boxed{...} of the solution is empty')
    return content.strip()


def _braced(text: str) -> str:
    depth = 0
    for token in _BRACE.finditer(text):
        depth += {'{': 1, '}': -1}.get(token.group(), 0)
        if not depth:
            return text[1 : token.start()]
    raise ValueError(r'the brace of the last \boxed{...} of the solution is never closed')
