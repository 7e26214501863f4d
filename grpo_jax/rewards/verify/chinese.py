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
_RUN = f'[{_CHARACTERS}]{{1,{_MAX_CHARACTERS}}}+'  # of the characters of a numeral
_PART = rf'(?:(?<![0-9.])[0-9]++(?:\.[0-9]++)?[百千万亿]?|(?<![0-9]){_RUN})'
_FRACTION = re.compile(
    rf'(?:(?P<whole>(?<![0-9.])[0-9]{{1,9}}|{_RUN})又)?(?P<bottom>{_PART})分之(?P<top>{_PART})'
)
_MIXED = re.compile(r'(?<![0-9])([0-9]{1,9})又([0-9]{1,9})/([0-9]{1,9})')
_NEGATIVE = re.compile(rf'(?:负|零下) ?(?=[0-9.]|[{_CHARACTERS}])')
_DECIMAL = r'[0-9]{1,9}(?:\.[0-9]{1,9})?'
_SCALED = re.compile(  # numbers with a scale after each, and a last number
    rf'(?<![0-9.])(?:{_DECIMAL}(?:[百千]?[万亿]|[十百]|千(?![米克瓦]))零?)++'
    rf'(?:[0-9]{{1,9}}(?![0-9.]|千[米克瓦])|[一二三四五六七八九](?![{_CHARACTERS}0-9]))?'
)
_SCALED_PART = re.compile('[0-9.]+|.')
# Numerals in documents, which cannot be altered by a stroke.
_FINANCIAL = '壹贰貳叁參肆伍陆陸柒捌玖拾佰仟萬億圆零'
_PLAIN_NUMERALS = str.maketrans(_FINANCIAL, '一二二三三四五六六七八九十百千万亿元零')
_FINANCIAL_NUMERAL = re.compile(
    f'[{_FINANCIAL}万亿]{{2,{_MAX_CHARACTERS}}}+'
    '|(?<=[是为:])[壹贰叁肆柒捌玖](?=[元圆整角分个]|[^一-鿿]|$)'
)
_TWENTY = re.compile(  # 廿 and 卅, which also occur in names
    f'(?<![{_CHARACTERS}])[廿卅](?=[一二三四五六七八九](?![{_CHARACTERS}])|(?![一-鿿]))'
)
_MONEY_PART = f'(?:{_DECIMAL}|{_RUN})'
_MONEY = re.compile(
    rf'(?<![0-9.第每])(?P<yuan>{_MONEY_PART})[元块](?:钱)?零?'
    rf'(?:(?P<jiao>{_MONEY_PART})[角毛](?!度|形))?零?(?:(?P<fen>{_MONEY_PART})分(?![之钟米]))?'
)


def chinese_to_digits(text: str) -> str:
    """Rewrite fractions, negative numbers and numbers with a scale inside in plain notation.

    `3又2分之1` and `3又1/2` become `7/2`, `百分之五` becomes `5%`, `负5` and `零下5` become `-5`,
    `3万5千` becomes `35000`, `十五元五角` becomes `15.5元`. A single scale at the end, as in
    `15万`, is kept like a unit. Financial numerals such as 壹佰 are numerals.
    """
    text = _FINANCIAL_NUMERAL.sub(_plain_numeral, text)
    text = _TWENTY.sub(lambda match: '二十' if match[0] == '廿' else '三十', text)
    text = _SCALED.sub(_joined_scales, text)
    text = _FRACTION.sub(_plain_fraction, text)
    text = _NEGATIVE.sub('-', _MIXED.sub(_improper_fraction, text))
    return _MONEY.sub(_joined_money, text)


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
    """Return the value of digits, of digits with a scale such as 3千, or of a numeral."""
    if not text[0].isascii():
        return parse_numeral(text)
    scale = _UNITS.get(text[-1]) or _MYRIADS.get(text[-1])
    return Fraction(text[:-1]) * scale if scale else Fraction(text)


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
    """Write `1亿2千万` and `3千5` as one number; leave `15万` and scales that do not fall."""
    parts = _SCALED_PART.findall(match[0])
    if sum(part[0].isdecimal() or part in _DIGITS for part in parts if part != '零') < 2:
        return match[0]
    total = section = number = Fraction(0)  # section: below the next 万 or 亿
    unit = 10**12
    for part in parts:
        if part[0].isdecimal():
            number = Fraction(part)
        elif part in _UNITS:
            if _UNITS[part] >= unit:
                return match[0]
            unit = _UNITS[part]
            section, number = section + number * unit, Fraction(0)
        elif part in _MYRIADS:
            unit = _MYRIADS[part]
            total, section, number = total + (section + number) * unit, Fraction(0), Fraction(0)
        elif part == '零':
            unit = 10  # after it, a digit counts ones
        else:
            number = Fraction(_DIGITS[part])
    if number >= unit:
        return match[0]
    return _decimal(total + section + number * (unit // 10 if number < 10 else 1))


def _joined_money(match: re.Match[str]) -> str:
    """Write `十五元五角` as `15.5元`; leave an amount in 元 alone."""
    known = [_number(part) if part else Fraction(0) for part in match.groups()]
    parts = [part for part in known if part is not None]
    if not any(match.groups()[1:]) or len(parts) < len(known) or max(parts[1:]) >= 10:
        return match[0]
    yuan, jiao, fen = parts
    return f'{_decimal(yuan + jiao / 10 + fen / 100)}元'


def _plain_numeral(match: re.Match[str]) -> str:
    return match[0].translate(_PLAIN_NUMERALS)


def _decimal(value: Fraction) -> str:
    """Write a number with few decimals."""
    return str(value.numerator) if value.denominator == 1 else f'{float(value):.12g}'
