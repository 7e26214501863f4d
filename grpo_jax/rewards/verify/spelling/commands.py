r"""Synonyms of commands and environments: `\dfrac`, `\times`, `\choose`, `bmatrix`, `\approx`."""

import re

from grpo_jax.rewards.verify.spelling.rewrite import rewrite

_COUNT = r'(?:\{([^{}]*)\}|([0-9A-Za-z]))'
_BEFORE_COUNT = rf'(?:\{{ *\}}|(?<![0-9A-Za-z)}}\]])) *[_^] *{_COUNT} *'  # the {}_5 of {}_5C_2


def _combinations(match: re.Match[str]) -> str:
    n, k = (match[1] or match[2]), (match[3] or match[4])
    return f'\\binom{{{n}}}{{{k}}}'


def _permutations(match: re.Match[str]) -> str:
    n, k = (match[1] or match[2]), (match[3] or match[4])
    return f'\\frac{{({n})!}}{{({n}-({k}))!}}'


def _inequality(match: re.Match[str]) -> str:
    return r'\le ' if match[1] == 'l' or match[0] == '<=' else r'\ge '


REWRITES = (
    # Fractions and numbers of choices
    rewrite(r'\dfrac12', r'\frac12', r'\\(?:[dtcs]|nice)frac', r'\\frac', needs='frac'),
    rewrite(r'\dbinom52', r'\binom52', r'\\[dt]binom', r'\\binom', needs='binom'),
    rewrite(
        r'{n \choose 2}',
        r'\binom{n }{ 2}',
        r'\{([^{}]*)\\choose(?![A-Za-z])([^{}]*)\}',
        r'\\binom{\1}{\2}',
        needs='choose',
    ),
    rewrite(
        '{}_5C_2',
        r'\binom{5}{2}',
        rf'{_BEFORE_COUNT}(?:C|\\(?:mathrm|text|rm) *\{{? *C *\}}?) *_ *{_COUNT}',
        _combinations,
        needs='C',
    ),
    rewrite(
        '{}_5P_2',
        r'\frac{(5)!}{(5-(2))!}',
        rf'{_BEFORE_COUNT}(?:P|\\(?:mathrm|text|rm) *\{{? *P *\}}?) *_ *{_COUNT}',
        _permutations,
        needs='P',
    ),
    # Ellipses
    rewrite(r'3.14\ldots', '3.14', r'\\(?:ldots|dots|cdots)(?= *$)|\.\.\.+ *$', ''),
    rewrite(
        '1,...,n', r'1,\dots ,n', r'\\(?:ldots|cdots|dots[cb])(?![A-Za-z])|\.\.\.+', r'\\dots '
    ),
    # Matrices, cases and systems
    rewrite(
        r'\begin{matrix}1\cr 2', r'\begin{matrix}1\\ 2', r'\\cr(?![A-Za-z])', r'\\\\', needs='\\cr'
    ),
    rewrite(
        r'\pmatrix{1&2}',
        r'\begin{pmatrix}1&2\end{pmatrix}',
        r'\\pmatrix *\{((?:[^{}]|\{[^{}]*\})*)\}',
        r'\\begin{pmatrix}\1\\end{pmatrix}',
        needs='pmatrix',
    ),
    rewrite(
        r'\begin{pmatrix*}[r]',
        r'\begin{pmatrix}',
        r'\\(begin|end) *\{([a-z]*matrix)\*\}(?:\[[lcr]\])?',
        r'\\\1{\2}',
        needs='matrix*',
    ),
    rewrite(
        r'\end{bmatrix}',
        r'\end{pmatrix}',
        r'\\(begin|end) *\{[bB]matrix\}',
        r'\\\1{pmatrix}',
        needs='matrix',
    ),
    rewrite(
        r'\end{dcases}',
        r'\end{cases}',
        r'\\(begin|end) *\{dcases\*?\}',
        r'\\\1{cases}',
        needs='dcases',
    ),
    rewrite(
        r'\end{align*}',
        r'\end{aligned}',
        r'\\(begin|end) *\{(?:align|gather|gathered|split|eqnarray)\*?\}',
        r'\\\1{aligned}',
        needs='\\',
    ),
    rewrite('x&=1', 'x=1', r'& *(?=[=<>]|\\(?:le|ge|approx)(?![A-Za-z]))', '', needs='&'),
    # Relations
    rewrite(r'x\leqslant 2', r'x\le  2', r'\\(l|g)eq?(?:q|slant)?(?![A-Za-z])|<=|>=', _inequality),
    rewrite(
        'x!=3', r'x\ne 3', r'\\neq?(?![A-Za-z])|(?<![0-9)])!=|\\not *=', r'\\ne '
    ),  # not in 5!=120
    rewrite('x:=4', 'x=4', ':=', '=', needs=':='),
    rewrite(r'x\lt 1', 'x< 1', r'\\lt(?![A-Za-z])', '<', needs='\\lt'),
    rewrite(r'x\gt 1', 'x> 1', r'\\gt(?![A-Za-z])', '>', needs='\\gt'),
    rewrite(
        r'x\approx 5', 'x= 5', r'\\(?:approx|simeq|doteq|thickapprox)(?![A-Za-z])', '=', needs='\\'
    ),
    # Products and quotients
    rewrite('3 x 10^8', r'3\cdot 10^8', r'(?<=[0-9]) ?[xX] ?(?=10 *\^)', r'\\cdot ', needs='^'),
    rewrite(  # of vectors
        r'\vec{a}\times\vec{b}',
        r'\vec{a}\boxtimes\vec{b}',
        r'(\\(?:vec|overrightarrow|mathbf)(?: *\{[^{}]*\}| *[A-Za-z])) *\\times',
        r'\1\\boxtimes',
        needs='times',
    ),
    rewrite(
        r'2\times 3', r'2\cdot 3', r'\\(?:times|ast|bullet)(?![A-Za-z])', r'\\cdot', needs='\\'
    ),
    rewrite(r'6\div 2', '6/ 2', r'\\div(?![A-Za-z])', '/', needs='\\div'),
    rewrite('2**3', '2^3', r'\*\*', '^', needs='**'),
    # Brackets and signs
    rewrite(r'\lbrace 1', r'\{ 1', r'\\lbrace(?![A-Za-z])', r'\\{', needs='\\lbrace'),
    rewrite(r'1\rbrace', r'1\}', r'\\rbrace(?![A-Za-z])', r'\\}', needs='\\rbrace'),
    rewrite(r'\langle 1', '( 1', r'\\langle(?![A-Za-z])', '(', needs='\\langle'),
    rewrite(r'1\rangle', '1)', r'\\rangle(?![A-Za-z])', ')', needs='\\rangle'),
    rewrite(
        r'\lvert x\rvert', '| x|', r'\\[lr]?vert(?![A-Za-z])|\\mid(?![A-Za-z])', '|', needs='\\'
    ),
    rewrite(r'\lVert x\|', '|| x||', r'\\[lr]?Vert(?![A-Za-z])|\\\|', '||', needs='\\'),
    rewrite(r'3\colon 4', '3: 4', r'\\colon(?![A-Za-z])', ':', needs='\\colon'),
    rewrite(r'50\%', '50%', r'\\%', '%', needs='\\%'),
    rewrite(
        r'f^{\prime}', "f'", r'\^ *(?:\\prime(?![A-Za-z])|\{ *\\prime *\})', "'", needs='prime'
    ),
    rewrite(r'f^{\prime\prime}', "f''", r'\^ *\{ *\\prime *\\prime *\}', "''", needs='prime'),
    rewrite("f^{''}", "f''", r"\^ *\{ *('+) *\}", r'\1', needs="'"),
    rewrite(r'\mathbb{E}[X]', 'E[X]', r'\\mathbb *\{ *([EPV]) *\}', r'\1', needs='mathbb'),
)
