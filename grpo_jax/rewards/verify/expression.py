r"""Normal forms as expressions for the parser: what it can read, and how to write it.

The parser of `math-verify` reads some texts as other mathematics than what is meant: words as
products of letters, `\angle ABC` as a product of four symbols, `f'(x)` as f times x, a power T as a
transpose, `3 4` as a sum. Here a text is either written so that it is read as meant, or it is
opaque: then it is equal only to the same text.
"""

import re
import zlib

from grpo_jax.rewards.verify.normal_form import is_product

_GREEK = (
    'alpha|beta|gamma|delta|epsilon|varepsilon|zeta|eta|theta|iota|kappa|lambda|mu|nu|xi|rho|sigma'
    '|tau|phi|varphi|chi|psi|omega|Gamma|Delta|Theta|Lambda|Sigma|Phi|Psi|Omega|ell'
)
_FUNCTIONS = (
    'sin|cos|tan|cot|sec|csc|arcsin|arccos|arctan|sinh|cosh|tanh|log|ln|exp|max|min|sqrt|frac|binom'
    '|sum|prod|lfloor|rfloor|lceil|rceil'
)
_COMMAND = re.compile(r'\\([A-Za-z]+|.)')
_READ = frozenset(f'{_GREEK}|{_FUNCTIONS}|pi|infty|cdot|le|ge|ne|vec|hat|bar|overline'.split('|'))
_CHARACTERS = re.compile(r"[0-9A-Za-z+\-*/^_=<>().,!|{}\[\]\\%:' ]*")
_SUBSCRIPT = re.compile(r'_(?:\{[^{}]*\}|.)')
_LETTERS = re.compile(r'(?<!\\)(?<![A-Za-z])[A-Za-z]{3,}')
# Numbers without a sign between them, several ratios or factorials, products of matrices,
# derivatives.
_UNREADABLE = re.compile(
    r'[0-9.] +[0-9.]|\.[0-9]*\.|[0-9]_|:.*:|!!'
    r'|[A-Z]\^(?:T|\{T\})[A-Z]|[A-Z][A-Z]\^(?:T|\{T\})'  # matrices do not commute
    r'|\\frac\{d(?:\^(?:[0-9]|\{[^{}]*\}))?(?:[a-z]|\\[a-z]+)?(?:\([a-z]\))?\}\{d[a-z]'
)
# Functions that the parser lacks, by others. The argument is in brackets, a symbol or a fraction.
_DEFINITIONS = {
    'coth': r'\frac{{1}}{{\tanh({0})}}',
    'sech': r'\frac{{1}}{{\cosh({0})}}',
    'csch': r'\frac{{1}}{{\sinh({0})}}',
    'sgn': r'\frac{{{0}}}{{|{0}|}}',
}
_BRACKET = r'\((?:[^()]|\((?:[^()]|\([^()]*\))*\))*\)'
_DEFINED = re.compile(
    rf'\\(?P<function>{"|".join(_DEFINITIONS)})(?:\^(?P<power>[0-9]|\{{[0-9]+\}}))? ?'
    rf'(?P<argument>{_BRACKET}|[0-9]*(?:[A-Za-z]|\\(?:{_GREEK}|pi)(?![A-Za-z]))(?![_^])'
    r'|\\frac\{[^{}]*\}\{[^{}]*\})'
)
_SQUARE_BRACKETS = re.compile(r'(?<!\\sqrt)\[([^][(),;]*)\]')
_MIXED = re.compile(r'(?<![0-9.}\])A-Za-z!_^])([0-9]+)\\frac\{([0-9]+)\}\{([0-9]+)\}')
_SCIENTIFIC = re.compile(
    r'(?<![0-9A-Za-z.}_\\])([0-9]+(?:\.[0-9]+)?|\.[0-9]+)'
    r'[eE]([-+]?[0-9]+(?![0-9.A-Za-z^])|[0-9]+(?=[A-Za-z]))'  # 1e3x, but 2e-3x is 2e - 3x
)
# A name of a command is matched first, so that its letters are no symbols.
_SUBSCRIPTED = r'(?:_(?:[0-9A-Za-z]|\{[^{}]*\}))?'
_PRIMED = re.compile(rf"\\[A-Za-z]+|([A-Za-z]{_SUBSCRIPTED}'+)")
_CALL = re.compile(
    rf'\\[A-Za-z]+|((?:[fgh]|[A-Z](?={_SUBSCRIPTED}\([A-Za-z0-9](?:,[A-Za-z0-9])*\)))'
    rf'{_SUBSCRIPTED}(?:\^\{{-1\}})?\()'
)
_BEFORE_BRACKET = re.compile(rf'\\[A-Za-z]+|([A-Za-z]{_SUBSCRIPTED})(?=\()')
# Between these the parser would add, as in a mixed fraction.
_FACTORS = re.compile(
    r'\)(?=\(|\\frac|[0-9])|(?<![_^0-9.])[0-9.]+(?=\()|\\frac\{[0-9]+\}\{[0-9]+\}(?=\\frac|\(|[0-9])'
)
_LOG_BASE = re.compile(r'\\log_([0-9a-z]) ?')
_GREEK_BEFORE_BRACKET = re.compile(rf'\\(?:{_GREEK}|pi) ?(?=\()')
# The argument of a function ends at the next sign of multiplication.
_ARGUMENT = re.compile(
    rf'(\\(?:sin|cos|tan|cot|sec|csc|ln|log)(?:_\{{[^{{}}]*\}})?(?:\^(?:[0-9]|\{{[^{{}}]*\}}))?) ?'
    rf'([0-9]*(?:[A-Za-z]|\\(?:{_GREEK}|pi))|[0-9]+) ?(?=\\cdot|\*)'
)
_LETTER_D = re.compile(r'\\[A-Za-z]+|_\{[^{}]*\}|(d)(?!_)')  # d is a variable, not a differential
_POWER_T = re.compile(r'\^(?:T|\{T\})')


