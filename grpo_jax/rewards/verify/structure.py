"""The structure of a normal form: values in brackets and lists, names of values, intervals."""

import itertools
import re
from typing import NamedTuple

from grpo_jax.rewards.verify.normal_form import is_product
from grpo_jax.rewards.verify.numbers import parse_number, same_number

_MATRIX = re.compile(
    r'(?:[(\[|]|\\\{)*\\begin\{([pbvBV]?(?:small)?matrix|array|cases|aligned)\}(?:\{(?:[lcr|]|@\{[^{}]*\})*\})?(.*)'
    r'\\end\{\1\}[)\]|]*'
)
_FACTOR = re.compile(  # of a matrix
    r'(?:-|-?(?:[0-9.]+|\\frac\{[0-9]+\}\{[0-9]+\}|\\sqrt\{[0-9]+\}))(?=[(\[]?\\begin\{p?(?:small)?matrix)'
)
_CONDITION = re.compile('^(?:if|for|when)(?=[^A-Za-z]|[A-Za-z](?![A-Za-z]))')
_OTHERWISE = re.compile(r'(?i:otherwise|elsewhere|else|others?)|其[他它余]')
_OPENING, _CLOSING = '([{', ')]}'
_BRACKETS = (('\\{', '\\}'), ('(', ')'), ('[', ']'), ('(', ']'), ('[', ')'))
_LETTER = re.compile(
    r'(?<![\\A-Za-z])[A-Za-z]|\\(?:alpha|beta|gamma|theta|lambda|mu|phi)(?![A-Za-z])'
)
_SUBSCRIPT = r'(?:_(?:[0-9A-Za-z]|\{[^{}]*\}))?'
_NO_SYMBOL = (
    'ln|log|sin|cos|tan|sinh|cosh|tanh|coth|sech|csch|sgn|sqrt|frac|pi|infty|pm|in|ne|le|ge|cup|cap'
    '|lor|land'
)
_SYMBOL = rf"(?:[A-Za-z]|\\(?!(?:{_NO_SYMBOL})(?![a-z]))[a-z]+){_SUBSCRIPT}'*"
_POINTS = r"[A-Z]'?[A-Z]'?[A-Z]?"
_NAME = re.compile(
    rf'{_SYMBOL}(?:\([A-Za-z](?:,[A-Za-z])*\))?'
    rf"|(?:[fgh]|[A-Z]|[A-Z][a-z]{{1,2}}){_SUBSCRIPT}(?:\^\{{-1\}})?'*[(\[].*[)\]]"  # f(3), P(X=3)
    rf'|m?\\(?:angle|triangle|widehat|overline|overrightarrow|vec|hat|bar)'
    rf'[ {{(]?(?:{_POINTS}|[A-Za-z])[)}}]?'
    rf'|\|?{_POINTS}\|?'
    r'|\\(?:sin|cos|tan|cot|sec|csc) ?(?:[A-Z]|\\angle ?[A-Z]+|\([A-Z]\)|\\[a-z]+)'
    rf'|\\vec\{{?[a-zA-Z]+\}}?\\cdot ?\\vec\{{?[a-zA-Z]+\}}?'
    r'|\|\|[a-z]\|\||\|{1,2}(?:[A-Zzw]|\\(?:vec|mathbf)\{?[a-z]\}?|\\(?:vec|overrightarrow)\{?[A-Z]{2}\}?)\|{1,2}'
    r'|\[[A-Z]{3,}\]|[A-Z]{2}(?:\+[A-Z]{2})+|[A-Z]{2}:[A-Z]{2}|\\frac\{[A-Z]{2}\}\{[A-Z]{2}\}'
    r'|[ACP]_(?:[0-9n]|\{[0-9n]+\})\^(?:[0-9km]|\{[0-9km]+\})'
    r'|\\(?:frac|d?frac)\{d[a-z]?\}\{d[a-z]\}[a-z]?|\\(?:sum|int|lim|prod|det|gcd|lcm|max|min|dim|deg|Pr)(?![a-z]).*'
    r'|[A-Za-z]{3,}(?:\([^()]*\))?'  # a word
)
_NAMES = re.compile(rf'\(({_SYMBOL}(?:[,;]{_SYMBOL})+)\)')
_MEMBER = re.compile(rf'({_SYMBOL})\\in(?![A-Za-z])')
_BRACES_IN_NAME = re.compile(r'\\(?:overline|bar|vec|hat)(?![A-Za-z])|m(?=\\angle)|[ {}|]')
_VARIABLE = re.compile('(?![ei])[A-Za-z]|[A-Z]{2}')
_FUNCTION_OF_X = re.compile(r'[fgh]\(x\)')


class Parts(NamedTuple):
    """An answer that consists of several answers."""

    kind: str  # the brackets, 'list', 'union', 'row' of cases, 'matrix RxCxC', 'cases RxC…'
    elements: tuple[str, ...]

    @property
    def ordered(self) -> bool:
        return self.kind not in ('list', 'union', r'\{\}') and not self.kind.startswith('cases')


