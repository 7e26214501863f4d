"""Reward for the Countdown game: reach a target with a list of numbers and + - * /."""

import re
from collections.abc import Iterable, Sequence
from fractions import Fraction
from typing import SupportsInt

from grpo_jax.rewards.verify.extraction import answer_tag

_MAX_LENGTH = 300  # characters; a longer equation counts as wrong
_TOKENS = re.compile(r'\s*(?:([0-9]{1,15})|([-+*/()]))\s*')
_SIGNS = str.maketrans({'×': '*', '·': '*', '÷': '/', '−': '-'})


def countdown_answer(
    prompts: Sequence[str],
    completions: Sequence[str],
    numbers: Sequence[str | Iterable[int]],
    target: Sequence[SupportsInt | str],
    **columns: object,
) -> list[float | None]:
    """1.0 if the equation uses each of `numbers` exactly once and equals `target`, else 0.0.

    The equation is the content of the last `<answer>…</answer>`. It consists of whole numbers,
    `+ - * /` (also × · ÷ −) and parentheses, and is evaluated in exact fractions. ` = 24` may
    follow it if 24 is the target. `numbers` holds lists of whole numbers, or their text such as
    `[3, 7, 25]`.

    Raises:
        ValueError: an entry of `target` is not a whole number.
    """
    rows = zip(completions, numbers, target, strict=True)
    return [
        float(_solves(completion, _whole_numbers(row), int(goal))) for completion, row, goal in rows
    ]


def _solves(completion: str, numbers: list[int], target: int) -> bool:
    equation, _, result = (answer_tag(completion) or '').translate(_SIGNS).partition('=')
    if result.strip() not in ('', str(target)):
        return False
    tokens = _tokenize(equation)
    if not tokens or sorted(int(t) for t in tokens if t.isdecimal()) != sorted(numbers):
        return False
    try:
        value, rest = _sum(tokens)
    except (IndexError, ValueError, ZeroDivisionError, RecursionError):
        return False
    return not rest and value == target


def _whole_numbers(numbers: str | Iterable[int]) -> list[int]:
    parsed = re.findall('[0-9]+', numbers) if isinstance(numbers, str) else numbers
    return [int(number) for number in parsed]


def _tokenize(text: str) -> list[str] | None:
    if len(text) > _MAX_LENGTH:
        return None
    matches = list(_TOKENS.finditer(text))
    if ''.join(m.group() for m in matches) != text:
        return None
    return [m[1] or m[2] for m in matches]


# The grammar: sum = product (± product)*, product = factor (×÷ factor)*, factor = number | -factor
# | (sum). Each function takes tokens and returns a value and the remaining tokens. Tokens that do
# not fit raise IndexError or ValueError.


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
            raise ValueError('a parenthesis is not closed')
        return value, rest[1:]
    return Fraction(int(first)), rest