def scientific(form: str) -> str:
    r"""Replace `1.5e-3` by `1.5\cdot10^{-3}`."""
    return _SCIENTIFIC.sub(r'(\1\\cdot10^{\2})', form)


def expression(form: str) -> str | None:
    """Return the text for the parser; None if the normal form is opaque."""
    form = _name_floors(_LOG_BASE.sub(r'\\log_{\1}', form))
    form = _DEFINED.sub(_by_definition, form)
    if not _CHARACTERS.fullmatch(form) or _UNREADABLE.search(form):
        return None
    if not _READ.issuperset(_COMMAND.findall(form)):
        return None
    words = _LETTERS.findall(_SUBSCRIPT.sub(' ', _COMMAND.sub(' ', form)))
    if not all(is_product(word) for word in words):
        return None
    form = _PRIMED.sub(lambda match: _symbol(match[1]) if match[1] else match[0], form)
    if "'" in form:
        return None
    text = _name_calls(form)
    if text is None:
        return None
    text = _BEFORE_BRACKET.sub(lambda m: f'{m[1]}\\cdot ' if m[1] else m[0], text)
    text = _GREEK_BEFORE_BRACKET.sub(lambda match: f'{match[0]}\\cdot ', text)
    text = _ARGUMENT.sub(r'\1(\2)', text)
    text = _LETTER_D.sub(lambda match: _symbol('d') if match[1] else match[0], text)
    text = _MIXED.sub(r'(\1+\\frac{\2}{\3})', text)
    text = _FACTORS.sub(lambda match: f'{match[0]}\\cdot ', text)
    return _POWER_T.sub('^{(T)}', text).replace('%', '\\%')


def _by_definition(match: re.Match[str]) -> str:
    """Write a function that the parser lacks by others."""
    argument = match['argument'].removeprefix('(')
    argument = argument.removesuffix(')') if argument != match['argument'] else argument
    power = f'^{match["power"]}' if match['power'] else ''
    return f'({_DEFINITIONS[match["function"]].format(argument)}){power}'


def _name_floors(form: str) -> str:
    r"""Write Gauss brackets, as in `[x]+[2y]`, as `\lfloor x\rfloor+\lfloor 2y\rfloor`.

    Square brackets also group, as in `2[x+1]`. They are Gauss brackets where at least one of them
    would group nothing. Those with round brackets inside always group.
    """
    if not any(map(_groups_nothing, _SQUARE_BRACKETS.finditer(form))):
        return form
    return _SQUARE_BRACKETS.sub(r'\\lfloor \1\\rfloor ', form)


def _groups_nothing(bracket: re.Match[str]) -> bool:
    """Return whether the value would be the same without the brackets."""
    inside = _COMMAND.sub('', bracket[1])
    before, after = bracket.string[: bracket.start()][-1:], bracket.string[bracket.end() :][:1]
    if not re.search('[A-Za-z]', inside):
        return False
    if after == '^':
        return len(inside) == 1
    is_sum = re.search('(?<=.)[+-]', re.sub(r'\{[^{}]*\}', '', inside)) is not None
    return not is_sum or (before in '+({=,|' and after in '+-)}=,|')


def _name_calls(text: str) -> str | None:
    """Replace calls of functions, such as `f(x+1)`, by symbols; None if a bracket stays open."""
    pieces = []
    start = 0
    for call in _CALL.finditer(text):
        if not call[1] or call.start() < start:
            continue
        end = _closing_bracket(text, call.end() - 1)
        if end is None:
            return None
        pieces += [text[start : call.start()], _symbol(text[call.start() : end])]
        start = end
    return ''.join([*pieces, text[start:]])


def _closing_bracket(text: str, start: int) -> int | None:
    """Return the position after the bracket that closes the one at `start`; None without one."""
    depth = 0
    for end in range(start, len(text)):
        depth += (text[end] == '(') - (text[end] == ')')
        if not depth:
            return end + 1
    return None


def _symbol(text: str) -> str:
    """Return a symbol with an index that is different for each text."""
    return f'{text[0]}_{{{zlib.crc32(text.encode())}}}'
