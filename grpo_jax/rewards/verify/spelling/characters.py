"""Typographic and full-width characters, and the LaTeX that each stands for."""

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
        '\N{DOUBLE-STRUCK CAPITAL Z}': r'\mathbb{Z}',
        '\N{DOUBLE-STRUCK CAPITAL N}': r'\mathbb{N}',
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
        '\N{FULLWIDTH POUND SIGN}': '£',
        '\N{FULLWIDTH YEN SIGN}': '¥',
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


def plain_characters(text: str) -> str:
    """Replace typographic and full-width characters by LaTeX."""
    return _WIDE_COMMA.sub(',', text).translate(_UNICODE)
