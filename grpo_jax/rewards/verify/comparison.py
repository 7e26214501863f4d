r"""Comparison of two normal forms: decided at once, or a tree that the worker decides.

A tree is
    ['is', a, b] · ['sets', a, b] · ['all', trees] · ['any', trees] · ['matching', table of trees] ·
    true or false.
'is' compares two texts for the parser (`expression`), 'sets' two descriptions of sets
(`real_sets`). A matching pairs each row with a column of its own.
"""

import re
from collections.abc import Sequence
from typing import TypeAlias

from grpo_jax.rewards.verify.expression import expression, scientific
from grpo_jax.rewards.verify.normal_form import MAX_LENGTH, is_word
from grpo_jax.rewards.verify.numbers import parse_number, same_number
from grpo_jax.rewards.verify.real_sets import RealSet, is_builder, is_real_set, read_set
from grpo_jax.rewards.verify.structure import (
    Parts,
    is_equation,
    named_values,
    same_name,
    split_elements,
    split_name,
    split_parts,
    tuple_names,
)
from grpo_jax.rewards.verify.units import same_unit, split_known_unit

Tree: TypeAlias = bool | list[object]  # see above

_MAX_DEPTH = 3  # of nested brackets whose elements are compared one by one
_MAX_UNORDERED = 12  # elements of a list or set that differ in text and are compared in any order
_BASE = re.compile(r'(-?[0-9A-F.]+)_([0-9]{1,2}|\{[0-9]{1,2}\})')
_EULER = re.compile('[0-9]e[-+]')
_SET_KINDS = frozenset(
    {'interval', 'points', 'union', 'intersection', 'minus', 'relation', 'either'}
    | {'integers', 'naturals'}
)
_VECTOR = re.compile('matrix (?:[0-9]+(?:x1)+|1x[0-9]+)')  # (1,2) as a matrix
_SYSTEM = re.compile('cases [0-9]+(?:x1)+')  # equations, one in each row
_CHOICES = re.compile('[A-J]{2,}|[①-⑳]{2,}')
_LISTED_CHOICES = re.compile('(?:[A-J][,;])+[A-J]|(?:[①-⑳][,;])+[①-⑳]')
_CHOICE = re.compile(r'\\choice\{([A-J])\}\{(.*)\}')


def compare(a: str, b: str, depth: int = 0) -> Tree:
    """Compare two normal forms: return the result, or the tree that decides it."""
    if a == b:
        return bool(a)
    if not a or not b or max(len(a), len(b)) > MAX_LENGTH:
        return False
    if _CHOICE.fullmatch(a) or _CHOICE.fullmatch(b):
        return _compare_choices(a, b, depth)
    if (same_choices := _compare_several_choices(a, b)) is not None:
        return same_choices
    (a, unit_a), (b, unit_b) = split_known_unit(a), split_known_unit(b)
    if unit_a and unit_b and not same_unit(unit_a, unit_b):
        return False
    if (unit_a and b.endswith('%')) or (unit_b and a.endswith('%')):
        return False
    if (unit_a or unit_b) and not (unit_a and unit_b) and len(unit_a + unit_b) == 1:
        # A unit, or a variable: 5 m is 5, and it is 5m.
        return _any([compare(a, b, depth), compare(a + unit_a, b + unit_b, depth)])
    if (by_name := _compare_by_name(a, b, depth)) is not None:
        return by_name
    (name_a, value_a), (name_b, value_b) = split_name(a), split_name(b)
    changed = (value_a, value_b) != (a, b) and same_name(name_a, name_b)
    # An equation is not a value: -x=3 is not 3.
    if changed and not is_equation(value_a) and not is_equation(value_b):
        return compare(value_a, value_b, depth)
    return _compare_values(a, b, depth)


def self_comparison(form: str, depth: int = 0) -> Tree:
    """Return the tree that compares the form with itself, without the shortcut for equal texts."""
    form = split_name(split_known_unit(form)[0])[1]
    if len(form) > MAX_LENGTH or parse_number(form) or is_word(form) or _BASE.fullmatch(form):
        return True
    parts = split_parts(form) if depth < _MAX_DEPTH else None
    if parts:
        return _all([self_comparison(element, depth + 1) for element in parts.elements])
    text = expression(scientific(form))
    return True if text is None else ['is', text, text]


