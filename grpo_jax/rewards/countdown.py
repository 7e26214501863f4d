"""Reward for the Countdown game: reach a target with the given numbers and + - * /."""

import re
from collections.abc import Iterable, Sequence
from fractions import Fraction
from typing import Any

from grpo_jax.rewards.extract import answer_tag

_MAX_LENGTH = 300  # characters; a longer equation is not read
_TOKENS = re.compile(r'\s*(?:([0-9]{1,15})|([-+*/()]))\s*')
_SIGNS = str.maketrans({'×': '*', '·': '*', '÷': '/', '−': '-'})


def countdown_answer(
    prompts: Sequence[str],
    completions: Sequence[str],
    numbers: Sequence[Any],
    target: Sequence[Any],
    **columns: Any,
) -> list[float | None]:
    """1.0 where the equation uses each of `numbers` exactly once and is equal to `target`.

    The equation is the content of the last `<answer>…</answer>`; ` = 24` behind it is allowed if it
    is true. It consists of whole numbers, `+ - * /` (also × ÷) and brackets, and is worked out in
    fractions. `numbers` holds lists of whole numbers, or texts of them as `[3, 7, 25]`.
    """
    rows = zip(completions, numbers, target, strict=True)
    return [float(_solves(text, _whole_numbers(given), int(goal))) for text, given, goal in rows]


def _solves(completion: str, given: list[int], goal: int) -> bool:
    equation, _, stated = (answer_tag(completion) or '').translate(_SIGNS).partition('=')
    if stated.strip() not in ('', str(goal)):
        return False
    tokens = _tokenize(equation)
    if not tokens or sorted(int(t) for t in tokens if t.isdecimal()) != sorted(given):
        return False
    try:
        value, rest = _sum(tokens)
    except (IndexError, ValueError, ZeroDivisionError):
        return False
    return not rest and value == goal


def _whole_numbers(given: str | Iterable[Any]) -> list[int]:
    found = re.findall('[0-9]+', given) if isinstance(given, str) else given
    return [int(number) for number in found]


def _tokenize(text: str) -> list[str] | None:
    if len(text) > _MAX_LENGTH:
        return None
    matches = list(_TOKENS.finditer(text))
    if ''.join(m.group() for m in matches) != text:
        return None
    return [m[1] or m[2] for m in matches]


# The grammar: sum = product (± product)*, product = factor (×÷ factor)*, factor = number | -factor
# | (sum). Each takes tokens and returns a value and the tokens that are left; IndexError and
# ValueError are for tokens that do not fit.


def _sum(tokens: list[str]) -> tuple[Fraction, list[str]]:
    value, tokens = _product(tokens)
    while tokens and tokens[0] in '+-':
        sign = 1 if tokens[0] == '+' else -1
        term, tokens = _product(tokens[1:])
        value += sign * term
    return value, tokens


def _product(tokens: list[str]) -> tuple[Fraction, list[str]]:
    value, tokens = _factor(tokens)
    while tokens and tokens[0] in '*/':
        divide = tokens[0] == '/'
        factor, tokens = _factor(tokens[1:])
        value = value / factor if divide else value * factor
    return value, tokens


def _factor(tokens: list[str]) -> tuple[Fraction, list[str]]:
    first, rest = tokens[0], tokens[1:]
    if first == '-':
        value, rest = _factor(rest)
        return -value, rest
    if first == '(':
        value, rest = _sum(rest)
        if rest[0] != ')':
            raise ValueError('a bracket is not closed')
        return value, rest[1:]
    return Fraction(int(first)), rest
