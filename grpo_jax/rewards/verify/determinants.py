r"""Determinants in a normal form, expanded: `\begin{vmatrix}a&b\\c&d\end{vmatrix}` is ad - bc."""

import re

_DETERMINANT = re.compile(
    r'\\det ?(?P<open>[(\[]?)\\begin\{(?P<name>(?:p|small)?matrix|array)\}'
    r'(?:\{[lcr|]*\})?(?P<cells>(?:(?!\\(?:begin|end)).)*)\\end\{(?P=name)\}(?(open)[)\]]?)'
    r'|\|\\begin\{(?P<barred>(?:small)?matrix|array)\}'
    r'(?:\{[lcr|]*\})?(?P<between>(?:(?!\\(?:begin|end)).)*)\\end\{(?P=barred)\}\|'
    r'|\\begin\{vmatrix\}(?P<inside>(?:(?!\\(?:begin|end)).)*)\\end\{vmatrix\}'
)
_MAX_SIZE = 4  # a determinant of n rows has n! terms


def expand_determinants(form: str) -> str:
    r"""Replace the determinants of square matrices by their expansions along the first row.

    `\det\begin{pmatrix}…`, `\begin{vmatrix}…` and `|\begin{array}…|` are determinants.
    """
    return _DETERMINANT.sub(_expanded, form)


def _expanded(match: re.Match[str]) -> str:
    cells = match['cells'] or match['between'] or match['inside'] or ''
    rows = [row.split('&') for row in cells.removesuffix('\\\\').split('\\\\')]
    square = all(len(row) == len(rows) and all(row) for row in rows)
    return f'({_expansion(rows)})' if square and len(rows) <= _MAX_SIZE else match[0]


def _expansion(rows: list[list[str]]) -> str:
    """Return the expansion along the first row, whose zeros have no term."""
    first, *rest = rows
    if not rest:
        return first[0]
    terms = [
        f'{"-" if column % 2 else "+"}({cell})\\cdot({_expansion(minor)})'
        for column, cell in enumerate(first)
        if cell != '0'
        for minor in [[row[:column] + row[column + 1 :] for row in rest]]
    ]
    return ''.join(terms).removeprefix('+') or '0'