def split_parts(text: str) -> Parts | None:
    """Return the elements of a list, tuple, interval, set, union or matrix; None for one value."""
    if '\\begin' in text:
        return _split_environment(text)
    row = split_outside(text, '&')
    if len(row) > 1:
        return Parts('row', tuple(row))
    union = split_outside(text, '\\cup')
    if len(union) > 1:
        return Parts('union', tuple(union))
    elements = split_elements(text)
    if len(elements) > 1:
        return Parts('list', _solutions(expand_signs(elements)))
    if '\\pm' in text or '\\mp' in text:
        expanded = expand_signs([text])
        return Parts('list', expanded) if len(expanded) > 1 else None
    for opening, closing in _BRACKETS:
        if text.startswith(opening) and text.endswith(closing):
            inside = text[len(opening) : -len(closing)]
            elements = split_elements(inside)
            if opening == '[' and (rows := _nested_rows(elements)):
                return rows
            if elements and (len(elements) > 1 or opening == '\\{'):
                unordered = opening == '\\{'
                return Parts(
                    opening + closing, expand_signs(elements) if unordered else tuple(elements)
                )
    return None


def _split_environment(text: str) -> Parts | None:
    r"""Return the elements of a matrix, a system or cases; None for any other environment.

    Those of `\begin{cases}1&x>0\\2&x\le0\end{cases}` are the rows `1&x>0` and `2&x\le0`.
    """
    factor = _FACTOR.match(text)
    matrix = _MATRIX.fullmatch(text, factor.end() if factor else 0)
    if not matrix:
        return None
    rows = [row.split('&') for row in matrix[2].removesuffix('\\\\').split('\\\\')]
    equations = all('=' in cell for row in rows for cell in row)
    is_system = matrix[1] in ('cases', 'aligned') or text.startswith('\\{') or equations
    kind = 'cases' if is_system else 'matrix'
    kind = 'determinant' if text.startswith('|') or matrix[1].startswith(('v', 'V')) else kind
    shape = f'{kind} {len(rows)}x{"x".join(str(len(row)) for row in rows)}'
    if kind == 'cases':
        elements = ['&'.join(_case(cell) for cell in row) for row in rows]
        return None if factor else Parts(shape, tuple(elements))
    cells = [cell.strip(',') for row in rows for cell in row]
    if not factor:
        return Parts(shape, tuple(cells))
    return Parts(shape, tuple(f'{factor[0]}({c})' for c in cells)) if kind == 'matrix' else None


def _case(cell: str) -> str:
    """Return a value or condition of a case without `if`, and `else` as `otherwise`."""
    cell = _CONDITION.sub('', cell.strip(','))
    return 'otherwise' if _OTHERWISE.fullmatch(cell) else cell


def _nested_rows(elements: list[str]) -> Parts | None:
    """Return the matrix of the rows in `[[1,2],[3,4]]`; None for any other elements."""
    if any(element[:1] != '[' or element[-1:] != ']' for element in elements):
        return None
    rows = [split_elements(element[1:-1]) for element in elements]
    if len({len(row) for row in rows}) != 1 or not rows[0]:
        return None
    if len(rows) == 1 and len(rows[0]) < 3:  # an interval in brackets
        return None
    shape = f'matrix {len(rows)}x{"x".join(str(len(row)) for row in rows)}'
    return Parts(shape, tuple(cell for row in rows for cell in row))


def expand_signs(elements: list[str]) -> tuple[str, ...]:
    r"""Replace each element that contains `\pm` by its two values."""
    return tuple(
        value
        for element in elements
        for value in (
            [
                element.replace('\\pm', '+').replace('\\mp', '-').lstrip('+').replace('=+', '='),
                element.replace('\\pm', '-').replace('\\mp', '+').lstrip('+').replace('=+', '='),
            ]
            if '\\pm' in element or '\\mp' in element
            else [element]
        )
    )


def split_elements(text: str) -> list[str]:
    """Split at commas and semicolons outside brackets; no pieces if brackets do not match."""
    by_semicolon = split_outside(text, ';')
    if len(by_semicolon) < 2:
        return split_outside(text, ',')
    return [piece for part in by_semicolon for piece in split_outside(part, ',')]


def split_outside(text: str, separator: str) -> list[str]:
    """Split at separators outside brackets; return no pieces if brackets do not match."""
    pieces: list[str] = []
    depth = start = position = 0
    while position < len(text):
        depth += (text[position] in _OPENING) - (text[position] in _CLOSING)
        if depth < 0:
            return []
        if not depth and text.startswith(separator, position):
            pieces.append(text[start:position])
            position += len(separator)
            start = position
        else:
            position += 1
    return [] if depth else [*pieces, text[start:]]


