r"""Rewrite equal LaTeX answers in one spelling, such as `\dfrac 12` and `\frac{1}{2}`."""

import re

from grpo_jax.rewards.verify.units import TEXT, strip_units

MAX_LENGTH = 1000  # characters; a longer text is not an answer and is left unchanged

_UNICODE = str.maketrans(
    {
        '\N{MINUS SIGN}': '-',
        '\N{EN DASH}': '-',
        '\N{MULTIPLICATION SIGN}': r'\cdot ',
        '\N{MIDDLE DOT}': r'\cdot ',
        '\N{DOT OPERATOR}': r'\cdot ',
        '\N{DIVISION SIGN}': '/',
        '\N{GREEK SMALL LETTER PI}': r'\pi ',
        '\N{GREEK SMALL LETTER THETA}': r'\theta ',
        '\N{GREEK SMALL LETTER ALPHA}': r'\alpha ',
        '\N{GREEK SMALL LETTER BETA}': r'\beta ',
        '\N{INFINITY}': r'\infty ',
        '\N{SQUARE ROOT}': r'\sqrt ',
        '\N{LESS-THAN OR EQUAL TO}': r'\le ',
        '\N{LESS-THAN OR SLANTED EQUAL TO}': r'\le ',
        '\N{GREATER-THAN OR EQUAL TO}': r'\ge ',
        '\N{GREATER-THAN OR SLANTED EQUAL TO}': r'\ge ',
        '\N{NOT EQUAL TO}': r'\ne ',
        '\N{ALMOST EQUAL TO}': r'\approx ',
        '\N{UNION}': r'\cup ',
        '\N{ELEMENT OF}': r'\in ',
        '\N{EMPTY SET}': r'\emptyset ',
        '\N{DOUBLE-STRUCK CAPITAL R}': r'\mathbb{R}',
        '\N{PLUS-MINUS SIGN}': r'\pm ',
        '\N{ANGLE}': r'\angle ',
        '\N{DEGREE SIGN}': r'^\circ ',
        '\N{FRACTION SLASH}': '/',
        '\N{VULGAR FRACTION ONE HALF}': r'\frac{1}{2}',
        '\N{VULGAR FRACTION ONE QUARTER}': r'\frac{1}{4}',
        '\N{VULGAR FRACTION THREE QUARTERS}': r'\frac{3}{4}',
        '\N{RIGHT SINGLE QUOTATION MARK}': "'",
        '\N{PRIME}': "'",
        '\N{FULLWIDTH COMMA}': ', ',
        '\N{IDEOGRAPHIC COMMA}': ', ',
        '\N{FULLWIDTH SEMICOLON}': ';',
        '\N{FULLWIDTH LEFT PARENTHESIS}': '(',
        '\N{FULLWIDTH RIGHT PARENTHESIS}': ')',
        '\N{FULLWIDTH EQUALS SIGN}': '=',
        '~': ' ',
        '\n': ' ',
        '\t': ' ',
    }
)
_MAX_REPEATING = 60  # characters of a repeating decimal


def _superscript(match: re.Match[str]) -> str:
    return f'^{{{match[1].translate(_PLAIN_DIGITS)}}}'


def _inequality(match: re.Match[str]) -> str:
    return r'\le ' if match[1] == 'l' or match[0] == '<=' else r'\ge '


def _repeating_decimal(match: re.Match[str]) -> str:
    r"""Return `0.1\overline{6}` as a fraction."""
    whole, start, period = match.groups()
    if len(match[0]) > _MAX_REPEATING:
        return match[0]
    top = int(whole + start + period or '0') - int(whole + start or '0')
    return f'\\frac{{{top}}}{{{(10 ** len(period) - 1) * 10 ** len(start)}}}'


