r"""Equivalence of answers, such as `\frac{1}{2}` and 0.5 or `(1, 2]` and `\left(1,2\right]`.

Most pairs are decided by equal text or exact numbers (`numbers.same_number`). Tuples, intervals,
matrices, sets and lists are compared element by element, sets and lists in any order. The remaining
pairs are expressions, which `math-verify` parses and SymPy compares in another process (see
`pool`). A comparison that needs that process is a tree:
    ['is', a, b] · ['all', trees] · ['any', trees] · true or false.
"""

import re
from collections.abc import Sequence
from typing import NamedTuple, TypeAlias

from grpo_jax.rewards.verify import pool
from grpo_jax.rewards.verify.normal_form import MAX_LENGTH, is_word, normal_form, strip_name
from grpo_jax.rewards.verify.numbers import parse_number, same_number

SECONDS = 3.0  # for one comparison; the slowest of MATH's takes a third of it on one slow core

Tree: TypeAlias = bool | list[object]  # see above

_MAX_DEPTH = 3  # of nested brackets whose elements are compared one by one
_MAX_UNORDERED = 12  # elements of a list or set that are compared in any order
_MATRIX = re.compile(r'\\begin\{([pbvBV]?matrix|array)\}(?:\{[lcr|]*\})?(.*)\\end\{\1\}')
_BASE = re.compile(r'(-?[0-9A-F.]+)_([0-9]{1,2}|\{[0-9]{1,2}\})')
_ADJACENT_NUMBERS = re.compile('(?<![_^0-9])[0-9]+ [0-9]')  # the parser would join them into one
_RELATION = re.compile(r'[<>]|\\(?:le|ge|ne|lt|gt|in)(?![A-Za-z])')


class Parts(NamedTuple):
    """An answer that consists of several answers."""

    kind: str  # the brackets, 'list', 'union' or 'matrix RxC'
    elements: tuple[str, ...]

    @property
    def ordered(self) -> bool:
        return self.kind not in ('list', 'union', r'\{\}')


def equivalent(a: str, b: str, *, seconds: float = SECONDS) -> bool:
    """Return whether two answers are equivalent; False if that takes more than `seconds`."""
    return bool(equivalent_pairs([(a, b)], seconds=seconds)[0])


def equivalent_pairs(
    pairs: Sequence[tuple[str, str]], *, seconds: float = SECONDS
) -> list[bool | None]:
    """Compare pairs of answers in parallel, equal pairs once.

    Args:
        pairs: N pairs of answers.
        seconds: the deadline of each comparison.

    Returns:
        For each pair whether its answers are equivalent, None if the deadline passed.
    """
    forms = {text: normal_form(text) for text in {text for pair in pairs for text in pair}}
    return _compare_forms([(forms[a], forms[b]) for a, b in pairs], seconds)


def equivalence_classes(
    answers: Sequence[str | None], *, seconds: float = SECONDS
) -> list[int | None]:
    """Group answers into classes of equivalent ones, for a majority vote.

    An answer belongs to the first class whose first member it is equivalent to, so a vote is
    `Counter(classes).most_common(1)`, where the answer that appears first wins a tie.

    Args:
        answers: N answers, None where there is none.
        seconds: the deadline of each comparison.

    Returns:
        The class of each answer, counted from 0 in order of appearance; None for None.
    """
    forms = [None if answer is None else normal_form(answer) for answer in answers]
    unassigned = list(dict.fromkeys(form for form in forms if form is not None))
    comparable = _comparable(unassigned, seconds)
    classes: dict[str, int] = {}  # normal form -> class
    count = 0
    while unassigned:
        # Compare the first form with all others: the comparisons of one round run in parallel.
        first, *rest = unassigned
        others = [form for form in rest if {first, form} <= comparable]
        same = _compare_forms([(first, form) for form in others], seconds)
        classes[first] = count
        classes.update((form, count) for form, equal in zip(others, same, strict=True) if equal)
        unassigned = [form for form in rest if form not in classes]
        count += 1
    # Each round starts from the form that appears first, so classes are numbered in that order.
    return [None if form is None else classes[form] for form in forms]


def _comparable(forms: Sequence[str], seconds: float) -> set[str]:
    """Return the forms that can be compared with themselves within `seconds`.

    A vote compares each answer with many others. With this test, an answer that cannot be parsed
    costs its deadline once instead of once for each comparison.
    """
    trees = {form: _self_comparison(form) for form in forms} if len(forms) > 1 else {}
    uncertain = [form for form, tree in trees.items() if tree is not True]
    results = (
        pool.shared().evaluate([trees[form] for form in uncertain], seconds=seconds)
        if uncertain
        else []
    )
    undecided = {form for form, same in zip(uncertain, results, strict=True) if same is None}
    return set(forms) - undecided


