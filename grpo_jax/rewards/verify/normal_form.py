r"""Rewrite equal LaTeX answers in one spelling, such as `\dfrac 12` and `\frac{1}{2}`."""

import re

from grpo_jax.rewards.verify.decimal_commas import (
    commas_in_braces_to_points,
    decimal_commas_to_points,
)
from grpo_jax.rewards.verify.determinants import expand_determinants
from grpo_jax.rewards.verify.spelling import one_spelling, plain_characters
from grpo_jax.rewards.verify.units import TEXT, strip_units

MAX_LENGTH = 1000  # characters; a longer text is not an answer and is left unchanged

_RELATION = re.compile(r'[<>]|\\(?:le|ge|ne|lt|gt|in)(?![A-Za-z])')
_CONNECTIVE = re.compile(
    r',? *\\(?:text|mbox|mathrm|textrm|textnormal) *\{ *,? *(and|or|AND|OR|\\?&) *,? *\},?'
    r'|(?:(?<=[0-9)}\]])|,| ),? *(?<![A-Za-z\\])(and|or|AND|OR)(?= )(?! *(?:[=*/^_]|\+(?![0-9])))'
    r'|\\(lor|vee|land|wedge)(?![A-Za-z])'
    r'|,? *(?:(?<=[0-9A-Za-z)}\]])|(?<= )) *([和与及且或]|\\?&'
    r'|(?<=[0-9)}\]] )(?:et|und|y|ou|oder) )'
    r'(?= *[-0-9A-Za-z(\[\\])'
)
_UNWRAP = re.compile(TEXT)
_GROUPED = re.compile(r'(?<![0-9.,])([0-9]{1,3}(?:,[0-9]{3})+)(?!,?[0-9])')
_GROUPED_ALONE = re.compile(r'[-+]?[0-9]{1,3}(?:,[0-9]{3})+(?:\.[0-9]+)?%?')
_SPACED_DIGITS = re.compile(r'(?<=[0-9]), +(?=[0-9]{3}(?![0-9]))')
_MIXED = re.compile(r'(?<![0-9./^_])([0-9]+) +([0-9]+) */ *([0-9]+)(?![0-9])')
_GAP = re.compile(r'(?<=[0-9]) +(?=[0-9])')
_SPACED_THOUSANDS = re.compile(
    r'(?<![0-9.,])(?<![0-9.,] )[1-9][0-9]{0,2}(?: [0-9]{3})+(?![0-9]| *[/0-9])'
)
_AFTER_COMMAND = re.compile(r'(\\[A-Za-z]+) +(?=[A-Za-z])')
_ONE = re.compile(r'([_^])\{([0-9A-Za-z])\}')
_WRAPPED = re.compile(
    r'[$ ]*\\(?:f?box(?:ed)?|text(?:bf|it|rm)?|math(?:bf|rm)|bm|pmb|boldsymbol|underline'
    r'|ensuremath) *(?!\{ *R *\})(\{.*\})'
    r'[$. ]*'
)
_ANGLE = re.compile(r'\\angle ([B-Z])([A-Z])([A-Z])(?![A-Za-z])')
_ANSWER = '(?i:(?:the )?(?:correct )?(?:option|choice|answer)(?: is)?)'
_CHOICE = re.compile(
    rf'(?:{_ANSWER}[ :]*)?\(?([A-Z])\)'
    rf'|(?:{_ANSWER}[ :]+|故?选项?[ :]*)([A-Z]|[A-J]+)(?:选项)?|([A-Z]|[A-J]+)选项'
)
_SEVERAL_CHOICES = re.compile(r'^(?:\([A-J]\)[ ,;]*){2,}$')
_LABELED = re.compile(
    r'(?:\(([A-J])\)(?::? +|(?=[0-9]))'
    r'|([A-J])(?:[:.)] +|[:.)](?=[0-9$])|[,.:] *(?=[\u3040-\u9fff])))'
    r'(?![*/^=<>,|]|[-+](?![0-9.\\]))(.*\S)'
)
_LABEL = re.compile(r'(?<![A-Za-z\\])[A-J][:.)](?: +|(?=[0-9]))')
_WORD = re.compile(r'[A-Za-z]{3,}')
_SHORT_WORDS = frozenset(
    [
        'no',
        'on',
        'in',
        'up',
        'ok',
        'am',
        'pm',
        'is',
        'it',
        'at',
        'to',
        'of',
        'if',
        'so',
        'do',
        'go',
        'or',
        'we',
        'he',
        'me',
        'be',
        'us',
        'si',
        'ja',
        'non',
    ]
)


