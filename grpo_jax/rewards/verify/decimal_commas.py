r"""Decimal commas, as in `25,00 €`, `(0,5;2)` and `0{,}5`, where nothing else can be meant.

`0,5` alone stays a list of two numbers, and `1,000` stays one thousand.
"""

import re

_CURRENCY = '(?:€|₽|EUR|CHF|zł|kr|руб)'  # of countries that write decimal commas
_IN_BRACES = re.compile(
    r'(?<![0-9])(0)\{,\}(?=[0-9])'
    r'|(?<![0-9.,}])([0-9]+)\{,\}(?=(?:[0-9]{1,2}|[0-9]{4,})(?![0-9{]))'
)
_MONEY = re.compile(rf'-?{_CURRENCY}? *-?[0-9.]+,[0-9]{{2}} *{_CURRENCY}?\.?')
_LEADING_ZERO = re.compile(r'-?[0-9]+,0(?:[0-9]|[0-9]{3,})')  # 25,00 is no list: 00 is no number
_POINTS_AND_COMMA = re.compile(r'(?<![0-9.,])([0-9]{1,3}(?:\.[0-9]{3}){2,}),([0-9]+)(?![0-9.,])')
_BRACKETS = re.compile(
    r'(\\\{|(?<![A-Za-z0-9_}])[(\[\]])([^()\[\]{};]*;[^()\[\]{}]*?)(\\\}|[)\[\]])'
)
_COMMA = re.compile(r'(?<=0),(?=[0-9])|(?<=[0-9]),(?=(?:[0-9]{1,2}|[0-9]{4,})(?![0-9]))')


def commas_in_braces_to_points(text: str) -> str:
    r"""Replace `{,}` in a decimal: `0{,}5` is 0.5, `1{,}000` is left as one thousand."""
    return _IN_BRACES.sub(r'\1\2.', text)


def decimal_commas_to_points(text: str) -> str:
    """Replace commas by points where only a decimal can be meant.

    That is in amounts of money (`12,50 €`), after groups of digits with points between them
    (`1.234.567,89`), before a 0 that begins no number (`25,00`), and in brackets whose elements are
    separated by semicolons (`(0,5;2)`). `[1,2;3,4]` may be a matrix and is left as it is.
    """
    money = _MONEY.fullmatch(text.strip()) and re.search(_CURRENCY, text)
    if money or _LEADING_ZERO.fullmatch(text.strip()):
        return text.strip().rstrip('.').replace('.', '').replace(',', '.')
    text = _POINTS_AND_COMMA.sub(lambda match: match[0].replace('.', '').replace(',', '.'), text)
    return _BRACKETS.sub(_in_brackets, text) if ';' in text and ',' in text else text


def _in_brackets(match: re.Match[str]) -> str:
    elements = match[2].split(';')
    decimals = [_COMMA.sub('.', element) for element in elements]
    commas = [element.count(',') for element in elements]
    if max(commas) > 1 or any(',' in each for each in decimals):
        return match[0]
    may_be_matrix = match[1] == '[' and match[3] == ']' and min(commas) == 1
    return match[0] if may_be_matrix else f'{match[1]}{";".join(decimals)}{match[3]}'