def _self_comparison(form: str, depth: int = 0) -> Tree:
    """Return the tree that compares the form with itself, without the shortcut for equal texts."""
    form = strip_name(form)
    if len(form) > MAX_LENGTH or parse_number(form) or is_word(form) or _BASE.fullmatch(form):
        return True
    parts = _parts(form) if depth < _MAX_DEPTH else None
    if parts:
        return _all([_self_comparison(element, depth + 1) for element in parts.elements])
    return ['is', form, form]


def _compare_forms(pairs: Sequence[tuple[str, str]], seconds: float) -> list[bool | None]:
    """Compare pairs of normal forms; None at the deadline."""
    results: dict[tuple[str, str], bool | None] = {}
    trees: dict[tuple[str, str], Tree] = {}
    for pair in dict.fromkeys(pairs):
        tree = compare(*pair)
        if isinstance(tree, bool):
            results[pair] = tree
        else:
            trees[pair] = tree
    if trees:
        evaluated = pool.shared().evaluate(list(trees.values()), seconds=seconds)
        results.update(zip(trees, evaluated, strict=True))
    return [results[pair] for pair in pairs]


def compare(a: str, b: str, depth: int = 0) -> Tree:
    """Compare two normal forms: return the result, or the tree that decides it."""
    if a == b:
        return bool(a)
    if not a or not b or max(len(a), len(b)) > MAX_LENGTH:
        return False
    values = strip_name(a), strip_name(b)
    if values != (a, b) and not any('=' in value for value in values):
        return compare(*values, depth)
    numbers = parse_number(a), parse_number(b)
    if numbers[0] and numbers[1]:
        return same_number(numbers[0], numbers[1])
    if is_word(a) or is_word(b):
        return False
    if _ADJACENT_NUMBERS.search(a) or _ADJACENT_NUMBERS.search(b):
        return False
    if (same_in_base := _compare_bases(a, b)) is not None:
        return same_in_base
    parts_a, parts_b = _parts(a), _parts(b)
    if depth < _MAX_DEPTH and (parts_a or parts_b):
        return _compare_parts(a, b, parts_a, parts_b, depth + 1)
    # An equation is not a value: -x=3 is not 3. Names such as x=3 have been removed above.
    return ['is', a, b] if ('=' in a) == ('=' in b) else False


def _compare_parts(
    a: str, b: str, parts_a: Parts | None, parts_b: Parts | None, depth: int
) -> Tree:
    if not parts_a or not parts_b:
        # A relation or a sign such as ± can still stand for several values; a single value cannot.
        single = a if parts_b else b
        return ['is', a, b] if _RELATION.search(single) or '\\cup' in a + b else False
    kinds = {parts_a.kind, parts_b.kind}
    without_brackets = kinds == {'()', 'list'}  # 1,2 for (1,2)
    if len(kinds) == 2 and not without_brackets and kinds != {r'\{\}', 'list'}:
        return ['is', a, b] if 'union' in kinds else False
    if len(parts_a.elements) != len(parts_b.elements):
        return False
    if without_brackets or parts_a.ordered:
        pairs = zip(parts_a.elements, parts_b.elements, strict=True)
        return _all([compare(x, y, depth) for x, y in pairs])
    if len(parts_a.elements) > _MAX_UNORDERED:
        return ['is', a, b]
    table = [[compare(x, y, depth) for y in parts_b.elements] for x in parts_a.elements]
    return _all([_any(row) for row in [*table, *zip(*table, strict=True)]])


def _compare_bases(a: str, b: str) -> bool | None:
    """Compare digits with a base, such as 443_5, which one of the two may leave out."""
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
    """Split at separators outside brackets; return no pieces if brackets do not match."""
    pieces: list[str] = []
    depth = start = position = 0
    while position < len(text):
        depth += (text[position] in '([{') - (text[position] in ')]}')
        if depth < 0:
            return []
        if not depth and text.startswith(separator, position):
            pieces.append(text[start:position])
            position += len(separator)
            start = position
        else:
            position += 1
    return [] if depth else [*pieces, text[start:]]


def _all(trees: Sequence[Tree]) -> Tree:
    if any(tree is False for tree in trees):
        return False
    undecided = [tree for tree in trees if tree is not True]
    return ['all', undecided] if undecided else True


def _any(trees: Sequence[Tree]) -> Tree:
    if any(tree is True for tree in trees):
        return True
    undecided = [tree for tree in trees if tree is not False]
    return ['any', undecided] if undecided else False
