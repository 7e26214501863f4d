"""Rewrite Chinese numbers, such as 三十五, 负5, 3又2分之1 and 3万5千, in digits."""

import re
from fractions import Fraction

_DIGITS = {c: k for k, c in enumerate('零一二三四五六七八九')} | {'〇': 0, '两': 2}
_UNITS = {'十': 10, '百': 100, '千': 1000}
_MYRIADS = {'万': 10**4, '亿': 10**8}
_COLLOQUIAL = {'百': 10, '千': 100, '万': 1000}  # what a digit after them counts
_MAX_CHARACTERS = 30  # in a numeral

_CHARACTERS = ''.join([*_DIGITS, *_UNITS, *_MYRIADS])
# 一 and 十 begin words that state no number; 千 begins the units 千米, 千克 and 千瓦.
NUMERAL = (
    r'(?!一(?:共|起|样|定|些|般|半|下|直|边|旦|切|致|点|律)|十分|万一|千万不|百般)'
    rf'(?<![第每这那哪任某{_CHARACTERS}])(?<!没有)(?P<numeral>(?:(?!千[米克瓦])[{_CHARACTERS}])++(?:点[{"".join(_DIGITS)}]++)?)'
)  # fmt: skip
_PART = rf'(?:(?<![0-9.])[0-9]++(?:\.[0-9]++)?|[{_CHARACTERS}]{{1,{_MAX_CHARACTERS}}}+)'
_FRACTION = re.compile(
    rf'(?:(?P<whole>(?<![0-9.])[0-9]{{1,9}}|[{_CHARACTERS}]{{1,{_MAX_CHARACTERS}}}+)又)?(?P<bottom>{_PART})分之(?P<top>{_PART})'
)
_MIXED = re.compile(r'(?<![0-9])([0-9]{1,9})又([0-9]{1,9})/([0-9]{1,9})')
_NEGATIVE = re.compile(rf'(?:负|零下) ?(?=[0-9.]|[{_CHARACTERS}])')
_DECIMAL = r'[0-9]{1,9}(?:\.[0-9]{1,9})?'
_SCALES = re.compile(  # two scales, or a scale with a number after it
    rf'(?<![0-9.])(?:(?P<hundred_millions>{_DECIMAL})亿(?=[0-9])(?:(?P<myriads>{_DECIMAL})万)?'
    rf'|(?P<only_myriads>{_DECIMAL})万(?=[0-9]))'
    r'(?:(?P<rest>[0-9]{1,9})(?![0-9.])(?P<unit>千(?![米克瓦])|百)?)?'
)


def chinese_to_digits(text: str) -> str:
    """Rewrite fractions, negative numbers and numbers with a scale inside in plain notation.

    `3又2分之1` and `3又1/2` become `7/2`, `百分之五` becomes `5%`, `负5` and `零下5` become `-5`,
    `3万5千` becomes `35000`. A scale at the end, as in `15万`, is kept like a unit.
    """
    text = _FRACTION.sub(_plain_fraction, text)
    text = _MIXED.sub(_improper_fraction, text)
    return _SCALES.sub(_joined_scales, _NEGATIVE.sub('-', text))


def parse_numeral(text: str) -> Fraction | None:
    """Return the value of a Chinese numeral: 三十五, 二〇二四, 三点五. None if it is too long."""
    whole, _, decimals = text.partition('点')
    if len(text) > _MAX_CHARACTERS or not whole:
        return None
    value = Fraction(_parse_whole(whole))
    for place, digit in enumerate(decimals, 1):
        value += Fraction(_DIGITS[digit], 10**place)
    return value


def _parse_whole(text: str) -> int:
    if all(character in _DIGITS for character in text):
        return int(''.join(str(_DIGITS[character]) for character in text))
    total = section = digit = 0  # section: below the next 万 or 亿
    for character in text:
        if character in _DIGITS:
            digit = _DIGITS[character]
        elif character in _UNITS:
            section += (digit or 1) * _UNITS[character]
            digit = 0
        elif character == '万':
            total += (section + digit or 1) * _MYRIADS[character]
            section = digit = 0
        else:  # 亿 multiplies all before it
            total = (total + section + digit or 1) * _MYRIADS[character]
            section = digit = 0
    # 三千五 is 3500, 三千零五 is 3005.
    return total + section + digit * max(1, _COLLOQUIAL.get(text[-2:-1], 1))


def _number(text: str) -> Fraction | None:
    return Fraction(text) if text[0].isascii() else parse_numeral(text)


def _plain_fraction(match: re.Match[str]) -> str:
    top = _number(match['top'])
    if match['bottom'] in ('百', '100') and top is not None and not match['whole']:
        return f'{_decimal(top)}%'
    bottom = _number(match['bottom'])
    if not bottom or top is None:
        return match.group()
    value = (_number(match['whole']) or 0 if match['whole'] else 0) + top / bottom
    return f'{value.numerator}/{value.denominator}'


def _improper_fraction(match: re.Match[str]) -> str:
    whole, top, bottom = map(int, match.groups())
    return f'{whole * bottom + top}/{bottom}'


def _joined_scales(match: re.Match[str]) -> str:
    value = Fraction(match['hundred_millions'] or 0) * 10**8
    value += Fraction(match['myriads'] or match['only_myriads'] or 0) * 10**4
    return _decimal(value + int(match['rest'] or 0) * _UNITS.get(match['unit'], 1))


def _decimal(value: Fraction) -> str:
    """Write a number with few decimals."""
    return str(value.numerator) if value.denominator == 1 else f'{float(value):.12g}'
