r"""Sets of real numbers in a normal form: intervals, inequalities, set-builder notation.

`[2,\infty)`, `x\ge2`, `\{x|x\ge2\}` and `x\in[2,\infty)` are the same set. It is described by
    ['interval', lower, upper, lower is open, upper is open] · ['points', texts] ·
    ['union', sets] · ['intersection', sets] · ['minus', set, set] · ['relation', text] ·
    ['either', sets] · ['integers', lower] · ['naturals']
where a relation is one that is not solved for its variable, a list of relations is the
intersection of their sets, or the union if that is empty (`x<1, x>2`), the integers are those from
`lower` on, and 0 may be a natural number or none. The process that compares
expressions evaluates these descriptions (see `worker`).
"""

import re
from typing import NamedTuple, TypeAlias

from grpo_jax.rewards.verify.structure import (
    expand_signs,
    is_name,
    split_elements,
    split_outside,
)

Set: TypeAlias = list[object]  # see above

_RELATION = re.compile(r'[<>]|\\(?:le|ge|ne)(?![A-Za-z])')
_SIGN = re.compile(r'(<|>|\\le(?![A-Za-z])|\\ge(?![A-Za-z])|\\ne(?![A-Za-z]))')
_SET = re.compile(r'\\(?:R|emptyset|cup|cap|setminus|backslash|lor|land)(?![A-Za-z])')
_BUILDER = re.compile(r'\\\{([^|:;]+?)(?:[|:]|;(?=.*[<>]))((?:(?!\\[{}]).)*)\\\}')
_MEMBER = re.compile(r'(.+?)\\in(?![A-Za-z])(.+)')
_MINUS = re.compile(r'\\(?:setminus|backslash)(?![A-Za-z])|-(?=\\\{)')
_SIGNS = re.compile(rf'{_RELATION.pattern}|{_SET.pattern}|\\in(?![A-Za-z])')
_EQUATION = re.compile(r'[^=]+=[^=]+')
_DOMAINS: dict[str, Set] = {  # of the variable of a set; Q has no description
    r'\R': ['interval', '-\\infty', '\\infty', True, True],
    r'\mathbb{Z}': ['integers', '-\\infty'],
    r'\mathbb{N}': ['naturals'],
    r'\mathbb{N}_0': ['integers', '0'],
    **{rf'\mathbb{{N}}{sign}': ['integers', '1'] for sign in ('^+', '_+', '^*')},
    **{rf'\mathbb{{Z}}{sign}': ['integers', '1'] for sign in ('^+', '_+', '_>0')},
}
_SIGN_IN_BRACES = re.compile(r'([_^])\{([^{}]*)\}$')
_LETTER = re.compile('[A-Za-z]')
_MAX_SIGNS = 24  # in a set, which is read recursively
_REALS: Set = ['interval', '-\\infty', '\\infty', True, True]


class RealSet(NamedTuple):
    """A set with the variable in its description, '' where there is none."""

    variable: str
    description: Set


def is_real_set(text: str) -> bool:
    r"""Return whether the text can only be a set of numbers or a relation.

    `(1,2)` may be a point, and `\{1,2\}` is compared element by element: for both this is false.
    """
    if '\\begin' in text or '&' in text:  # a row of cases has a value and a condition
        return False
    return bool(
        _RELATION.search(text) or _SET.search(text) or is_builder(text) or _read_domain(text)
    )


def is_builder(text: str) -> bool:
    r"""Return whether the text is a set in braces with a condition: `\{x|x^2=4\}`."""
    return _BUILDER.fullmatch(text) is not None


def read_set(text: str) -> RealSet | None:
    """Read a set of real numbers; None if the text is something else."""
    return None if len(_SIGNS.findall(text)) > _MAX_SIGNS else _read_set(text)


def _read_set(text: str) -> RealSet | None:
    text = text.strip()
    if domain := _read_domain(text):
        return RealSet('', domain)
    for separator, kind in (('\\lor', 'union'), ('\\land', 'intersection')):
        pieces = split_outside(text, separator)
        if len(pieces) > 1:
            return _combine(kind, [_read_set(piece) for piece in pieces])
    if builder := _BUILDER.fullmatch(text):
        return _read_builder(builder[1], builder[2])
    if not _RELATION.search(text) and (member := _MEMBER.fullmatch(text)):
        values = _read_set(member[2])
        return values and values._replace(variable=member[1])
    for separator, kind in (('\\cup', 'union'), ('\\cap', 'intersection')):
        pieces = split_outside(text, separator)
        if len(pieces) > 1:
            return _combine(kind, [_read_set(piece) for piece in pieces])
    if _RELATION.search(text):
        return _read_relations(text)
    if text == '\\emptyset':
        return RealSet('', ['points', []])
    if minus := _MINUS.search(text):
        sets = _read_set(text[: minus.start()]), _read_set(text[minus.end() :])
        if not sets[0] or not sets[1]:
            return None
        return RealSet('', ['minus', sets[0].description, sets[1].description])
    return _read_brackets(text)


def _read_domain(text: str) -> Set | None:
    r"""Return the description of a set with a name, such as `\mathbb{Z}^{+}`; None for others."""
    return _DOMAINS.get(_SIGN_IN_BRACES.sub(r'\1\2', text))


