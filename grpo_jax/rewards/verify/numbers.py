"""Numbers in text: patterns that find them, one canonical spelling, and exact comparison.

All arithmetic is exact. Every search takes time linear in the length of the text.
"""

import re
from decimal import Decimal
from fractions import Fraction
from typing import NamedTuple

from grpo_jax.rewards.verify.notation import plain_notation

_MAX_CHARACTERS = 100  # longer numbers are not parsed: no exact arithmetic on hostile text

# Every repetition is possessive (`++`, `*+`) and starts at a character that no other part of the
# pattern can start at, so a search over n characters takes O(n) steps. A hyphen after a word or a
# closing bracket is an operator or a dash, not a sign.
_VALUE = (
    r'(?P<sign>(?<![A-Za-z0-9_)}\]%])[+-])?(?:(?:\\?\$|[€£¥₹₩]) ?)?'
    r'(?P<value>[0-9]++(?:,[0-9]++)*+(?:\.[0-9]++)?|(?<![A-Za-z0-9_.])\.[0-9]++)'
)
_NUMBER = re.compile(_VALUE + r'(?:/(?P<divisor>[0-9]++))?')
# What belongs to the number: 1.5e3, 1.5*10^3, 2^10, the fraction of 2 1/2, the divisor of 3 / 4.
QUANTITY = (
    rf'(?P<quantity>{_VALUE}'
    r'(?:[eE](?P<exponent>[+-]?[0-9]{1,3})(?![A-Za-z0-9])'
    r'| ?[*xX] ?10 ?(?:\^|\*\*) ?\{? ?(?P<ten_power>[+-]?[0-9]{1,3})(?![0-9]) ?\}?'
    r'|(?:\^|\*\*) ?\{? ?(?P<power>-?[0-9]{1,3})(?![0-9]) ?\}?'
    r'|(?: | and )(?P<top>[0-9]++)/(?P<bottom>[0-9]++)(?!/)'
    r'|(?: ?/ ?|:(?=[1-9])| : )(?P<divisor>[0-9]++(?:\.[0-9]++)?))?)'
)
_QUANTITY = re.compile(QUANTITY)
_CLOCK_TIME = re.compile(r'[+-]?[0-9]{1,2}:[0-5][0-9]')
_GROUPED = re.compile(r'[0-9]{1,3}(?:,[0-9]{3})++(?:\.[0-9]++)?')


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
    number, and neither are the sum, product or power in `2 1/2`, `1.5e3` and `10^3`, which
    `parse_number` parses.
    """
    match = _NUMBER.fullmatch(_unwrapped(plain_notation(text))[0])
    return _canonical(match) if match else None


def parse_number(text: str) -> Number | None:
    r"""Parse the number that `text` is, as it was written; return None if it is anything else.

    In addition to what `normalize_number` accepts, parses `-\frac{1}{-2}`, `2\frac{1}{2}` and
    `2 1/2` as 5/2, `1.5e-3`, `1.5\times10^{-3}`, powers of whole numbers such as `2^{10}`, and the
    ratio `3:4` as 3/4, but not the time `3:40`.
    """
    text = text.strip()
    if len(text) > 2 * _MAX_CHARACTERS:
        return None
    text, percent = _unwrapped(plain_notation(text))
    match = _QUANTITY.fullmatch(text)
    spelled = spell_quantity(match) if match else None
    number = _NUMBER.fullmatch(spelled) if spelled else None
    if number is None:
        return None
    value = _absolute_value(number)
    assert value is not None  # `spell_quantity` writes no other number
    decimals = None if number['divisor'] else len(number['value'].partition('.')[2])
    return Number(-value if number['sign'] else value, decimals, percent)


def spell_quantity(match: re.Match[str]) -> str | None:
    """Write a match of `QUANTITY` as a decimal as written or a fraction: `-1,000.50`, `5/2`.

    None if it is longer than 100 characters, has commas that do not separate thousands, is divided
    by zero or is the time of a day.
    """
    text = match['quantity']
    value, bottom = match['value'], match['divisor'] or match['bottom']
    if len(text) > _MAX_CHARACTERS or (',' in value and not _GROUPED.fullmatch(value)):
        return None
    if bottom and (not bottom.strip('0.') or _CLOCK_TIME.fullmatch(text)):
        return None
    number = _evaluate(match, value.replace(',', ''))
    if number is None or len(number) > _MAX_CHARACTERS:
        return None
    return number if match['sign'] != '-' else f'-{number}'


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


def _unwrapped(text: str) -> tuple[str, bool]:
    """Return the text without dollar signs, percent sign and trailing period; was there a %?"""
    text = text.strip().rstrip('.').strip('$ ')
    return text.removesuffix('%').removesuffix('\\').strip('$ '), text.endswith('%')


def _evaluate(match: re.Match[str], value: str) -> str | None:
    """Write the absolute value of a match of `QUANTITY`, whose first number is `value`."""
    if shift := match['exponent'] or match['ten_power']:
        sign, digits, places = Decimal(value).as_tuple()
        assert isinstance(places, int)
        if abs(int(shift)) > _MAX_CHARACTERS:
            return None
        return format(Decimal((sign, digits, places + int(shift))), 'f')
    if exponent := match['power']:
        if len(value) * abs(int(exponent)) > _MAX_CHARACTERS or not Fraction(value):
            return None
        return str(Fraction(value) ** int(exponent))
    if match['bottom']:
        if not value.isdecimal():
            return None
        return f'{int(value) * int(match["bottom"]) + int(match["top"])}/{match["bottom"]}'
    if divisor := match['divisor']:
        whole = divisor.isdecimal()
        return f'{value}/{divisor}' if whole else str(Fraction(value) / Fraction(divisor))
    return match['value']


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


def _equal_or_rounded(a: Number, b: Number) -> bool:
    if a.value == b.value:
        return True
    if 1 in (a.value.denominator, b.value.denominator) or a.places == b.places:
        return False
    places = min(n.places for n in (a, b) if n.places is not None)
    error = abs(a.value - b.value)
    return error * 10**places < 1 and error * 1000 <= max(abs(a.value), abs(b.value))