def _compare_values(a: str, b: str, depth: int) -> Tree:
    """Compare two normal forms without names and known units."""
    numbers = parse_number(a), parse_number(b)
    if numbers[0] and numbers[1]:
        return same_number(numbers[0], numbers[1])
    if is_word(a) or is_word(b):
        return False
    if (same_in_base := _compare_bases(a, b)) is not None:
        return same_in_base
    either_set = is_real_set(a) or is_real_set(b)
    sets = (_read_set(a, b), _read_set(b, a)) if either_set else (None, None)
    if sets[0] and sets[1]:
        return _compare_sets((a, b), sets[0], sets[1], depth)
    # 1,234 may be a list, 1,000 is none.
    parts_a, parts_b = (
        None if number and ',0' in text else split_parts(text)
        for number, text in zip(numbers, (a, b), strict=True)
    )
    if (parts_a or parts_b) and depth >= _MAX_DEPTH:
        return False
    if parts_a and parts_b:
        return _compare_parts(parts_a, parts_b, depth + 1)
    if parts_a or parts_b:
        parts, value = (parts_a, b) if parts_a else (parts_b, a)
        return parts is not None and _compare_with_one(parts, value, depth + 1)
    return _compare_expressions(a, b) if is_equation(a) == is_equation(b) else False


def _compare_choices(a: str, b: str, depth: int) -> Tree:
    """Compare choices such as `(E) 15`: with a letter, with a value or with another choice."""
    x, y = _CHOICE.fullmatch(a), _CHOICE.fullmatch(b)
    if x and y:
        return compare(x[2], y[2], depth) if x[1] == y[1] else False
    (letter, value), other = (x.groups(), b) if x else (y.groups(), a) if y else ((a, a), b)
    return other == letter or compare(value, other, depth)


def _compare_several_choices(a: str, b: str) -> bool | None:
    """Compare choices written together with a list, as AC and `C,A`; None for anything else."""
    letters, listed = (a, b) if len(a) < len(b) else (b, a)
    if not _CHOICES.fullmatch(letters) or not _LISTED_CHOICES.fullmatch(listed):
        return None
    # Letters in another order, such as CA, are more likely a product or a name.
    choices = sorted(re.split('[,;]', listed))
    return list(letters) == choices and len(set(choices)) == len(choices)


def _compare_by_name(a: str, b: str, depth: int) -> Tree | None:
    """Compare where one of the two names each value, as in `x=1, y=2`; None if neither does."""
    parts = tuple(tuple_names(text) or split_parts(text) for text in (a, b))
    named = tuple(named_values(each) if each else None for each in parts)
    if named[0] and named[1]:
        same_names = named[0].keys() == named[1].keys()
        return same_names and _all([compare(v, named[1][n], depth) for n, v in named[0].items()])
    values, other = (named[0], parts[1]) if named[0] else (named[1], parts[0])
    if not values or not other:
        return None if not values else False
    ordered = list(values.values())
    if (
        other.kind == 'list' and len({name.partition('_')[0] for name in values}) == 1
    ):  # x_1=1, x_2=2
        return _compare_parts(Parts('list', tuple(ordered)), other, depth + 1)
    if all(re.fullmatch('[A-Za-z]', name) for name in values):
        ordered = [values[name] for name in sorted(values)]  # (3,4) is x=3, y=4
    return _compare_parts(Parts('()', tuple(ordered)), other, depth + 1)


def _compare_sets(texts: tuple[str, str], x: RealSet, y: RealSet, depth: int) -> Tree:
    """Compare two sets of real numbers: intervals by their ends, other sets in the worker."""
    if x.variable and y.variable and x.variable != y.variable:
        return False
    (kind, *ends_x), (other_kind, *ends_y) = x.description, y.description
    if kind == other_kind == 'relation' and not any(map(is_builder, texts)):
        return _compare_expressions(*texts)
    if kind == other_kind == 'interval':
        if ends_x[2:] != ends_y[2:]:
            return False
        return _all(
            [compare(str(p), str(q), depth) for p, q in zip(ends_x[:2], ends_y[:2], strict=True)]
        )
    descriptions = _parsed_set(x.description), _parsed_set(y.description)
    if descriptions[0] is None or descriptions[1] is None:
        return False
    return descriptions[0] == descriptions[1] or ['sets', *descriptions]


