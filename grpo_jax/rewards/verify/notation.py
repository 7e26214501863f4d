r"""Rewrite the ways to write a number, such as `\dfrac12`, `½` or `70\,000`, in plain notation.

Every rewrite takes time linear in the length of the text.
"""

import re
import unicodedata
from fractions import Fraction

_MINUS = '\N{HYPHEN}\N{NON-BREAKING HYPHEN}\N{FIGURE DASH}\N{EN DASH}\N{MINUS SIGN}'
_TIMES = '\N{MULTIPLICATION SIGN}\N{MIDDLE DOT}\N{DOT OPERATOR}\N{BULLET OPERATOR}'
_DIVIDE = '\N{DIVISION SIGN}\N{FRACTION SLASH}\N{DIVISION SLASH}'
_SPACES = '\N{NO-BREAK SPACE}\N{THIN SPACE}\N{NARROW NO-BREAK SPACE}\N{FIGURE SPACE}'
_FULL_WIDTH = '0123456789.%+-/$=<>()[]{}:*#^~' + 'abcdefghijklmnopqrstuvwxyz'
_CHARACTERS = str.maketrans(
    {chr(0xFEE0 + ord(c)): c for c in _FULL_WIDTH + _FULL_WIDTH.upper()}
    | dict.fromkeys(_MINUS, '-')
    | dict.fromkeys(_TIMES, '*')
    | dict.fromkeys(_DIVIDE, '/')
    | dict.fromkeys(_SPACES, ' ')
    | {'\N{FULLWIDTH YEN SIGN}': '\N{YEN SIGN}', '\N{DEGREE SIGN}': ' '}
)
_FULL_WIDTH_COMMA = re.compile(r'(?<=[0-9])，(?=[0-9]{3}(?![0-9]))')
_SUPERSCRIPT = re.compile('[⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻]++')
_VULGAR = {
    c: Fraction(unicodedata.numeric(c)).limit_denominator(10)
    for c in '¼½¾⅐⅑⅒⅓⅔⅕⅖⅗⅘⅙⅚⅛⅜⅝⅞'
}  # fmt: skip
_VULGAR_FRACTION = re.compile(f'(?P<whole>[0-9] ?)?(?P<fraction>[{"".join(_VULGAR)}])')

_GROUP_MARK = r'(?:\{,\}|,\\!|\\[,;:!]|\\thinspace(?![A-Za-z])|(?<!\\)\\? |~|[\'’](?=[0-9]))'
_GROUPS = re.compile(
    rf'(?<![0-9.,])(?<![0-9] )(?P<first>[1-9][0-9]{{0,2}})(?P<rest>(?:{_GROUP_MARK}[0-9]{{3}})++)'
    r'(?P<more>,?[0-9])?'  # then it is no number: left as it is
)
_GROUP_MARKS = re.compile('[^0-9]++')
_REWRITABLE = re.compile(r'[\\^_{|+-]')
_FONT = re.compile(
    r'\\(?:text(?:bf|it|rm|sf|tt|normal|up)?|math(?:rm|bf|it|sf|tt|normal)|mbox|bm|boldsymbol|'
    r'underline|emph|operatorname)\s*+\{([^{}]*+)\}'
)
_COLOR = re.compile(r'\\(?:text)?color\{[^{}]*+\}')
_REWRITES = [
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        (r'\{,\}', ','),
        (r'\\!', ''),
        (r'(?<!\\)\\[,;: ]|\\(?:q?quad|thinspace)(?![A-Za-z])|(?<=[-+0-9}])~(?=[0-9\\])', ' '),
        (r'\\(?:left|right|displaystyle)(?![A-Za-z])', ''),
        (r'\\[lr]?vert(?![A-Za-z]) ?|\\\|', '|'),
        (r'(?<![^\s{$(=:*是为])\|[+-]?([0-9]++(?:\.[0-9]++)?)\|(?![^\s}$).,;])', r'\1'),  # |-3|
        (r'\\(?:times|cdot)(?![A-Za-z]) ?|\\ast(?![A-Za-z])', '*'),
        (r'(?<=\*)\{ *10 *\}', '10'),
        (r'\\colon(?![A-Za-z])', ':'),
        (r'(?<=[={([]-)\(([0-9]++(?:[.,][0-9]++)*+)\)', r'\1'),
        (r'\{ *([0-9]{1,20}) *\\over *([0-9]{1,20}) *\}', r'\\frac{\1}{\2}'),
        (r'\\div(?![A-Za-z])', '/'),
        (r'\^ *(?:\{ *)?\\circ(?![A-Za-z])(?: *\})?|\\degree(?![A-Za-z])', ' '),
        (r'(?<=[A-Za-z}])\^(?:[23]|\{[23]\})', ''),  # the 2 of cm^2 is no number
        (r'(?<=[A-Za-z])_(?:[0-9]|\{[0-9]{1,3}\})', ''),  # nor that of x_2
        # A sign may stand apart from its number where nothing can be subtracted from.
        (r'(?<=[=:({\[$#])( *)([+-]) +(?=[0-9.$\\€£¥])', r'\1\2'),
        (r'(?<=\bis )([+-]) +(?=[0-9.$\\€£¥])', r'\1'),
    )
]
_PART = r'[0-9]++(?:,[0-9]{3})*+(?:\.[0-9]++)?+'
_ARGUMENT = rf'(?:\{{ *+([+-]?{_PART}) *+\}}|([0-9]))'
_FRACTION = re.compile(
    rf'(?P<whole>[0-9] *)?(?P<sign>[+-] *)?\\(?:[dtcs]|x|nice)?frac *{_ARGUMENT} *{_ARGUMENT}'
)