def normal_form(text: str) -> str:
    r"""Rewrite an answer in one spelling, so that most equal answers become equal texts.

    White space, delimiters, sizes of brackets, unknown units after a number or formula, dollar and
    degree signs and the trailing period are dropped. `\dfrac12` becomes `\frac{1}{2}`, `1 1/2`
    becomes `1\frac{1}{2}`, `\text{even}` becomes `even`, `(C)` becomes `C`, `2, 3 and 5` becomes
    `2,3,5`, `5\text{ cm}` becomes `5\unit{cm}`, `\textbf{(E)}\ 15` becomes `\choice{E}{15}`. A
    comma between digits that separates elements becomes a semicolon where it could be taken for a
    thousands separator: `32, 349` becomes `32;349`.
    """
    text = text.strip()
    if len(text) > MAX_LENGTH:
        return text
    text = plain_characters(text)
    while (match := _WRAPPED.fullmatch(text)) and (inner := strip_braces(match[1])) != match[1]:
        text = inner
    text = one_spelling(commas_in_braces_to_points(text))
    text = _replace_connectives(decimal_commas_to_points(text))
    text = strip_braces(text.strip().rstrip('.,;: '))
    if not text.startswith('(') or not _LABELED.fullmatch(text):
        text = strip_units(text)
    text = _UNWRAP.sub(r'\1', _UNWRAP.sub(r'\1', text)).strip()
    text = _SEVERAL_CHOICES.sub(lambda match: ','.join(re.findall('[A-J]', match[0])), text)
    if letter := _CHOICE.fullmatch(text):
        return letter[1] or letter[2] or letter[3]
    choice = _LABELED.fullmatch(text)
    if choice and not _LABEL.search(choice[3]):
        return f'\\choice{{{choice[1] or choice[2]}}}{{{normal_form(choice[3])}}}'
    text = _mark_thousands(_MIXED.sub(r'\1\\frac{\2}{\3}', text))
    text = _SPACED_THOUSANDS.sub(lambda match: match[0].replace(' ', ''), text)
    text = _AFTER_COMMAND.sub('\\1\0', _GAP.sub('\0', text))
    text = ''.join(text.split()).replace('\0', ' ').rstrip('.,;:')
    text = _ANGLE.sub(_sort_ends, _ONE.sub(r'\1\2', text))
    text = strip_braces(text) if text.startswith('{') else text
    if '\\begin' in text:
        return expand_determinants(text)
    return text.lower() if is_word(text) and not is_product(text.lower()) else text


def is_word(text: str) -> bool:
    """Return whether the text is a word or a sequence of words, not a product of variables."""
    if _WORD.fullmatch(text):
        return not is_product(text)
    return text.lower() in _SHORT_WORDS


def is_product(letters: str) -> bool:
    """Return whether three or more letters are a product of variables, such as `xyz` or `abd`.

    They are if they are different small letters without a vowel, apart from a at the beginning, or
    next to each other in the alphabet.
    """
    if not re.fullmatch('[a-z]{3,}', letters) or len(set(letters)) < len(letters):
        return False
    vowels = set(letters.removeprefix('a')) & set('aeiou')
    return not vowels or ord(max(letters)) - ord(min(letters)) < len(letters)


def strip_braces(text: str) -> str:
    """Remove the outer braces, also double ones, if the last one closes the first."""
    while text.startswith('{') and _closes_at_end(text):
        text = text[1:-1].strip()
    return text


def _closes_at_end(text: str) -> bool:
    """Return whether the last character closes the brace that the text begins with."""
    depth = 0
    for position, character in enumerate(text):
        depth += (character == '{') - (character == '}')
        if not depth:
            return position == len(text) - 1
    return False


def _sort_ends(angle: re.Match[str]) -> str:
    start, vertex, end = angle.groups()
    return f'\\angle {min(start, end)}{vertex}{max(start, end)}'


def _replace_connectives(text: str) -> str:
    """Replace `and` and `or` by commas between values, by logical signs between relations."""
    relation = _RELATION.search(text)

    def sign(match: re.Match[str]) -> str:
        if '&' in match[0] and '\\begin' in text:
            return match[0]
        word = match[1] or match[2] or match[3] or match[4]
        if not relation:
            return ', ' if not match[3] or text.count('=') > 1 else match[0]
        either = word.strip().lower() in ('or', 'lor', 'vee', 'ou', 'oder', '或')
        return r' \lor ' if either else r' \land '

    return _CONNECTIVE.sub(sign, text)


def _mark_thousands(text: str) -> str:
    """Remove commas that separate thousands; mark those that separate elements by a semicolon.

    Three digits after a comma belong to the number before it if they begin with 0, if they are in
    braces, or if the comma cannot separate elements: they do so with spaces, or there is a formula
    around the number. A number alone, such as 1,234, is left as it is. So are elements without
    spaces in brackets, such as (100,200).
    """
    if _GROUPED_ALONE.fullmatch(text):
        return text
    spaced = re.search('[,;] ', text) is not None
    text = _SPACED_DIGITS.sub(';', text)
    others = re.search('[,;]', _GROUPED.sub('', text)) is not None

    def join(match: re.Match[str]) -> str:
        before, after = text[: match.start()], text[match.end() :]
        in_braces = before.endswith('{') and not before.endswith('\\{') and after.startswith('}')
        depth = sum(before.count(c) for c in '([') - sum(before.count(c) for c in ')]')
        alone = re.fullmatch('[^-+*/^0-9]*= *', before) is not None and not after
        in_formula = not others and depth == 0 and '\\{' not in before and not alone
        zero = any(group.startswith('0') for group in match[1].split(',')[1:])
        sure = in_braces or zero or spaced or in_formula
        return match[1].replace(',', '') if sure else match[1]

    return _GROUPED.sub(join, text)