def split_name(text: str) -> tuple[str, str]:
    r"""Return the name of a value, '' if there is none, and the value.

    `('x', '5')` for `x=5`, `5=x` and `x=10/2=5`, `('', '5')` for `2+3=5`, `('x', '[0,1)')` for
    `x\in[0,1)`, `('P(X=3)', r'\frac{1}{8}')` for `P(X=3)=\frac{1}{8}`. An equation, such as
    `x+y=5` or `-x=3`, has neither name nor value: `('', text)`. Neither has `5=120`.
    """
    member = _MEMBER.match(text)
    if member and not _MEMBER.search(text, member.end()):
        return member[1], text[member.end() :]
    left, _, right = text.partition('=')
    if '\\begin' in left:
        return '', text
    if right.startswith('\\begin') and right.count('\\begin') == 1 and right.endswith('}'):
        return (_canonical_name(left), right) if is_name(left) else ('', text)
    pieces = split_outside(text, '=')
    first, rest = pieces[:1], pieces[1:]
    if not rest or not all(pieces) or any(',' in p or ';' in p for p in rest[:-1]):
        return '', text
    left, last = first[0], rest[-1]
    if _contradict(pieces):
        return '', text
    if is_name(left):
        names = [left, *(piece for piece in rest[:-1] if _VARIABLE.fullmatch(piece))]
        return '='.join(map(_canonical_name, names)), last
    if not _LETTER.search(text):
        return '', last
    return (_canonical_name(last), left) if len(rest) == 1 and is_name(last) else ('', text)


def _contradict(sides: list[str]) -> bool:
    """Return whether two sides of an equation are numbers that are not even roughly equal."""
    numbers = [number for number in map(parse_number, sides) if number]
    return any(
        not same_number(a, b) and abs(a.value - b.value) * 10 > max(abs(a.value), abs(b.value))
        for a, b in itertools.pairwise(numbers)
    )


def is_equation(text: str) -> bool:
    """Return whether the text is one equation; a list such as `x=1,x=2` is none."""
    if text.startswith('\\begin'):
        return False
    return '=' in text and len(split_outside(text, '=')) > 1 and len(split_elements(text)) < 2


def is_name(text: str) -> bool:
    """Return whether the text is what a value can be called: `x`, `S_{10}`, `f(3)`, `AB`."""
    if _NAMES.fullmatch(text):
        return True
    first = min((text.find(c) for c in '([' if c in text), default=-1)
    one_call = first < 0 or bool(split_outside(text[first + 1 : -1], '\0'))
    return bool(_NAME.fullmatch(text)) and one_call and not is_product(text)


def same_name(a: str, b: str) -> bool:
    """Return whether two names may stand for the same value; '' may stand for any."""
    if not a or not b or a == b:
        return True
    return 'y' in (a, b) and bool(_FUNCTION_OF_X.fullmatch(a) or _FUNCTION_OF_X.fullmatch(b))


def named_values(parts: Parts) -> dict[str, str] | None:
    """Return the values of a list by their different names; None if it is no such list."""
    if parts.kind == 'list' or parts.kind.startswith('cases') or parts.kind == '()':
        named = [_name_and_value(element) for element in parts.elements]
        if all(name for name, _ in named) and len({name for name, _ in named}) == len(named):
            return dict(named)
    return None


def _solutions(elements: tuple[str, ...]) -> tuple[str, ...]:
    """Join the values of each solution: `x=1, y=2, x=2, y=1` are `x=1, y=2` and `x=2, y=1`."""
    names = [_name_and_value(element)[0] for element in elements]
    count = len(set(names))
    if not all(names) or not 1 < count < len(names) or len(names) % count:
        return elements
    starts = range(0, len(names), count)
    if any(len(set(names[start : start + count])) < count for start in starts):
        return elements
    return tuple(','.join(elements[start : start + count]) for start in starts)


def _name_and_value(element: str) -> tuple[str, str]:
    """Return name and value as `split_name`, with a description in words as the name."""
    name, value = split_name(element)
    words = element.partition('=')[0]
    return (name or words.lower() if is_name(words) else name), value


def tuple_names(text: str) -> Parts | None:
    """Return `(x,y)=(1,2)` as the list x=1, y=2; None if the text is anything else."""
    pieces = split_outside(text, '=')
    if any(len(split_elements(piece)) > 1 for piece in pieces[1:-1]):
        return None
    names = _NAMES.fullmatch(pieces[0]) if len(pieces) > 1 else None
    values = split_parts(pieces[-1]) if names else None
    if not names or not values or values.kind != '()':
        return None
    letters = re.split('[,;]', names[1])
    if len(letters) != len(values.elements):
        return None
    return Parts('list', tuple(f'{n}={v}' for n, v in zip(letters, values.elements, strict=True)))


def _canonical_name(name: str) -> str:
    """Return one spelling of a name; '' for a description in words."""
    if re.fullmatch('[A-Za-z]{3,}', name) and not name.isupper():
        return ''
    name = _BRACES_IN_NAME.sub('', name)
    return ''.join(sorted(name)) if re.fullmatch('[A-Z]{2}', name) else name