def plain_notation(text: str) -> str:
    r"""Rewrite numbers in plain notation; other text keeps its meaning to a reader.

    Typographic and full-width characters become ASCII, `½` and `\frac{1}{2}` become `1/2` (after a
    whole number, with a space before it), `70\,000`, `70{,}000` and `70 000` become `70,000`,
    `\times` becomes `*`, `10³` becomes `10^3`. Commands for fonts, sizes and colors, degrees, the
    power of a unit and the digits of a subscript are dropped.
    """
    text = _FULL_WIDTH_COMMA.sub(',', text.translate(_CHARACTERS))
    if not text.isascii():
        text = _VULGAR_FRACTION.sub(_plain_vulgar, _SUPERSCRIPT.sub(_plain_superscript, text))
    text = _GROUPS.sub(_comma_groups, text)
    if _REWRITABLE.search(text):
        text = _COLOR.sub('', text)
        for _ in range(2):  # a font in a font
            text = _FONT.sub(r'\1', text)
        for pattern, replacement in _REWRITES:
            text = pattern.sub(replacement, text)
        text = _FRACTION.sub(_plain_fraction, text)
    return text


def _plain_vulgar(match: re.Match[str]) -> str:
    fraction = f'{_VULGAR[match["fraction"]]}'
    return f'{match["whole"].rstrip()} {fraction}' if match['whole'] else fraction


def _plain_superscript(match: re.Match[str]) -> str:
    return '^' + unicodedata.normalize('NFKC', match.group()).replace('\N{MINUS SIGN}', '-')


def _comma_groups(match: re.Match[str]) -> str:
    groups = match['first'] + _GROUP_MARKS.sub(',', match['rest'])
    return match.group() if match['more'] else groups


def _plain_fraction(match: re.Match[str]) -> str:
    """Write a fraction as `-3/4`, with one sign for both of its parts."""
    top, bottom = match[3] or match[4], match[5] or match[6]
    quotient = f'{top.lstrip("+-")}/{bottom.lstrip("+-")}'
    sign, whole = match['sign'] or '', match['whole'] or ''
    if (top + bottom).count('-') == 1:
        sign = {'-': '+', '+': '-', '': '-'}[sign.strip()]
    if whole:  # 2\frac{1}{2} is a sum, 2-\frac{1}{2} a difference
        return f'{whole.rstrip()}{sign or " "}{quotient}'
    return f'{sign}{quotient}'