def _read_set(text: str, other: str) -> RealSet | None:
    r"""Read a set, a list as one if the other is `\{x|x^2=4\}`."""
    known = read_set(text)
    if known or not is_builder(other) or text.startswith('\\{'):
        return known
    values = ','.join(split_name(element)[1] for element in split_elements(text))
    return read_set(rf'\{{{values}\}}')


def _parsed_set(node: object) -> object | None:
    """Write the texts in the description of a set for the parser; None if one is opaque."""
    if isinstance(node, str):
        return node if node in _SET_KINDS else expression(scientific(node))
    if isinstance(node, list):
        nodes = [_parsed_set(each) for each in node]
        return None if any(each is None for each in nodes) else nodes
    return node


def _compare_with_one(parts: Parts, value: str, depth: int) -> Tree:
    """Compare several values with one: only a set of one element can be equal."""
    one = parts.kind == r'\{\}' and len(parts.elements) == 1
    return compare(parts.elements[0], value, depth) if one else False


def _compare_parts(parts_a: Parts, parts_b: Parts, depth: int) -> Tree:
    """Compare element by element, in any order if both are unordered."""
    kinds = {_kind(parts_a, parts_b), _kind(parts_b, parts_a)}
    without_brackets = kinds == {'()', 'list'}  # 1,2 for (1,2)
    if len(kinds) == 2 and not without_brackets and kinds != {r'\{\}', 'list'}:
        return False
    if len(parts_a.elements) != len(parts_b.elements):
        return False
    if without_brackets or parts_a.ordered:
        pairs = zip(parts_a.elements, parts_b.elements, strict=True)
        return _all([compare(x, y, depth) for x, y in pairs])
    return _matching(list(parts_a.elements), list(parts_b.elements), depth)


def _kind(parts: Parts, other: Parts) -> str:
    """Return the kind of values, that of other ones where it is another notation for it."""
    if _VECTOR.fullmatch(parts.kind) and other.kind == '()':
        return other.kind
    return other.kind if _SYSTEM.fullmatch(parts.kind) and other.kind == 'list' else parts.kind


def _matching(rows: list[str], columns: list[str], depth: int) -> Tree:
    """Compare the elements of two lists in any order, each with one of the other list."""
    for element in list(rows):
        if element in columns:
            rows.remove(element)
            columns.remove(element)
    if len(rows) > _MAX_UNORDERED:
        return False
    table = [[compare(x, y, depth) for y in columns] for x in rows]
    while (pair := _first_equal(table)) is not None:
        row, column = pair
        table = [cells[:column] + cells[column + 1 :] for k, cells in enumerate(table) if k != row]
    lines = [*table, *map(list, zip(*table, strict=True))]
    if any(all(cell is False for cell in line) for line in lines):
        return False
    return ['matching', table] if table else True


def _first_equal(table: list[list[Tree]]) -> tuple[int, int] | None:
    """Return row and column of a cell that is true; None if there is none."""
    cells = ((i, j) for i, row in enumerate(table) for j, cell in enumerate(row) if cell is True)
    return next(cells, None)


def _compare_expressions(a: str, b: str) -> Tree:
    """Compare two expressions, equations or relations; opaque texts are not equal."""
    readings = [
        [text for text in map(expression, _readings(form)) if text is not None] for form in (a, b)
    ]
    return _any([x == y or ['is', x, y] for x in readings[0] for y in readings[1]])


def _readings(form: str) -> list[str]:
    """Return what a form can mean: `2e-3` is 0.002, or twice e less 3."""
    value = scientific(form)
    return [value, form] if value != form and _EULER.search(form) else [value]


def _compare_bases(a: str, b: str) -> bool | None:
    """Compare digits with a base, such as 443_5, which one of the two may leave out."""
    x, y = _BASE.fullmatch(a), _BASE.fullmatch(b)
    if not x and not y:
        return None
    if x and y and x[2].strip('{}') != y[2].strip('{}'):
        return False
    return (x[1] if x else a) == (y[1] if y else b)


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
