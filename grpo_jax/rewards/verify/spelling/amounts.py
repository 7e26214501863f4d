r"""Digits and currencies: `70\,000`, `1'000`, `0{,}5`, `1.5\mathrm{e}{3}`, `x⁻³`, `\pounds 5`.

A dollar sign is written as ＄, because $ delimits formulas.
"""

import re

from grpo_jax.rewards.verify.spelling.rewrite import rewrite

_PLAIN_DIGITS = str.maketrans('⁰¹²³⁴⁵⁶⁷⁸⁹⁻', '0123456789-')
_CURRENCY = '[€£¥₹₩₽]|(?:US|HK|AU|CA|NZ|NT)? ?＄'


def _superscript(match: re.Match[str]) -> str:
    return f'^{{{match[1].translate(_PLAIN_DIGITS)}}}'


REWRITES = (
    rewrite(
        r'1.5\,\mathrm{e}{-3}',
        '1.5e-3',
        r'(?<=[0-9])(?: |\\,)*\\(?:mathrm|text) *\{ *[eE] *\} *\{ *([-+]?[0-9]+) *\}',
        r'e\1',
        needs='\\',
    ),
    rewrite(
        "1'000",
        '1000',
        r"(?<![_^A-Za-z0-9.])([1-9][0-9]{0,2})'(?=[0-9]{3}(?![0-9]))",
        r'\1',
        needs="'",
    ),
    rewrite(r'\euro 5', '€ 5', r'\\(?:text)?euro(?![A-Za-z])', '€', needs='euro'),
    rewrite(r'\pounds 5', '£ 5', r'\\(?:pounds|textsterling)(?![A-Za-z])', '£', needs='\\'),
    rewrite(r'\yen 5', '¥ 5', r'\\(?:text)?yen(?![A-Za-z])', '¥', needs='yen'),
    rewrite(r'\$5', '＄5', r'\\textdollar(?![A-Za-z])|(?<!\\)\\\$', '＄', needs='\\'),
    rewrite('-$5', '-＄5', r'^(-?) *\$ *(?=-?[0-9][0-9.,]*$)', r'\1＄', needs='$'),
    rewrite('5$', '5＄', r'^(-?[0-9][0-9.,]*) *\$$', r'\1＄', needs='$'),
    rewrite(
        r'70\,000',
        '70000',
        r'(?<=[0-9])(?:\{\\?,\}|, *\\!|\\,|\\ ) *(?=[0-9]{3}(?![0-9]))',
        '',
    ),
    rewrite('1{,}2', '1,2', r'\{,\}|,\\!', ',', needs=','),
    rewrite(
        r'5\text{ €}', '5€', rf'\\(?:text|mathrm|mbox) *\{{ *({_CURRENCY}) *\}}', r'\1', needs='\\'
    ),
    rewrite('x⁻³', 'x^{-3}', '([⁰¹²³⁴⁵⁶⁷⁸⁹⁻]+)', _superscript),
)
