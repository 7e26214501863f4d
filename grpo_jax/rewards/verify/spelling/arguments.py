r"""Braces around arguments: `\frac12`, `\sqrt3`, `x^{-1}`; then roots and repeating decimals."""

import re

from grpo_jax.rewards.verify.spelling.rewrite import BRACED, rewrite

_TOKEN = r'[0-9A-Za-z]|\\(?:pi|theta|alpha|beta)(?![A-Za-z])'
_MAX_REPEATING = 60  # characters of a repeating decimal


def _repeating_decimal(match: re.Match[str]) -> str:
    whole, start, period = match.groups()
    if len(match[0]) > _MAX_REPEATING:
        return match[0]
    top = int(whole + start + period or '0') - int(whole + start or '0')
    return f'\\frac{{{top}}}{{{(10 ** len(period) - 1) * 10 ** len(start)}}}'


REWRITES = (
    rewrite(  # $ and degrees
        r'$60^\circ$',
        '60',
        r'\$|(?:\\degree(?![A-Za-z])|\^ *(?:\\circ|\{ *\\circ *\}))(?: *[CF](?![A-Za-z]))?',
        '',
    ),
    # Roots
    rewrite(
        r'\root3\of{2}',
        r'\sqrt[3]{2}',
        r'\\root *\{?([0-9A-Za-z]+)\}? *\\of(?![A-Za-z]) *',
        r'\\sqrt[\1]',
        needs='\\root',
    ),
    rewrite(r'\surd 2', r'\sqrt 2', r'\\surd(?![A-Za-z])', r'\\sqrt', needs='\\surd'),
    rewrite('cbrt(2)', r'\sqrt[3](2)', r'(?<![\\A-Za-z])cbrt(?= *\()', r'\\sqrt[3]', needs='cbrt'),
    rewrite(
        r'\sqrt(2)',
        r'\sqrt{2}',
        r'(\\sqrt(?: *\[[^\[\]]*\])?) *\(([^()]*)\)',
        r'\1{\2}',
        needs='\\sqrt',
    ),
    rewrite(r'\sqrt2', r'\sqrt{2}', rf'\\sqrt *({_TOKEN})', r'\\sqrt{\1}', needs='\\sqrt'),
    rewrite(
        r'\sqrt[3]2',
        r'\sqrt[3]{2}',
        rf'(\\sqrt *\[[^\[\]]*\]) *({_TOKEN})',
        r'\1{\2}',
        needs='\\sqrt',
    ),
    # Fractions
    rewrite(
        r'\frac12',
        r'\frac{1}{2}',
        rf'\\(frac|binom) *({_TOKEN}) *({_TOKEN})',
        r'\\\1{\2}{\3}',
        needs='\\',
    ),
    rewrite(
        r'\frac1{2}', r'\frac{1}{2}', rf'\\(frac|binom) *({_TOKEN}) *\{{', r'\\\1{\2}{', needs='\\'
    ),
    rewrite(
        r'\frac{1}2',
        r'\frac{1}{2}',
        rf'(\\(?:frac|binom) *{BRACED}) *({_TOKEN})',
        r'\1{\2}',
        needs='\\',
    ),
    rewrite(
        r'\sqrt\frac{1}{2}',
        r'\sqrt{\frac{1}{2}}',
        r'(\\sqrt(?: *\[[^\[\]]*\])?) *(\\frac *\{[^{}]*\} *\{[^{}]*\})',
        r'\1{\2}',
        needs='\\sqrt',
    ),
    # Exponents
    rewrite(
        r'x^\frac{1}{2}',
        r'x^{\frac{1}{2}}',
        r'\^ *(\\frac *\{[^{}]*\} *\{[^{}]*\})',
        r'^{\1}',
        needs='^',
    ),
    rewrite('x^-1', 'x^{-1}', r'\^ *(-[0-9A-Za-z])', r'^{\1}', needs='^'),
    rewrite('x^(1/2)', 'x^{(1/2)}', r'\^ *\(([^()]*)\)', r'^{(\1)}', needs='^'),
    # Numbers
    rewrite(
        r'0.1\overline{6}',
        r'\frac{15}{90}',
        r'(?<![0-9A-Za-z.\\_])([0-9]*)\.([0-9]*)\\(?:overline|dot) *\{?([0-9]+)\}?',
        _repeating_decimal,
        needs='.',
    ),
    rewrite('3 : 4', '3/4', r'(?<![:0-9])([0-9]+) *: *(?=[0-9]+$)', r'\1/', needs=':'),
    rewrite('= 5', '5', r'^(?:[=: ]|\\(?:sim|cong)(?![A-Za-z]))+', ''),
)
