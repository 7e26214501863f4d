"""Numbers in text: patterns that find them, one canonical spelling, and exact comparison.

All arithmetic is exact. Every search takes time linear in the length of the text.
"""

import re
from fractions import Fraction
from typing import NamedTuple

_MAX_CHARACTERS = 100  # longer numbers are not parsed: no exact arithmetic on hostile text

# Every repetition is possessive (`++`, `*+`) and starts at a character that no other part of the
# pattern can start at, so a search over n characters takes O(n) steps. A hyphen after a word or a
# closing bracket is an operator or a dash, not a sign.
NUMBER = (
    r'(?P<sign>(?<![\w)}\]%])[+-])?(?:\\?\$)?'
    r'(?P<value>[0-9]++(?:,[0-9]++)*+(?:\.[0-9]++)?|(?<![\w.])\.[0-9]++)'
    r'(?:/(?P<divisor>[0-9]++))?'
)
_NUMBER = re.compile(NUMBER)
_GROUPED = re.compile(r'[0-9]{1,3}(?:,[0-9]{3})++(?:\.[0-9]++)?')
_LATEX_FRACTION = re.compile(r'(?<![0-9])\\[dt]?frac\{([0-9]++)\}\{([0-9]++)\}')
_MIXED = re.compile(r'(?P<sign>[+-]?)(?P<whole>[0-9]++)\\frac\{([0-9]++)\}\{([0-9]++)\}')
_QUOTIENT = re.compile(r'([+-]?)\\frac\{([+-]?[0-9]++)\}\{([+-]?[0-9]++)\}')
_UNIT_POWER = re.compile(r'(?<=[A-Za-z}])\^(?:[23]|\{[23]\})')  # the 2 of cm^2 is no number


class Number(NamedTuple):
    """A number as it was written."""

    value: Fraction  # without the percent sign: 50 for 50%
    places: int | None  # decimals that were written, 0 for a whole number; None for a fraction
    percent: bool = False


def normalize_number(text: str) -> str | None:
    r"""Return the canonical spelling of the number that `text` is; None if it is anything else.

    Drops thousands separators, `$`, `%` (50% is 50), a trailing period, a plus sign and superfluous
    zeros: `$1,000.50.` becomes `1000.5`. Fractions with a finite decimal expansion become decimals
    (`1/2` and `\frac{1}{2}` become `0.5`); others are reduced (`2/6` becomes `1/3`). Commas must
    separate thousands: `1,2` is a list, not a number. A text of more than 100 characters is not a
    number.
    """
    text = plain_notation(text).strip().rstrip('.').removesuffix('%').removesuffix('\\').strip('$ ')
    match = _NUMBER.fullmatch(text)
    return _canonical(match) if match else None


def parse_number(text: str) -> Number | None:
    r"""Parse the number that `text` is, as it was written; return None if it is anything else.

    In addition to what `normalize_number` accepts, parses `-\frac{1}{-2}`, and `2\frac{1}{2}` and
    `2 1/2` as 5/2.
    """
    text = text.strip()
    if len(text) > 2 * _MAX_CHARACTERS:
        return None
    text = text.replace('\N{MINUS SIGN}', '-').rstrip('.').strip('$ ')
    text, percent = text.removesuffix('%').removesuffix('\\').strip('$ '), text.endswith('%')
    text = re.sub(r'\\[dt]frac', r'\\frac', text)
    text = re.sub(r'([0-9]) *(?: ([0-9]+)/([0-9]+))$', r'\1\\frac{\2}{\3}', text)
    if match := _QUOTIENT.fullmatch(text) or _MIXED.fullmatch(text.replace(' ', '')):
        return _parse_fraction(match, percent)
    match = _NUMBER.fullmatch(plain_notation(text))
    number = _absolute_value(match) if match else None
    if match is None or number is None:
        return None
    decimals = None if match['divisor'] else len(match['value'].partition('.')[2])
    return Number(-number if match['sign'] == '-' else number, decimals, percent)


def same_number(a: Number, b: Number) -> bool:
    """Return whether two written numbers are the same answer.

    Equal numbers are the same answer. So are a decimal and a number that is not whole, if the
    decimal is that number rounded or truncated to its places, with a relative error of at most
    1e-3: 3.14 is the same as 3.1416 and 0.333 as 1/3, but not 0.33 as 1/3, 105.26 as 105.25 or
    116.01 as 116.

    Where only one of the two has a percent sign, 50% is the same as 50 (the sign was left out) and
    as 0.5.
    """
    if a.percent == b.percent:
        return _equal_or_rounded(a, b)
    number, share = (b, a) if a.percent else (a, b)
    places = None if share.places is None else share.places + 2
    fraction = Number(share.value / 100, places)
    return _equal_or_rounded(number, share) or _equal_or_rounded(number, fraction)


def plain_notation(text: str) -> str:
    """Rewrite the typographic minus, LaTeX thousands separators and fractions in plain notation."""
    text = text.replace('\N{MINUS SIGN}', '-').replace('{,}', ',').replace('\\!', '')
    return _UNIT_POWER.sub('', _LATEX_FRACTION.sub(r'\1/\2', text))


def _canonical(match: re.Match[str]) -> str | None:
    """Spell a match of `NUMBER`; None if it is too long, badly grouped or divided by zero."""
    number = _absolute_value(match)
    if number is None:
        return None
    sign = '-' if match['sign'] == '-' and number else ''
    # A decimal ends after k places where 10^k is a multiple of the reduced denominator. As 2^a has
    # 0.3 a digits, four times the maximum length covers every denominator that divides some 10^k.
    places = (k for k in range(4 * _MAX_CHARACTERS) if 10**k % number.denominator == 0)
    k = next(places, None)
    if k is None:
        return f'{sign}{number}'
    whole, rest = divmod(int(number * 10**k), 10**k)
    return f'{sign}{whole}.{rest:0{k}d}' if k else f'{sign}{whole}'


def _absolute_value(match: re.Match[str]) -> Fraction | None:
    """Return the absolute value of a match of `NUMBER`; None as in `_canonical`."""
    value, divisor = match['value'], match['divisor'] or '1'
    if len(match.group()) > _MAX_CHARACTERS or not divisor.strip('0'):
        return None
    if ',' in value and not _GROUPED.fullmatch(value):
        return None
    return Fraction(value.replace(',', '')) / int(divisor)


def _parse_fraction(match: re.Match[str], percent: bool) -> Number | None:
    """Parse a LaTeX fraction, with or without a whole part before it."""
    sign, *_, top, bottom = match.groups()
    if not int(bottom):
        return None
    whole = int(match.groupdict().get('whole') or 0)
    value = whole + Fraction(int(top), int(bottom))
    return Number(-value if sign == '-' else value, None, percent)


def _equal_or_rounded(a: Number, b: Number) -> bool:
    if a.value == b.value:
        return True
    if 1 in (a.value.denominator, b.value.denominator) or a.places == b.places:
        return False
    places = min(n.places for n in (a, b) if n.places is not None)
    error = abs(a.value - b.value)
    return error * 10**places < 1 and error * 1000 <= max(abs(a.value), abs(b.value))