_TRIGONOMETRIC = 'sin|cos|tan|cot|sec|csc'
_FUNCTIONS = f'sqrt|pi|infty|arcsin|arccos|arctan|sinh|cosh|tanh|{_TRIGONOMETRIC}|log|ln|exp|theta'
_TOKEN = r'[0-9A-Za-z]|\\(?:pi|theta|alpha|beta)(?![A-Za-z])'
# \sin 60^\circ, where the degrees cannot be dropped
_DEGREES_IN_FUNCTION = (
    rf'(\\(?:{_TRIGONOMETRIC})(?:\^(?:[0-9]|\{{[^{{}}]*\}}))? *[({{]? *)([0-9.]+) *'
    r'(?:\\degree(?![A-Za-z])|\^ *(?:\\circ(?![A-Za-z])|\{ *\\circ *\}))'
)
_PLAIN_DIGITS = str.maketrans('⁰¹²³⁴⁵⁶⁷⁸⁹⁻', '0123456789-')
_SUPERSCRIPTS = '⁰¹²³⁴⁵⁶⁷⁸⁹⁻'
_DIGITS_3 = '(?=[0-9]{3}(?![0-9]))'
# The order matters: delimiters and spaces come first, so that later patterns can ignore them.
_REWRITES = [
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        (rf'(?<=[0-9])(?:\{{,\}}|, *\\!|\\,|\\ ) *{_DIGITS_3}', ''),  # thousands
        (r'\{,\}|,\\!', ','),
        (r'(?<!\\)\\(?:[()\[\],;:!> ]|$)|\\(?:display|text)style\b|\\q?quad\b', ' '),
        (
            r'\\(?:text)?color *\{[^{}]*\}|\\(?:tiny|small|normalsize|large|Large)(?![A-Za-z])',
            ' ',
        ),
        (r'\\\\ *\[[0-9.]+ *[a-z]{2}\]', r'\\\\'),
        (rf'([{_SUPERSCRIPTS}]+)', _superscript),
        (r'\\(?:left|right|middle|[bB]igg?[lr]?)(?![A-Za-z])\.?', ''),
        (r'\\(?:bf|rm|it|sf|displaylimits|limits)(?![A-Za-z])', ' '),
        (r'\\(?:underline|emph)(?= *\{)', r'\\textbf'),
        (r'\\(?:math(?:bf|rm|it|sf)|bm|boldsymbol) *(?=[0-9A-Za-z])', ''),
        (rf'\\(?:operatorname|mathrm|text) *\{{ *({_FUNCTIONS}) *\}}', r'\\\1 '),
        (r'\\(?:[dtcs]|nice)frac', r'\\frac'),
        (r'\\[dt]binom', r'\\binom'),
        (r'\{([^{}]*)\\choose(?![A-Za-z])([^{}]*)\}', r'\\binom{\1}{\2}'),
        (r'\\(?:ldots|dots|cdots)(?= *$)|\.\.\.+ *$', ''),
        (r'(?<=[0-9]) ?[xX] ?(?=10 *\^)', r'\\cdot '),
        (r'\+ *(?=\\infty)', ''),
        (
            r'(?i)\\text *\{ *(?:all|the set of) (?:all )?real numbers *\}|^all real numbers$',
            r'\\R ',
        ),
        (_DEGREES_IN_FUNCTION, r'\1{(\\frac{\2\\pi}{180})}'),
        (r'\\(l|g)eq?(?:q|slant)?(?![A-Za-z])|<=|>=', _inequality),
        (r'\\neq?(?![A-Za-z])|!=|\\not *=', r'\\ne '),
        (r'\\lt(?![A-Za-z])', '<'),
        (r'\\gt(?![A-Za-z])', '>'),
        (r'\\(?:approx|simeq|doteq|thickapprox)(?![A-Za-z])', '='),
        (r'(\\(?:vec|overrightarrow|mathbf)(?: *\{[^{}]*\}| *[A-Za-z])) *\\times', r'\1\\boxtimes'),
        (r'\\lg(?![A-Za-z])', r'\\log_{10}'),
        (r'\\(?:times|ast|bullet)(?![A-Za-z])', r'\\cdot'),
        (r'\\lbrace\b', r'\\{'),
        (r'\\rbrace\b', r'\\}'),
        (r'\\langle\b', '('),
        (r'\\rangle\b', ')'),
        (r'\\[lr]?vert\b|\\mid\b', '|'),
        (r'\\[lr]?Vert\b|\\\|', '||'),
        (r'\\div\b', '/'),
        (r'\\colon\b', ':'),
        (r'\\(?:varnothing|emptyset)\b|^ *\\\{ *\\\} *$', r'\\emptyset '),
        (r'\\(?:mathbb|mathbf|Bbb) *(?:\{ *R *\}|R(?![A-Za-z]))', r'\\R '),
        (r'\\?\$|(?:\\degree\b|\^ *(?:\\circ|\{ *\\circ *\}))(?: *[CF](?![A-Za-z]))?', ''),
        (r'\\%', '%'),
        (r'\^ *(?:\\prime(?![A-Za-z])|\{ *\\prime *\})', "'"),
        (r'\^ *\{ *\\prime *\\prime *\}', "''"),
        (r'\*\*', '^'),
        (rf'(?<![\\A-Za-z])({_FUNCTIONS})(?![A-Za-z])', r'\\\1'),
        (r'(?<![\\A-Za-z])infinity(?![A-Za-z])', r'\\infty'),
        (r'\\sqrt *\(([^()]*)\)', r'\\sqrt{\1}'),
        (rf'\\sqrt *({_TOKEN})', r'\\sqrt{\1}'),
        (rf'(\\sqrt *\[[^\[\]]*\]) *({_TOKEN})', r'\1{\2}'),
        (rf'\\(frac|binom) *({_TOKEN}) *({_TOKEN})', r'\\\1{\2}{\3}'),
        (rf'\\(frac|binom) *({_TOKEN}) *\{{', r'\\\1{\2}{'),
        (rf'(\\(?:frac|binom) *\{{[^{{}}]*\}}) *({_TOKEN})', r'\1{\2}'),
        (r'\^ *(\\frac *\{[^{}]*\} *\{[^{}]*\})', r'^{\1}'),
        (r'\^ *(-[0-9A-Za-z])', r'^{\1}'),
        (r'\^ *\(([^()]*)\)', r'^{(\1)}'),
        (
            r'(?<![0-9A-Za-z.\\_])([0-9]*)\.([0-9]*)\\(?:overline|dot) *\{?([0-9]+)\}?',
            _repeating_decimal,
        ),
        (r'(?<![:0-9])([0-9]+) *: *(?=[0-9]+$)', r'\1/'),  # a ratio
        (r'^(?:[=: ]|\\sim(?![A-Za-z]))+', ''),
    )
]
_RELATION = re.compile(r'[<>]|\\(?:le|ge|ne|lt|gt|in)(?![A-Za-z])')
_CONNECTIVE = re.compile(
    r',? *\\(?:text|mbox|mathrm|textrm) *\{ *,? *(and|or) *,? *\},?'
    r'|(?:(?<=[0-9)}\]])|,| ),? *(?<![A-Za-z\\])(and|or)(?= )(?! *(?:[=*/^_]|\+(?![0-9])))'
    r'|\\(lor|vee|land|wedge)(?![A-Za-z])'
)
_UNWRAP = re.compile(TEXT)
_GROUPED = re.compile(r'(?<![0-9.,])([0-9]{1,3}(?:,[0-9]{3})+)(?!,?[0-9])')
_GROUPED_ALONE = re.compile(r'[-+]?[0-9]{1,3}(?:,[0-9]{3})+(?:\.[0-9]+)?%?')
_SPACED_DIGITS = re.compile(r'(?<=[0-9]), +(?=[0-9]{3}(?![0-9]))')
_MIXED = re.compile(r'(?<![0-9./^_])([0-9]+) +([0-9]+) */ *([0-9]+)(?![0-9])')
_GAP = re.compile(r'(?<=[0-9]) +(?=[0-9])')
_SPACED_THOUSANDS = re.compile(r'[-+]?[0-9]{1,3}(?: [0-9]{3})+(?:\.[0-9]+)?')
_AFTER_COMMAND = re.compile(r'(\\[A-Za-z]+) +(?=[A-Za-z])')
_ONE = re.compile(r'([_^])\{([0-9A-Za-z])\}')
_WRAPPED = re.compile(
    r'[$ ]*\\(?:f?box(?:ed)?|text(?:bf|it|rm)?|math(?:bf|rm)|bm|boldsymbol|underline) *(\{.*\})'
    r'[$. ]*'
)
_ANGLE = re.compile(r'\\angle ([B-Z])([A-Z])([A-Z])(?![A-Za-z])')
_CHOICE = re.compile(
    r'(?:(?i:option|choice|answer)[ :]*)?\(([A-Z])\)|(?i:option|choice|answer)[ :]+([A-Z])'
)
_LABELED = re.compile(
    r'(?:\(([A-J])\)(?: +|(?=[0-9]))|([A-J])[:.)] +)(?![*/^=<>,|]|[-+](?![0-9.\\]))(.*\S)'
)
_WORD = re.compile(r'[A-Za-z]{3,}')
_SHORT_WORDS = frozenset({'no', 'on', 'in', 'up', 'ok', 'am', 'pm', 'is', 'it', 'at', 'to', 'of'})


