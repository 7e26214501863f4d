r"""Whether two answers are the same, as `\frac{1}{2}` and 0.5 or `(1, 2]` and `\left(1,2\right]`.

Most pairs are decided by equal text or exact numbers (`numbers.same_number`). Tuples, intervals,
matrices, sets and lists are compared element by element, the last two in any order. What remains
are expressions, which `math-verify` parses and SymPy compares in another process (see `pool`): it
is asked with a tree of questions,
    ['is', a, b] · ['all', trees] · ['any', trees] · true or false.
"""

import re
from collections.abc import Sequence
from typing import Any, NamedTuple

from grpo_jax.rewards import pool
from grpo_jax.rewards.normal import MAX_LENGTH, is_word, normal_form, without_name
from grpo_jax.rewards.numbers import read_number, same_number

SECONDS = 3.0  # for one comparison; the slowest of MATH's takes a third of it on one slow core

Tree = Any  # bool or a list as above

_MAX_DEPTH = 3  # of brackets in brackets that are taken apart
_MAX_UNORDERED = 12  # elements that are compared each with each
_MATRIX = re.compile(r'\\begin\{([pbvBV]?matrix|array)\}(?:\{[lcr|]*\})?(.*)\\end\{\1\}')
_BASE = re.compile(r'(-?[0-9A-F.]+)_([0-9]{1,2}|\{[0-9]{1,2}\})')
_APART = re.compile('(?<![_^0-9])[0-9]+ [0-9]')  # numbers side by side, which would be read as one
_RELATION = re.compile(r'[<>]|\\(?:le|ge|ne|lt|gt|in)(?![A-Za-z])')


class Parts(NamedTuple):
    """An answer that is made of answers."""

    kind: str  # the brackets, 'list', 'union' or 'matrix RxC'
    elements: tuple[str, ...]

    @property
    def ordered(self) -> bool:
        return self.kind not in ('list', 'union', r'\{\}')


def equivalent(a: str, b: str, *, seconds: float = SECONDS) -> bool:
    """Whether two answers are the same; False at the deadline."""
    return bool(equivalent_pairs([(a, b)], seconds=seconds)[0])


def equivalent_pairs(
    pairs: Sequence[tuple[str, str]], *, seconds: float = SECONDS
) -> list[bool | None]:
    """For each pair of answers whether they are the same; None at the deadline of `seconds`.

    Equal pairs are compared once. Pairs are compared in parallel; the order of the results is that
    of the pairs.
    """
    forms = {text: normal_form(text) for text in {text for pair in pairs for text in pair}}
    return _decide([(forms[a], forms[b]) for a, b in pairs], seconds)


def equivalence_classes(
    answers: Sequence[str | None], *, seconds: float = SECONDS
) -> list[int | None]:
    """A class for each answer, counted from 0 in order of appearance; None for None.

    An answer belongs to the first class whose first member it is equivalent to, so a vote is
    `Counter(classes).most_common(1)` with ties going to the answer seen first.
    """
    forms = [None if answer is None else normal_form(answer) for answer in answers]
    left = list(dict.fromkeys(form for form in forms if form is not None))
    readable = _readable(left, seconds)
    first: dict[str, int] = {}  # normal form -> class
    count = 0
    while left:
        # All that is left against the first of it: the questions of one round run in parallel.
        head, *rest = left
        others = [form for form in rest if {head, form} <= readable]
        same = _decide([(head, form) for form in others], seconds)
        first[head] = count
        first.update((form, count) for form, equal in zip(others, same, strict=True) if equal)
        left = [form for form in rest if form not in first]
        count += 1
    # Rounds meet the classes in order of appearance, so their numbers are in that order too.
    return [None if form is None else first[form] for form in forms]


def _readable(forms: Sequence[str], seconds: float) -> set[str]:
    """The forms that can be compared with themselves within `seconds`.

    A vote compares each answer with many: one that cannot be read costs its deadline once this way.
    """
    trees = {form: _probe(form) for form in forms} if len(forms) > 1 else {}
    asked = [form for form, tree in trees.items() if tree is not True]
    verdicts = pool.shared().ask([trees[form] for form in asked], seconds=seconds) if asked else []
    stuck = {form for form, verdict in zip(asked, verdicts, strict=True) if verdict is None}
    return set(forms) - stuck


def _probe(form: str, depth: int = 0) -> Tree:
    """The questions that a comparison of the form with itself would ask."""
    form = without_name(form)
    if len(form) > MAX_LENGTH or read_number(form) or is_word(form) or _BASE.fullmatch(form):
        return True
    parts = _parts(form) if depth < _MAX_DEPTH else None
    if parts:
        return _all([_probe(element, depth + 1) for element in parts.elements])
    return ['is', form, form]


