r"""Names of functions: `sin x`, `\operatorname{tg}x` and `\exp\{x\}`; degrees in them."""

from grpo_jax.rewards.verify.spelling.rewrite import rewrite

_TRIGONOMETRIC = 'sin|cos|tan|cot|sec|csc'
_APPLIED = (
    'arcsin|arccos|arctan|sinh|cosh|tanh|coth|sech|csch'
    f'|{_TRIGONOMETRIC}|log|ln|exp|sgn'
)  # fmt: skip
_NAMES = f'sqrt|pi|infty|{_APPLIED}|theta'

REWRITES = (
    rewrite(
        r'\mathrm{sin}x',
        r'\sin x',
        rf'\\(?:operatorname|mathrm|text) *\{{ *({_NAMES}) *\}}',
        r'\\\1 ',
        needs='\\',
    ),
    rewrite(
        r'\text{sign}(x)',
        r'\sgn (x)',
        r'\\(?:operatorname|mathrm|text) *\{ *sign(?:um)? *\}(?= *[(A-Za-z0-9\\])',
        r'\\sgn ',
        needs='sign',
    ),
    rewrite('sin(x)', r'\sin(x)', rf'(?<![\\A-Za-z])({_NAMES})(?![A-Za-z])', r'\\\1'),
    rewrite(
        'infinity', r'\infty', r'(?<![\\A-Za-z])infinity(?![A-Za-z])', r'\\infty', needs='infinity'
    ),
    rewrite(
        r'\exp\{x\}',
        r'\exp(x)',
        rf'(\\(?:{_APPLIED})) *\\\{{((?:(?!\\[{{}}]).)*)\\\}}',
        r'\1(\2)',
        needs='\\{',
    ),
    rewrite(r'\exp[x]', r'\exp(x)', rf'(\\(?:{_APPLIED})) *\[([^\[\]]*)\]', r'\1(\2)', needs='['),
    rewrite(
        r'\operatorname{tg}x',
        r'\tg x',
        r'\\(?:operatorname|mathrm) *\{ *'
        r'((?:arc)?(?:tg|ctg|cotg)|a(?:rc?)?[sct][a-z]{2,3}h) *\}',
        r'\\\1 ',
        needs='\\',
    ),
    rewrite(r'\arctg x', r'\arctan x', r'\\(arc)?tg(?![A-Za-z])', r'\\\1tan', needs='tg'),
    rewrite(r'\ctg x', r'\cot x', r'\\c(?:tg|otg)(?![A-Za-z])', r'\\cot', needs='\\c'),
    rewrite(
        r'\arsinh x',
        r'\sinh^{-1} x',
        r'\\a(?:rc?)?(sinh|cosh|tanh)(?![A-Za-z])',
        r'\\\1^{-1}',
        needs='h',
    ),
    rewrite(r'\lg 2', r'\log_{10} 2', r'\\lg(?![A-Za-z])', r'\\log_{10}', needs='\\lg'),
    rewrite(  # degrees cannot be dropped in a function
        r'\sin 60^\circ',
        r'\sin {(\frac{60\pi}{180})}',
        rf'(\\(?:{_TRIGONOMETRIC})(?:\^(?:[0-9]|\{{[^{{}}]*\}}))? *[({{]? *)([0-9.]+) *'
        r'(?:\\degree(?![A-Za-z])|\^ *(?:\\circ(?![A-Za-z])|\{ *\\circ *\}))',
        r'\1{(\\frac{\2\\pi}{180})}',
        needs='\\',
    ),
)