def normal_form(text: str) -> str:
    r"""Rewrite an answer in one spelling, so that most equal answers become equal texts.

    White space, delimiters, sizes of brackets, unknown units after a number or formula, dollar and
    degree signs and the trailing period are dropped. `\dfrac12` becomes `\frac{1}{2}`, `1 1/2`
    becomes `1\frac{1}{2}`, `\text{even}` becomes `even`, `(C)` becomes `C`, `2, 3 and 5` becomes
    `2,3,5`, `5\text{ cm}` becomes `5\unit{cm}`, `\textbf{(E)}\ 15` becomes `\choice{E}{15}`. A
    comma between digits that separates elements becomes a semicolon where it could be taken for a
    thousands separator: `32, 349` becomes `32;349`.
    """
    text = text.strip()
    if len(text) > MAX_LENGTH:
        return text
    text = text.translate(_UNICODE)
    while (match := _WRAPPED.fullmatch(text)) and (inner := strip_braces(match[1])) != match[1]:
        text = inner
    for pattern, replacement in _REWRITES:
        text = pattern.sub(replacement, text)
    text = _replace_connectives(text)
    text = strip_units(strip_braces(text.strip().rstrip('.,;: ')))
    text = _UNWRAP.sub(r'\1', _UNWRAP.sub(r'\1', text)).strip()
    if letter := _CHOICE.fullmatch(text):
        return letter[1] or letter[2]
    choice = _LABELED.fullmatch(text)
    if choice and not _LABELED.match(choice[3]):
        return f'\\choice{{{choice[1] or choice[2]}}}{{{normal_form(choice[3])}}}'
    text = _mark_thousands(_MIXED.sub(r'\1\\frac{\2}{\3}', text))
    if _SPACED_THOUSANDS.fullmatch(text):
        text = text.replace(' ', '')
    text = _AFTER_COMMAND.sub('\\1\0', _GAP.sub('\0', text))
    text = ''.join(text.split()).replace('\0', ' ').rstrip('.,;:')
    text = _ANGLE.sub(_sort_ends, _ONE.sub(r'\1\2', text))
    text = strip_braces(text) if text.startswith('{') else text
    return text.lower() if is_word(text) and not is_product(text.lower()) else text


