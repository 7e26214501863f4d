r"""Sets, intervals and points: `]0,1[`, `\mathbb R^+`, `no solution`, `A(3,4)`."""

import re

from grpo_jax.rewards.verify.spelling.rewrite import rewrite


def _interval(match: re.Match[str]) -> str:
    before, opening, ends, closing = match.groups()
    return f'{before}{"[" if opening == "[" else "("}{ends}{"]" if closing == "]" else ")"}'


REWRITES = (
    # The empty set and sets of numbers
    rewrite(
        'No real solutions.',
        r'\emptyset ',
        r'(?i)^ *(?:\\text *\{)? *(?:(?:(?:there (?:is|are)|(?:the )?[a-z]+ has) )?'
        r'no (?:real )?(?:solutions?|roots?)|(?:the )?empty set|无实?数?[解根]|空集)[ }.]*$',
        r'\\emptyset ',
    ),
    rewrite(
        r'\varnothing',
        r'\emptyset ',
        r'\\(?:varnothing|emptyset)(?![A-Za-z])|^ *\\\{ *\\\} *$',
        r'\\emptyset ',
    ),
    rewrite(
        'x is any real number',
        r'\R ',
        r'(?i)^(?:[a-z] *)?(?:\\text *\{ *)?(?:[a-z] )?(?:(?:is|can be) )?'
        r'(?:all|any|every|the set of(?: all)?)'
        r' reals?(?: (?:numbers?|values?))?(?: *\}? *(?:of )?[a-z]| *\}?)$'
        r'|\\text *\{ *(?:all|the set of) (?:all )?real numbers *\}',
        r'\\R ',
        needs='real',
    ),
    rewrite(
        r'\mathbb{R}',
        r'\R ',
        r'\\(?:mathbb|mathbf|Bbb) *(?:\{ *R *\}|R(?![A-Za-z]))',
        r'\\R ',
        needs='\\',
    ),
    rewrite(
        r'\Bbb Z',
        r'\mathbb{Z}',
        r'\\(?:mathbb|Bbb) *(?:\{ *([NZ]) *\}|([NZ])(?![A-Za-z]))',
        r'\\mathbb{\1\2}',
        needs='\\',
    ),
    rewrite(
        r'\R ^+',
        r'(0,\infty)',
        r'\\R *(?:[\^_] *\{? *\+ *\}?|_ *\{ *> *0 *\})',
        r'(0,\\infty)',
        needs='\\R',
    ),
    # Members and unions
    rewrite(r'x\not\in A', r'x\notin A', r'\\not *\\in(?![A-Za-z])', r'\\notin', needs='\\not'),
    rewrite(
        r'x\notin\{1,2\}', r'x\ne 1,2', r'\\notin *\\\{([^{}]*)\\\}', r'\\ne \1', needs='\\notin'
    ),
    rewrite(
        r'\bigcup[2,3]', r'\cup [2,3]', r'\\big(cup|cap)(?! *[_^A-Za-z])', r'\\\1 ', needs='\\big'
    ),
    rewrite(
        '[0,1] U [2,3]', r'[0,1]\cup [2,3]', r'(?<=[\])}]) *U *(?=[\[(\\])', r'\\cup ', needs='U'
    ),
    # Intervals and points
    rewrite(r'(0,+\infty)', r'(0,\infty)', r'\+ *(?=\\infty)', '', needs='\\infty'),
    rewrite('(-oo, 2)', r'(-\infty , 2)', r'(?<=[-+(,\[ ])(?:oo|inf)(?=[ ,;)\]])', r'\\infty '),
    rewrite(
        ']0,1]',
        '(0,1]',
        r'(^|\\(?:cup|cap|in)) *([\[\]])([^\[\]]+[,;][^\[\]]+)([\[\]])(?= *(?:$|\\cup|\\cap))',
        _interval,
    ),
    rewrite('(3|4)', '(3,4)', r'^ *\((?!\\begin)([^()|]+)\|([^()|]+)\) *$', r'(\1,\2)', needs='|'),
    rewrite('<3,4>', '(3,4)', r'^ *<([^<>]*,[^<>]*)> *$', r'(\1)', needs='<'),
    rewrite(
        'A(3,4)',
        'A=(3,4)',
        r"^ *([ABD-Z]'?) *\( *([-0-9\\.][^()]*[,;][^()]*)\) *$",
        r'\1=(\2)',
        needs='(',
    ),
)
