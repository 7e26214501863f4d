"""Other spellings of LaTeX commands, symbols and numbers, each rewritten in one way.

The order of the rewrites matters: delimiters and spaces come first, so that later patterns can
ignore them.
"""

import re

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
        '\N{CUBE ROOT}': r'\sqrt[3]',
        '\N{FOURTH ROOT}': r'\sqrt[4]',
        '\N{LESS-THAN OR EQUAL TO}': r'\le ',
        '\N{LESS-THAN OR SLANTED EQUAL TO}': r'\le ',
        '\N{GREATER-THAN OR EQUAL TO}': r'\ge ',
        '\N{GREATER-THAN OR SLANTED EQUAL TO}': r'\ge ',
        '\N{NOT EQUAL TO}': r'\ne ',
        '\N{ALMOST EQUAL TO}': r'\approx ',
        '\N{UNION}': r'\cup ',
        '\N{INTERSECTION}': r'\cap ',
        '\N{SET MINUS}': r'\setminus ',
        '\N{LOGICAL OR}': r'\lor ',
        '\N{LOGICAL AND}': r'\land ',
        '\N{WHITE UP-POINTING TRIANGLE}': r'\triangle ',
        '\N{ELEMENT OF}': r'\in ',
        '\N{EMPTY SET}': r'\emptyset ',
        '\N{DOUBLE-STRUCK CAPITAL R}': r'\mathbb{R}',
        '\N{PLUS-MINUS SIGN}': r'\pm ',
        '\N{ANGLE}': r'\angle ',
        '\N{DEGREE SIGN}': r'^\circ ',
        '\N{DEGREE CELSIUS}': r'^\circ C',
        '\N{FRACTION SLASH}': '/',
        '\N{VULGAR FRACTION ONE HALF}': r'\frac{1}{2}',
        '\N{VULGAR FRACTION ONE QUARTER}': r'\frac{1}{4}',
        '\N{VULGAR FRACTION THREE QUARTERS}': r'\frac{3}{4}',
        '\N{RIGHT SINGLE QUOTATION MARK}': "'",
        '\N{PRIME}': "'",
        '\N{DOUBLE PRIME}': "''",
        '\N{FULLWIDTH COLON}': ':',
        '\N{FULLWIDTH FULL STOP}': '.',
        '\N{IDEOGRAPHIC FULL STOP}': '.',
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
_WIDE_COMMA = re.compile(r'(?<=[0-9])，(?=[0-9]{3}(?![0-9]))')
_LINE_BREAK = re.compile(r'(?<=[^\\])\\\\(?! *$)')
_MAX_REPEATING = 60  # characters of a repeating decimal


def _superscript(match: re.Match[str]) -> str:
    return f'^{{{match[1].translate(_PLAIN_DIGITS)}}}'