def _read_builder(member: str, condition: str) -> RealSet | None:
    r"""Read `\{member|condition\}`, such as `x\in\mathbb{Z}` and `x^2=4,x>0`."""
    in_domain = _MEMBER.fullmatch(member)
    variable = in_domain[1] if in_domain else member
    sets = [_read_set(in_domain[2])] if in_domain else []
    equations: list[RealSet | None] = []
    for part in [condition] if '\\lor' in condition else split_outside(condition, '\\land'):
        relations = []
        for element in split_elements(part):
            if element.startswith(f'{variable}\\in') and not _RELATION.search(element):
                sets.append(_read_set(element.removeprefix(f'{variable}\\in')))
            elif _EQUATION.fullmatch(element) and not _RELATION.search(element):
                equations.append(_read_equation(variable, element))
            else:
                relations.append(element)
        sets += [_read_set(','.join(relations))] if relations else []
    sets += equations
    if any(each is None or each.variable not in ('', variable) for each in sets):
        return None
    if len(equations) > 1:  # x=1, x=2 may mean both or either
        return None
    descriptions = [each.description for each in sets if each and each.description != _REALS]
    if len(descriptions) < 2:
        return RealSet('', descriptions[0] if descriptions else _REALS) if sets else None
    return RealSet('', ['intersection', descriptions])


def _read_equation(variable: str, equation: str) -> RealSet | None:
    """Read an equation for the elements of a set; None if it has another variable."""
    if variable in ('z', 'w') or set(_LETTER.findall(_plain(equation))) != {variable}:
        return None  # z and w are complex numbers
    return RealSet(variable, ['relation', equation])


def _combine(kind: str, sets: list[RealSet | None]) -> RealSet | None:
    known = [each for each in sets if each]
    variables = {each.variable for each in known} - {''}
    if len(known) < len(sets) or len(variables) > 1:
        return None
    return RealSet(''.join(variables), [kind, [each.description for each in known]])


def _read_brackets(text: str) -> RealSet | None:
    """Read an interval, or a finite set in braces."""
    if text.startswith('\\{') and text.endswith('\\}'):
        if _RELATION.search(text):
            return _read_relations(text[2:-2])
        return RealSet('', ['points', list(expand_signs(split_elements(text[2:-2])))])
    if text[:1] not in tuple('([') or text[-1:] not in tuple(')]'):
        return None
    intervals = split_elements(text)
    if len(intervals) > 1 and re.search(r'[\[\]]|\\infty', text):  # (1,2),(3,4) are points
        return _combine('union', [_read_brackets(each) for each in intervals])
    ends = split_elements(text[1:-1])
    if len(ends) != 2:
        return None
    return RealSet('', ['interval', *ends, text[0] == '(', text[-1] == ')'])


def _read_relations(text: str) -> RealSet | None:
    r"""Read one relation, a chain such as `1<x\le2`, or a list of `\ne`."""
    elements = split_elements(text)
    if len(elements) > 1:
        if '\\ne' in elements[0] and not re.search('[<>]', text):
            variable = elements[0].partition('\\ne')[0]
            relations = [e if '\\ne' in e else f'{variable}\\ne{e}' for e in elements]
            return _combine('intersection', [_read_set(each) for each in relations])
        return _combine('either', [_read_set(each) for each in elements])
    pieces = [piece.strip() for piece in _SIGN.split(text)]
    sides, signs = pieces[::2], pieces[1::2]
    if not all(sides) or len(signs) > 2:
        return None
    bounds = _bounds(sides, signs)
    if bounds is None:
        return RealSet('', ['relation', text])
    variable, lower, upper, excluded = bounds
    if excluded is not None:
        return RealSet(variable, ['minus', _REALS, ['points', list(expand_signs([excluded]))]])
    return RealSet(variable, ['interval', lower[0], upper[0], lower[1], upper[1]])


_Bound: TypeAlias = tuple[str, bool]  # an end of an interval, and whether it is open


def _bounds(sides: list[str], signs: list[str]) -> tuple[str, _Bound, _Bound, str | None] | None:
    """Return variable, lower and upper bound, and the excluded value; None if it is not solved."""
    lower, upper = ('-\\infty', True), ('\\infty', True)
    if len(signs) == 2:
        variable, numbers = sides[1], [(sides[0], signs[0], True), (sides[2], signs[1], False)]
        if len({sign in ('<', '\\le') for sign in signs}) > 1:
            return None
    else:
        left = is_name(sides[0]) and not re.search('[A-Za-z]', _plain(sides[1]))
        right = is_name(sides[1]) and not re.search('[A-Za-z]', _plain(sides[0]))
        if left == right:
            return None
        variable = sides[0] if left else sides[1]
        numbers = [(sides[1], signs[0], False) if left else (sides[0], signs[0], True)]
    if not is_name(variable) or any(variable in number for number, _, _ in numbers):
        return None
    for number, sign, before in numbers:
        if sign == '\\ne':
            return None if len(signs) == 2 else (variable, lower, upper, number)
        if (sign in ('<', '\\le')) == before:
            lower = number, sign in '<>'
        else:
            upper = number, sign in '<>'
    return variable, lower, upper, None


def _plain(text: str) -> str:
    """Return the text without commands and the constant e, to look for variables."""
    return re.sub(r'\\[A-Za-z]+|e', '', text)
