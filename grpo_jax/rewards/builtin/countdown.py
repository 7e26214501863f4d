"""Reward for the Countdown game: reach a target with a list of numbers and + - * /."""

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from fractions import Fraction
from typing import SupportsInt

from grpo_jax.rewards.messages import on_texts
from grpo_jax.rewards.verify.markers import answer_tag

_MAX_LENGTH = 300  # characters; a longer equation counts as wrong
_TOKENS = re.compile(r'\s*(?:([0-9]{1,15})|([-+*/()]))\s*')
_NUMBER = re.compile(r'[+-]?[0-9]+')
_SEPARATORS = re.compile(r'[\s\[\](){},;\'"]+')
_SIGNS = str.maketrans({'×': '*', '·': '*', '÷': '/', '−': '-'})


@on_texts
def countdown_answer(
    prompts: Sequence[str],
    completions: Sequence[str],
    numbers: Sequence[str | Iterable[SupportsInt | str]],
    target: Sequence[SupportsInt | str],
    **columns: object,
) -> list[float | None]:
    """1.0 if the equation uses each of `numbers` exactly once and equals `target`, else 0.0.

    The equation is the content of the last `<answer>…</answer>`. It consists of whole numbers,
    `+ - * /` (also × · ÷ −) and parentheses, and is evaluated in exact fractions. ` = 24` may
    follow it if 24 is the target. `numbers` holds lists of whole numbers, or their text such as
    `[3, 7, 25]`. A negative number is used with its sign: `5 + -3` or `5 - (-3)`, not `5 - 3`.

    Raises:
        ValueError: an entry of `target` or `numbers` is not a whole number.
    """
    rewards: list[float | None] = []
    for row, (completion, given, goal) in enumerate(zip(completions, numbers, target, strict=True)):
        available = [_whole(value, 'numbers', row) for value in _separate(given)]
        rewards.append(float(_solves(completion, available, _whole(goal, 'target', row))))
    return rewards


def _solves(completion: str, numbers: list[int], target: int) -> bool:
    equation, _, result = (answer_tag(completion) or '').translate(_SIGNS).partition('=')
    if result.strip() not in ('', str(target)):
        return False
    tokens = _tokenize(equation)
    if not tokens or not _uses_each(tokens, numbers):
        return False
    try:
        value, rest = _sum(tokens)
    except (IndexError, ValueError, ZeroDivisionError, RecursionError):
        return False
    return not rest and value == target


def _separate(numbers: str | Iterable[SupportsInt | str]) -> Iterable[SupportsInt | str]:
    """Return the numbers in a list or in its text."""
    if isinstance(numbers, str):
        return [text for text in _SEPARATORS.split(numbers) if text]
    return numbers


def _whole(value: SupportsInt | str, column: str, row: int) -> int:
    """Return a value of a column as an int; raise ValueError if it is not a whole number."""
    text = value.strip().translate(_SIGNS) if isinstance(value, str) else None
    if text is None and int(value) == value:
        return int(value)
    if text and _NUMBER.fullmatch(text):
        return int(text)
    raise ValueError(f'column {column}, row {row}: {value!r} is not a whole number like 7 or -3')


def _uses_each(tokens: list[str], numbers: list[int]) -> bool:
    """Return whether the equation has each number once, negative ones after a sign `-`."""
    digits = [position for position, token in enumerate(tokens) if token.isdecimal()]
    written = Counter(int(tokens[position]) for position in digits)
    signed = Counter(int(tokens[position]) for position in digits if _is_signed(tokens, position))
    negative = Counter(-number for number in numbers if number < 0)
    return written == Counter(map(abs, numbers)) and negative <= signed


def _is_signed(tokens: list[str], position: int) -> bool:
    """Return whether the number at a position follows a `-` that subtracts from nothing."""
    before = ['(', *tokens[:position]][-2:]
    return before[-1] == '-' and before[0] in '(+-*/'


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