def _decide(pairs: Sequence[tuple[str, str]], seconds: float) -> list[bool | None]:
    """The verdicts on pairs of normal forms."""
    trees = {pair: compare(*pair) for pair in dict.fromkeys(pairs)}
    left = [pair for pair, tree in trees.items() if not isinstance(tree, bool)]
    if left:
        verdicts = pool.shared().ask([trees[pair] for pair in left], seconds=seconds)
        trees.update(zip(left, verdicts, strict=True))
    return [trees[pair] for pair in pairs]


def compare(a: str, b: str, depth: int = 0) -> Tree:
    """The verdict on two normal forms, or the questions that decide it."""
    if a == b:
        return bool(a)
    if not a or not b or max(len(a), len(b)) > MAX_LENGTH:
        return False
    names = without_name(a), without_name(b)
    if names != (a, b) and not any('=' in name for name in names):
        return compare(*names, depth)
    numbers = read_number(a), read_number(b)
    if numbers[0] and numbers[1]:
        return same_number(numbers[0], numbers[1])
    if is_word(a) or is_word(b):
        return False
    if _APART.search(a) or _APART.search(b):
        return False
    if (based := _compare_bases(a, b)) is not None:
        return based
    s, t = _parts(a), _parts(b)
    if depth < _MAX_DEPTH and (s or t):
        return _compare_parts(a, b, s, t, depth + 1)
    # One equation and no name for a value: -x=3 is not 3, whatever stands behind the sign.
    return ['is', a, b] if ('=' in a) == ('=' in b) else False


def _compare_parts(a: str, b: str, s: Parts | None, t: Parts | None, depth: int) -> Tree:
    if not s or not t:
        # A relation or a sign like ± can still stand for several values; a single value cannot.
        other = a if t else b
        return ['is', a, b] if _RELATION.search(other) or '\\cup' in a + b else False
    loose = {s.kind, t.kind} == {'()', 'list'}  # (1,2) with its brackets left out
    if s.kind != t.kind and not loose and {s.kind, t.kind} != {r'\{\}', 'list'}:
        return ['is', a, b] if 'union' in (s.kind, t.kind) else False
    if len(s.elements) != len(t.elements):
        return False
    if loose or s.ordered:
        pairs = zip(s.elements, t.elements, strict=True)
        return _all([compare(x, y, depth) for x, y in pairs])
    if len(s.elements) > _MAX_UNORDERED:
        return ['is', a, b]
    table = [[compare(x, y, depth) for y in t.elements] for x in s.elements]
    return _all([_any(row) for row in [*table, *zip(*table, strict=True)]])


def _compare_bases(a: str, b: str) -> bool | None:
    """The verdict on digits with a base, as 443_5, which one of the two may leave out."""
    x, y = _BASE.fullmatch(a), _BASE.fullmatch(b)
    if not x and not y:
        return None
    if x and y and x[2].strip('{}') != y[2].strip('{}'):
        return False
    return (x[1] if x else a) == (y[1] if y else b)


def _parts(text: str) -> Parts | None:
    matrix = _MATRIX.fullmatch(text)
    if matrix:
        rows = [row.split('&') for row in matrix[2].removesuffix('\\\\').split('\\\\')]
        shape = f'matrix {len(rows)}x{"x".join(str(len(row)) for row in rows)}'
        return Parts(shape, tuple(cell for row in rows for cell in row))
    if '\\pm' in text and ',' not in text:
        return Parts('list', (text.replace('\\pm', '+').lstrip('+'), text.replace('\\pm', '-')))
    union = _split(text, '\\cup')
    if len(union) > 1:
        return Parts('union', tuple(union))
    elements = _split(text, ',')
    if len(elements) > 1:
        return Parts('list', tuple(elements))
    for opening, closing in (('\\{', '\\}'), ('(', ')'), ('[', ']'), ('(', ']'), ('[', ')')):
        if text.startswith(opening) and text.endswith(closing):
            inside = text[len(opening) : -len(closing)]
            elements = _split(inside, ',')
            if elements and (len(elements) > 1 or opening == '\\{'):
                return Parts(opening + closing, tuple(elements))
    return None


def _split(text: str, separator: str) -> list[str]:
    """The pieces between separators outside brackets; nothing where brackets do not match."""
    pieces, depth, start, place = [], 0, 0, 0
    while place < len(text):
        depth += (text[place] in '([{') - (text[place] in ')]}')
        if depth < 0:
            return []
        if not depth and text.startswith(separator, place):
            pieces.append(text[start:place])
            place += len(separator)
            start = place
        else:
            place += 1
    return [] if depth else [*pieces, text[start:]]


def _all(trees: Sequence[Tree]) -> Tree:
    if any(tree is False for tree in trees):
        return False
    rest = [tree for tree in trees if tree is not True]
    return ['all', rest] if rest else True


def _any(trees: Sequence[Tree]) -> Tree:
    if any(tree is True for tree in trees):
        return True
    rest = [tree for tree in trees if tree is not False]
    return ['any', rest] if rest else False
