r"""Rewrite equal LaTeX answers in one spelling, such as `\dfrac 12` and `\frac{1}{2}`."""

import re

MAX_LENGTH = 1000  # characters; a longer text is not an answer and is left unchanged

_UNICODE = str.maketrans(
    {
        '\N{MINUS SIGN}': '-',
        '\N{EN DASH}': '-',
        '\N{MULTIPLICATION SIGN}': r'\cdot ',
        '\N{MIDDLE DOT}': r'\cdot ',
        '\N{DIVISION SIGN}': '/',
        '\N{GREEK SMALL LETTER PI}': r'\pi ',
        '\N{INFINITY}': r'\infty ',
        '\N{SQUARE ROOT}': r'\sqrt ',
        '\N{LESS-THAN OR EQUAL TO}': r'\le ',
        '\N{GREATER-THAN OR EQUAL TO}': r'\ge ',
        '\N{UNION}': r'\cup ',
        '\N{ELEMENT OF}': r'\in ',
        '\N{PLUS-MINUS SIGN}': r'\pm ',
        '\N{DEGREE SIGN}': '',
        '\N{SUPERSCRIPT TWO}': '^2',
        '\N{SUPERSCRIPT THREE}': '^3',
        '~': ' ',
        '\n': ' ',
        '\t': ' ',
    }
)
_TOKEN = r'[0-9A-Za-z]|\\pi(?![A-Za-z])'
# The order matters: delimiters and spaces come first, so that later patterns can ignore them.
_REWRITES = [
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        (r'\{,\}|,\\!', ','),  # thousands
        (r'(?<!\\)\\[()\[\],;:!> ]|\\displaystyle\b|\\q?quad\b', ' '),
        (r'\\(?:left|right|[bB]igg?[lr]?)(?![A-Za-z])\.?', ''),
        (r'\\[dtc]frac', r'\\frac'),
        (r'\\(le|ge|ne)q\b', r'\\\1'),
        (r'\\times(?![A-Za-z])', r'\\cdot'),
        (r'\\lbrace\b', r'\\{'),
        (r'\\rbrace\b', r'\\}'),
        (r'\\[lr]?vert\b|\\mid\b', '|'),
        (r'\\div\b', '/'),
        (r'\\?\$|\\degree\b|\^ *(?:\\circ|\{ *\\circ *\})', ''),
        (r'\\%', '%'),
        (r'\\approx\b', '='),
        (r'\*\*', '^'),
        (r'(?<![\\A-Za-z])(sqrt|pi|infty)(?![A-Za-z])', r'\\\1'),
        (r'\\sqrt *\(([^()]*)\)', r'\\sqrt{\1}'),
        (r'\\sqrt *([0-9A-Za-z])', r'\\sqrt{\1}'),
        (rf'\\frac *({_TOKEN}) *({_TOKEN})', r'\\frac{\1}{\2}'),
        (rf'\\frac *({_TOKEN}) *\{{', r'\\frac{\1}{'),
        (rf'(\\frac *\{{[^{{}}]*\}}) *({_TOKEN})', r'\1{\2}'),
        (r'(?<=\{)([0-9]{1,3}),([0-9]{3})(?=\})', r'\1\2'),
        (r'(?<=[0-9]) *: *(?=[0-9]+$)', '/'),  # a ratio
        (r'\\(?:text|mbox) *\{ *,? *(?:and|or) *\}', ', '),
        (r'(?<=[0-9)}]) *,? +(?:and|or) +(?=[-+0-9(\\])', ', '),
    )
]
_TEXT = r'\\(?:text(?:bf|it|rm|sf|normal)?|mbox|math(?:rm|bf|it|sf)|operatorname) *\{([^{}]*)\}'
_UNWRAP = re.compile(_TEXT)
_UNIT = re.compile(rf'(?<=[0-9}})A-Za-z%])[ ]*(?:{_TEXT}(?:\^[ ]*\{{?-?[0-9]\}}?)?[ ./]*)+$')
# A unit in plain letters after a number or a closing brace. Other short words may be variables.
_PLAIN_UNIT = re.compile(
    r'(?<=[0-9}%]) +(?:[A-Za-z]{4,}|[ckm]?m|[mk]?g|ml|lbs?|oz|ft|in|sq|cu|hrs?|min|sec|mph|deg)'
    r'(?:[ /]+[A-Za-z]+)*(?: *\^ *\{?[23]\}?)?$'
)
_MIXED = re.compile(r'(?<![0-9./^_])([0-9]+) +([0-9]+) */ *([0-9]+)(?![0-9])')
_GAP = re.compile(r'(?<=[0-9]) +(?=[0-9])')
_AFTER_COMMAND = re.compile(r'(\\[A-Za-z]+) +(?=[A-Za-z])')
_ONE = re.compile(r'([_^])\{([0-9A-Za-z])\}')
_NAME = re.compile(r'(?:[A-Za-z]|\\[a-z]+)(?:_[0-9A-Za-z])?(?:\([A-Za-z](?:,[A-Za-z])*\))?')
_NAMES = re.compile(r'\([A-Za-z](?:,[A-Za-z])+\)')
_MEMBER = re.compile(rf'{_NAME.pattern}\\in(?![A-Za-z])')
_LETTER = re.compile(r'(?<![\\A-Za-z])[A-Za-z]')
_CHOICE = re.compile(r'\(([A-Z])\)')
_WORD = re.compile(r'[A-Za-z]{3,}')


