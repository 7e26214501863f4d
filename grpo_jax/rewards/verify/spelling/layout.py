r"""Fonts, sizes, colors, spaces and other commands that change the looks alone."""

from grpo_jax.rewards.verify.spelling.rewrite import rewrite

REWRITES = (
    rewrite(
        r'\phantom{x}7',
        ' 7',
        r'\\[hv]?phantom *\{[^{}]*\}|\\[hv]space\*? *\{[^{}]*\}',
        ' ',
        needs='\\',
    ),
    rewrite(
        r'\sqrt[\leftroot{-2}3]{2}',
        r'\sqrt[3]{2}',
        r'\\(?:left|up)root *\{[^{}]*\}',
        '',
        needs='root',
    ),
    rewrite(
        r'\therefore x=7',
        '  x=7',
        r'\\(?:therefore|normalfont|ensuremath|mathop|hline|strut)(?![A-Za-z])',
        ' ',
        needs='\\',
    ),
    rewrite('7\\\\ ', '7', r'\\\\ *$', '', needs='\\'),
    rewrite(
        r'5,\quad 7',
        '5,  7',
        r'(?<!\\)\\(?:[()\[\],;:!> ]|$)|\\(?:(?:display|text)style|q?quad)(?![A-Za-z])',
        ' ',
        needs='\\',
    ),
    rewrite(
        r'\color{blue}{5}',
        ' {5}',
        r'\\(?:text)?color(?:box)? *\{[^{}]*\}'
        r'|\\(?:tiny|small|normalsize|large|Large)(?![A-Za-z])',
        ' ',
        needs='\\',
    ),
    rewrite(r'1\\[4pt]2', r'1\\2', r'\\\\ *\[[0-9.]+ *[a-z]{2}\]', r'\\\\', needs='\\\\'),
    rewrite(
        r'\left(1,2\right]',
        '(1,2]',
        r'\\(?:left|right|middle|[bB]igg?[lr]?)(?![A-Za-z])\.?',
        '',
        needs='\\',
    ),
    rewrite(
        r'{\bf 5}', '{  5}', r'\\(?:bf|rm|it|sf|displaylimits|limits)(?![A-Za-z])', ' ', needs='\\'
    ),
    rewrite(
        r'\underline{5}', r'\textbf{5}', r'\\(?:underline|emph)(?= *\{)', r'\\textbf', needs='\\'
    ),
    rewrite(
        r'\mathbf 5',
        '5',
        r'\\(?:math(?:bf|rm|it|sf|tt|normal)|bm|pmb|boldsymbol) *(?=[0-9A-Za-z])',
        '',
        needs='\\',
    ),
)