def _interval(match: re.Match[str]) -> str:
    """Return the interval `]0,1[` as `(0,1)`."""
    before, opening, ends, closing = match.groups()
    return f'{before}{"[" if opening == "[" else "("}{ends}{"]" if closing == "]" else ")"}'


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
_BRACED = r'\{(?:[^{}]|\{(?:[^{}]|\{[^{}]*\})*\})*\}'
_DIGITS_3 = '(?=[0-9]{3}(?![0-9]))'
_REWRITES = [
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        (r'^ *(\*\*|\*|__|`)(?! )(.*[^ ])\1 *$', r'\2'),  # Markdown
        (r'^\\(?:text(?:bf|rm)?|math(?:bf|rm)) *\{ *\(([A-J])\) *\} *(?=.)', r'(\1) '),
        (r'^\\text *\{[^{}]*(?<![A-Za-z])(?:is|are|equals|about|approximately) *\}(?=.)', ''),
        (r'^(?:about|approximately|approx\.|roughly|nearly) +(?=[-0-9\\$])', ''),
        (r'^(?:\\text *\{ *)?(?:both|either) *\}? +', ''),
        (r'(\\(?:text|mbox|mathrm|textrm) *\{ *,? *(?:and|or)) +([-0-9.$\\][^{}]*)\}', r'\1}\2'),
        (r'(?<=[0-9])(?: |\\,)*\\(?:mathrm|text) *\{ *[eE] *\} *\{ *([-+]?[0-9]+) *\}', r'e\1'),
        (r'\\[hv]?phantom *\{[^{}]*\}|\\[hv]space\*? *\{[^{}]*\}', ' '),
        (r'\\(?:left|up)root *\{[^{}]*\}', ''),
        (r'\\(?:therefore|normalfont|ensuremath|mathop|hline|strut)(?![A-Za-z])', ' '),
        (r"(?<![_^A-Za-z0-9.])([1-9][0-9]{0,2})'(?=[0-9]{3}(?![0-9]))", r'\1'),
        (r'\\\\ *$', ''),
        (r'^(-?) *([€₹₩₽]) *(-?[0-9][0-9.,]*)$', r'\1\3\2'),
        (r'^(-?) *\\\$ *(-?[0-9][0-9.,]*)$', r'\1\2\\text{ dollars}'),
        (rf'(?<=[0-9])(?:\{{\\?,\}}|, *\\!|\\,|\\ ) *{_DIGITS_3}', ''),  # thousands
        (r'\{,\}|,\\!', ','),
        (
            r'(?<!\\)\\(?:[()\[\],;:!> ]|$)|\\(?:(?:display|text)style|q?quad)(?![A-Za-z])',
            ' ',
        ),
        (
            r'\\(?:text)?color(?:box)? *\{[^{}]*\}'
            r'|\\(?:tiny|small|normalsize|large|Large)(?![A-Za-z])',
            ' ',
        ),
        (r'\\\\ *\[[0-9.]+ *[a-z]{2}\]', r'\\\\'),
        (rf'([{_SUPERSCRIPTS}]+)', _superscript),
        (r'\\(?:left|right|middle|[bB]igg?[lr]?)(?![A-Za-z])\.?', ''),
        (r'\\(?:bf|rm|it|sf|displaylimits|limits)(?![A-Za-z])', ' '),
        (r'\\(?:underline|emph)(?= *\{)', r'\\textbf'),
        (r'\\(?:math(?:bf|rm|it|sf|tt|normal)|bm|pmb|boldsymbol) *(?=[0-9A-Za-z])', ''),
        (rf'\\(?:operatorname|mathrm|text) *\{{ *({_FUNCTIONS}) *\}}', r'\\\1 '),
        (
            r'\\(?:operatorname|mathrm) *\{ *'
            r'((?:arc)?(?:tg|ctg|cotg)|a(?:rc?)?[sct][a-z]{2,3}h) *\}',
            r'\\\1 ',
        ),
        (r'\\(arc)?tg(?![A-Za-z])', r'\\\1tan'),
        (r'\\c(?:tg|otg)(?![A-Za-z])', r'\\cot'),
        (r'\\a(?:rc?)?(sinh|cosh|tanh)(?![A-Za-z])', r'\\\1^{-1}'),
        (r'\\mathbb *\{ *([EPV]) *\}', r'\1'),
        (r'\\(?:[dtcs]|nice)frac', r'\\frac'),
        (r'\\[dt]binom', r'\\binom'),
        (r'\{([^{}]*)\\choose(?![A-Za-z])([^{}]*)\}', r'\\binom{\1}{\2}'),
        (r'\\(?:ldots|dots|cdots)(?= *$)|\.\.\.+ *$', ''),
        (r'\\(?:ldots|cdots|dots[cb])(?![A-Za-z])|\.\.\.+', r'\\dots '),
        (r'\\cr(?![A-Za-z])', r'\\\\'),
        (r'\\pmatrix *\{((?:[^{}]|\{[^{}]*\})*)\}', r'\\begin{pmatrix}\1\\end{pmatrix}'),
        (r'\\(begin|end) *\{([a-z]*matrix)\*\}(?:\[[lcr]\])?', r'\\\1{\2}'),
        (r'\\(begin|end) *\{[bB]matrix\}', r'\\\1{pmatrix}'),
        (r'\\(begin|end) *\{dcases\*?\}', r'\\\1{cases}'),
        (r'\\(begin|end) *\{(?:align|gather|gathered|split|eqnarray)\*?\}', r'\\\1{aligned}'),
        (r'& *(?=[=<>]|\\(?:le|ge|approx)(?![A-Za-z]))', ''),
        (r'(?<=[0-9]) ?[xX] ?(?=10 *\^)', r'\\cdot '),
        (r'\+ *(?=\\infty)', ''),
        (
            r'(?i)^(?:[a-z] *)?(?:\\text *\{ *)?(?:[a-z] )?(?:(?:is|can be) )?'
            r'(?:all|any|every|the set of(?: all)?)'
            r' reals?(?: (?:numbers?|values?))?(?: *\}? *(?:of )?[a-z]| *\}?)$'
            r'|\\text *\{ *(?:all|the set of) (?:all )?real numbers *\}',
            r'\\R ',
        ),
        (_DEGREES_IN_FUNCTION, r'\1{(\\frac{\2\\pi}{180})}'),
        (r'\\(l|g)eq?(?:q|slant)?(?![A-Za-z])|<=|>=', _inequality),
        (r'\\neq?(?![A-Za-z])|(?<![0-9)])!=|\\not *=', r'\\ne '),
        (r'\\not *\\in(?![A-Za-z])', r'\\notin'),
        (r'\\notin *\\\{([^{}]*)\\\}', r'\\ne \1'),
        (r':=', '='),
        (r'\\lt(?![A-Za-z])', '<'),
        (r'\\gt(?![A-Za-z])', '>'),
        (r'\\(?:approx|simeq|doteq|thickapprox)(?![A-Za-z])', '='),
        (r'(\\(?:vec|overrightarrow|mathbf)(?: *\{[^{}]*\}| *[A-Za-z])) *\\times', r'\1\\boxtimes'),
        (r'\\lg(?![A-Za-z])', r'\\log_{10}'),
        (r'\\(?:times|ast|bullet)(?![A-Za-z])', r'\\cdot'),
        (r'\\lbrace(?![A-Za-z])', r'\\{'),
        (r'\\rbrace(?![A-Za-z])', r'\\}'),
        (r'\\langle(?![A-Za-z])', '('),
        (r'\\rangle(?![A-Za-z])', ')'),
        (r'\\[lr]?vert(?![A-Za-z])|\\mid(?![A-Za-z])', '|'),
        (r'\\[lr]?Vert(?![A-Za-z])|\\\|', '||'),
        (r'\\div(?![A-Za-z])', '/'),
        (r'\\big(cup|cap)(?! *[_^A-Za-z])', r'\\\1 '),
        (r'(?<=[\])}]) *U *(?=[\[(\\])', r'\\cup '),
        (r'(?<=[-+(,\[ ])(?:oo|inf)(?=[ ,;)\]])', r'\\infty '),
        (r'\\colon(?![A-Za-z])', ':'),
        (r'\\(?:varnothing|emptyset)(?![A-Za-z])|^ *\\\{ *\\\} *$', r'\\emptyset '),
        (r'\\(?:mathbb|mathbf|Bbb) *(?:\{ *R *\}|R(?![A-Za-z]))', r'\\R '),
        (r'\\R *(?:[\^_] *\{? *\+ *\}?|_ *\{ *> *0 *\})', r'(0,\\infty)'),
        (
            r'(^|\\(?:cup|cap|in)) *([\[\]])([^\[\]]+[,;][^\[\]]+)([\[\]])(?= *(?:$|\\cup|\\cap))',
            _interval,
        ),
        (r'^ *\((?!\\begin)([^()|]+)\|([^()|]+)\) *$', r'(\1,\2)'),
        (r'^ *<([^<>]*,[^<>]*)> *$', r'(\1)'),
        (r"^ *([ABD-Z]'?) *\( *([-0-9\\.][^()]*[,;][^()]*)\) *$", r'\1=(\2)'),
        (
            r'\\?\$|(?:\\degree(?![A-Za-z])|\^ *(?:\\circ|\{ *\\circ *\}))(?: *[CF](?![A-Za-z]))?',
            '',
        ),
        (r'\\pounds(?![A-Za-z])', '£'),
        (r'\\%', '%'),
        (r'\^ *(?:\\prime(?![A-Za-z])|\{ *\\prime *\})', "'"),
        (r'\^ *\{ *\\prime *\\prime *\}', "''"),
        (r"\^ *\{ *('+) *\}", r'\1'),
        (r'\*\*', '^'),
        (rf'(?<![\\A-Za-z])({_FUNCTIONS})(?![A-Za-z])', r'\\\1'),
        (r'(?<![\\A-Za-z])infinity(?![A-Za-z])', r'\\infty'),
        (r'\\root *\{?([0-9A-Za-z]+)\}? *\\of(?![A-Za-z]) *', r'\\sqrt[\1]'),
        (r'\\surd(?![A-Za-z])', r'\\sqrt'),
        (r'(?<![\\A-Za-z])cbrt(?= *\()', r'\\sqrt[3]'),
        (r'(\\sqrt(?: *\[[^\[\]]*\])?) *\(([^()]*)\)', r'\1{\2}'),
        (rf'\\sqrt *({_TOKEN})', r'\\sqrt{\1}'),
        (rf'(\\sqrt *\[[^\[\]]*\]) *({_TOKEN})', r'\1{\2}'),
        (rf'\\(frac|binom) *({_TOKEN}) *({_TOKEN})', r'\\\1{\2}{\3}'),
        (rf'\\(frac|binom) *({_TOKEN}) *\{{', r'\\\1{\2}{'),
        (rf'(\\(?:frac|binom) *{_BRACED}) *({_TOKEN})', r'\1{\2}'),
        (r'(\\sqrt(?: *\[[^\[\]]*\])?) *(\\frac *\{[^{}]*\} *\{[^{}]*\})', r'\1{\2}'),
        (r'\^ *(\\frac *\{[^{}]*\} *\{[^{}]*\})', r'^{\1}'),
        (r'\^ *(-[0-9A-Za-z])', r'^{\1}'),
        (r'\^ *\(([^()]*)\)', r'^{(\1)}'),
        (
            r'(?<![0-9A-Za-z.\\_])([0-9]*)\.([0-9]*)\\(?:overline|dot) *\{?([0-9]+)\}?',
            _repeating_decimal,
        ),
        (r'(?<![:0-9])([0-9]+) *: *(?=[0-9]+$)', r'\1/'),  # a ratio
        (r'^(?:[=: ]|\\(?:sim|cong)(?![A-Za-z]))+', ''),
    )
]


def plain_characters(text: str) -> str:
    """Replace typographic and full-width characters by LaTeX."""
    return _WIDE_COMMA.sub(',', text).translate(_UNICODE)


def one_spelling(text: str) -> str:
    """Rewrite synonymous commands, notations and numbers in one spelling."""
    if '\\begin' not in text:
        text = _LINE_BREAK.sub(', ', text)
    for pattern, replacement in _REWRITES:
        text = pattern.sub(replacement, text)
    return text