def normal_form(text: str) -> str:
    r"""Rewrite an answer in one spelling, so that most equal answers become equal texts.

    White space, delimiters, sizes of brackets, units after a number or formula, dollar and degree
    signs and the trailing period are dropped. `\dfrac12` becomes `\frac{1}{2}`, `1 1/2` becomes
    `1\frac{1}{2}`, `\text{even}` becomes `even`, `(C)` becomes `C`, `2, 3 and 5` becomes `2,3,5`.
    """
    text = text.strip()
    if len(text) > MAX_LENGTH:
        return text
    text = text.translate(_UNICODE)
    for pattern, replacement in _REWRITES:
        text = pattern.sub(replacement, text)
    text = _UNIT.sub('', _strip_braces(text.strip().rstrip('.,;: ')))
    text = _UNWRAP.sub(r'\1', text)
    if not text.lstrip().startswith('\\begin'):
        text = _PLAIN_UNIT.sub('', text)
    text = _MIXED.sub(r'\1\\frac{\2}{\3}', text)
    text = _AFTER_COMMAND.sub('\\1\0', _GAP.sub('\0', text))
    text = ''.join(text.split()).replace('\0', ' ').rstrip('.,;:')
    text = _ONE.sub(r'\1\2', text)
    text = _strip_braces(text) if text.startswith('{') else text
    text = _CHOICE.sub(r'\1', text) if _CHOICE.fullmatch(text) else text
    return text.lower() if is_word(text) else text


def strip_name(text: str) -> str:
    r"""Return the value without its name or derivation; unchanged if it has neither.

    `5` for `x=5`, `5=x` and `x=10/2=5`, `(1,2)` for `(x,y)=(1,2)`, `[0,1)` for `x\in[0,1)`.
    """
    if member := _MEMBER.match(text):
        return text[member.end() :]
    first, *rest = pieces = text.split('=')
    if not rest or not all(pieces) or (len(rest) > 1 and ',' in text):
        return text
    if _NAME.fullmatch(first) or _NAMES.fullmatch(first) or not _LETTER.search(text):
        return rest[-1]
    return first if len(rest) == 1 and _NAME.fullmatch(rest[0]) else text


def is_word(text: str) -> bool:
    """Return whether the text is three or more letters: a word, not a product of variables."""
    return bool(_WORD.fullmatch(text))


def _strip_braces(text: str) -> str:
    """Remove the outer braces if the last one closes the first."""
    depth = 0
    for position, character in enumerate(text):
        depth += (character == '{') - (character == '}')
        if not depth:
            return text[1:-1] if position == len(text) - 1 and text[0] == '{' else text
    return text