def is_word(text: str) -> bool:
    """Return whether the text is a word or a sequence of words, not a product of variables."""
    if _WORD.fullmatch(text):
        return not is_product(text)
    return text.lower() in _SHORT_WORDS


def is_product(letters: str) -> bool:
    """Return whether three or more letters are a product of variables, such as `xyz` or `abd`.

    They are if they are different small letters without a vowel, apart from a at the beginning, or
    next to each other in the alphabet.
    """
    if not re.fullmatch('[a-z]{3,}', letters) or len(set(letters)) < len(letters):
        return False
    vowels = set(letters.removeprefix('a')) & set('aeiou')
    return not vowels or ord(max(letters)) - ord(min(letters)) < len(letters)


def strip_braces(text: str) -> str:
    """Remove the outer braces, also double ones, if the last one closes the first."""
    while text.startswith('{') and _closes_at_end(text):
        text = text[1:-1].strip()
    return text


def _closes_at_end(text: str) -> bool:
    """Return whether the last character closes the brace that the text begins with."""
    depth = 0
    for position, character in enumerate(text):
        depth += (character == '{') - (character == '}')
        if not depth:
            return position == len(text) - 1
    return False


def _sort_ends(angle: re.Match[str]) -> str:
    start, vertex, end = angle.groups()
    return f'\\angle {min(start, end)}{vertex}{max(start, end)}'


def _replace_connectives(text: str) -> str:
    """Replace `and` and `or` by commas between values, by logical signs between relations."""
    relation = _RELATION.search(text)

    def sign(match: re.Match[str]) -> str:
        if not relation:
            return ', ' if match[1] or match[2] else match[0]
        word = match[1] or match[2] or match[3]
        return r' \lor ' if word in ('or', 'lor', 'vee') else r' \land '

    return _CONNECTIVE.sub(sign, text)


def _mark_thousands(text: str) -> str:
    """Remove commas that separate thousands; mark those that separate elements by a semicolon.

    Three digits after a comma belong to the number before it if they begin with 0, if they are in
    braces, or if the comma cannot separate elements: they do so with spaces, or there is a formula
    around the number. A number alone, such as 1,234, is left as it is. So are elements without
    spaces in brackets, such as (100,200).
    """
    if _GROUPED_ALONE.fullmatch(text):
        return text
    spaced = re.search('[,;] ', text) is not None
    text = _SPACED_DIGITS.sub(';', text)
    others = re.search('[,;]', _GROUPED.sub('', text)) is not None

    def join(match: re.Match[str]) -> str:
        before, after = text[: match.start()], text[match.end() :]
        in_braces = before.endswith('{') and not before.endswith('\\{') and after.startswith('}')
        depth = sum(before.count(c) for c in '([') - sum(before.count(c) for c in ')]')
        alone = before.rstrip().endswith('=') and not after
        in_formula = not others and depth == 0 and '\\{' not in before and not alone
        zero = any(group.startswith('0') for group in match[1].split(',')[1:])
        sure = in_braces or zero or spaced or in_formula
        return match[1].replace(',', '') if sure else match[1]

    return _GROUPED.sub(join, text)
