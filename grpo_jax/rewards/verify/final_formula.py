r"""Find the final answer of a worked solution in mathematics that is not in a box, as written."""

import re
from collections import deque

from grpo_jax.rewards.verify.final_number import number_at_start, stands_alone
from grpo_jax.rewards.verify.notation import plain_notation
from grpo_jax.rewards.verify.numbers import QUANTITY, spell_quantity

_PHRASE = re.compile(
    r'(?:answer|correct (?:option|choice))(?:\*\*)?'
    r'(?: (?:is|equals|(?:would|should|must|will) be)(?![A-Za-z])|:)[\s:*]*+'
    r'(?:(?:approximately|about|exactly|therefore|thus|simply|still|now)(?![A-Za-z])[\s:*]*+)*+',
    re.IGNORECASE,
)
_MAX_ANSWER = 400  # characters after the phrase, or around a number, that can belong to the answer
_DELIMITED = re.compile(
    r'\$\$?((?:[^$\\]|\\.)++)\$\$?'
    r'|\\\(((?:[^\\]|\\(?!\)))++)\\\)|\\\[((?:[^\\]|\\(?!\]))++)(?:\\\])?'
)
_BETWEEN_FORMULAS = re.compile(r'\s*+(?:,?\s*+(?:and|or)\s|,)\s*+(?=[$\\])')
_TEXT = re.compile(
    r'\\(?:text(?:bf|it|rm|normal)?|mbox|math(?:rm|bf|it)|operatorname) ?\{[^{}]*+\}'
)
_WORD = re.compile(r'(?<![\\A-Za-z])[A-Za-z]{3,}+')
_MAX_WORDS = 3  # an answer may be a name, but not a sentence

_OPEN_BOX = re.compile(r'^\$*\\(?:boxed|fbox)\s*\{(?=[^}]*$)')
_SENTENCE_END = re.compile(r'[.!?。](?:\s|$|\*\*)|;(?![^()\[\]\n]*[)\]])|\n|\*\*')
_REASON = re.compile(
    r'(?:,|\s[-–—]|\s)\s*+\(?(?:because|since|as|which|where|so|for|given|thus|hence|therefore|'
    r'but|if|when)(?![A-Za-z])'
)
_SHORT_UNIT = r'(?:[ckm]?m|[mk]?g|[mk]?l|L|h|s|ft|in|oz|lbs?|cents?|[CFK])'
_UNIT = r'(?!(?:and|or|to|pi|sqrt|mod|choose|over)(?![A-Za-z]))'
_ONE_UNIT = _UNIT + r'(?![A-Za-z]++ ?(?:,|and)? ?[0-9])'  # not 5 feet 3 inches
_BEFORE_UNIT = re.compile(
    rf'\s*+(?:$|[€£¥₹₩\u3040-\u9fff]|,?\s*+\(|,\s++{_UNIT}[A-Za-z]{{2}})'
    rf'|\s++{_ONE_UNIT}[A-Za-z]{{2}}|{_ONE_UNIT}[A-Za-z]{{3}}'
    rf'|\s*+{_SHORT_UNIT}(?![A-Za-z0-9^])\s*+(?:$|[A-Za-z])'
)
_QUANTITY = re.compile(QUANTITY)

_NUMERIC = re.compile('[0-9０-９¼½¾⅐⅑⅒⅓⅔⅕⅖⅗⅘⅙⅚⅛⅜⅝⅞⁰¹²³⁴⁵⁶⁷⁸⁹]')
_NO_EXPONENT = re.compile(rf'(?<![A-Za-z)}}][\^_])(?<![A-Za-z)}}][\^_]\{{){_NUMERIC.pattern}')
_DELIMITERS = (('$', '$'), ('\\(', '\\)'), ('\\[', '\\]'))
_FUNCTION = r'(?:sqrt|pi|sin|cos|tan|log|ln|exp|max|min|mod|gcd|lcm|frac|dfrac|infty)'
_FORMULA_WORD = re.compile(rf'(?<![\\A-Za-z])(?!{_FUNCTION}(?![a-z]))[a-z]{{3,}}(?![A-Za-z(]|\}})')
_PROSE = re.compile(
    rf'(?<![\\A-Za-z])(?!{_FUNCTION}(?![A-Za-z]))[A-Za-z]{{2,}}+(?![({{])'
    r'|[:。，？！]|[.!?](?:\s|$)|(?<=[^\s,]),\s++(?=[A-Za-z]{2})'
)
_OPERAND_BEFORE = re.compile(
    r'(?:[0-9)}\]]|(?<![A-Za-z])[A-Za-z]) *[+-] *$|[(\[][^()\[\]]*,[^()\[\]]*$'
)
_OPERAND_AFTER = re.compile(
    r' *[+*/^-] *(?:[A-Za-z](?![A-Za-z])|[\\(])|(?![mglshLCFK])[A-Za-z](?![A-Za-z])|[!(]'
)
_SEVERAL = re.compile(r'=[^=]*(?<!\\),[^=]*=')
_ALIGNED = re.compile(r'\\(?:begin|end)\{(?:align|aligned|gather|gathered|split|eqnarray)\*?\}')
_EQUALS = re.compile(r'(?<![<>=])=(?!=)|≈|\\(?:approx|Rightarrow|implies)(?![A-Za-z])')


def after_phrase(text: str) -> str | None:
    """Return the answer after the last `answer is` or `answer:` that is followed by one."""
    for phrase in reversed(deque(_PHRASE.finditer(text), maxlen=3)):
        if answer := _at_start(text[phrase.end() : phrase.end() + _MAX_ANSWER].strip()):
            return answer
    return None


def short_text(text: str) -> str | None:
    """Return a text if it is one line of at most three words."""
    text = text.strip()
    return text if text and '\n' not in text and _is_short(text) else None


def last_formula(text: str) -> str | None:
    """Return the last number in a text, or the right side of the formula that it is a part of."""
    formula, position = None, -1
    for pattern in (_NUMERIC, _NO_EXPONENT):  # $f(x)=x^2$ is an answer, the 2 of "5 in $x^2$" not
        digits = deque(pattern.finditer(text), maxlen=1)
        if not digits:
            break
        position = digits[0].start()
        formula = _delimited_around(text, position)
        if formula is not None and '=' in formula:
            break
    if position < 0:
        return None
    if formula is None:
        start = max(text.rfind('\n', 0, position) + 1, position - _MAX_ANSWER)
        line = text[start : position + _MAX_ANSWER].partition('\n')[0]
        if number := _last_number(plain_notation(line)):
            return number
        formula = _without_prose(line, position - start)
    return _right_side(formula) or None


def _at_start(text: str) -> str | None:
    """Return the answer that begins the text after `answer is`, or None."""
    if formulas := _formulas_at_start(text):
        return ', '.join(formulas)
    text = _SENTENCE_END.split(text, maxsplit=1)[0].strip(' *:,.`')
    sentence, text = text, _REASON.split(text, maxsplit=1)[0].strip(' *:,.')
    text = _OPEN_BOX.sub('', text)
    number = number_at_start(plain_notation(text))
    if number and _BEFORE_UNIT.match(number[1]):
        return number[0]
    short = _is_short(sentence) or not _WORD.search(text)
    return text if text and short else None


def _formulas_at_start(text: str) -> list[str]:
    """Return the delimited formulas that begin the text: two for `$1$ and $2$`."""
    formulas: list[str] = []
    position = 0
    while match := _DELIMITED.match(text, position):
        content = next(group for group in match.groups() if group is not None).strip()
        if not content or _is_prose(content):
            break
        formulas.append(content.rstrip('.,; '))
        between = _BETWEEN_FORMULAS.match(text, match.end())
        if between is None:
            break
        position = between.end()
    return formulas


def _delimited_around(text: str, position: int) -> str | None:
    """Return the delimited formula that a position is in, or None."""
    for opening, closing in _DELIMITERS:
        start = text.rfind(opening, max(0, position - _MAX_ANSWER), position)
        end = text.find(closing, position, position + _MAX_ANSWER)
        if min(start, end) < 0 or text[start - 1 : start] == '\\':
            continue
        content = text[start + len(opening) : end]
        if closing not in content and '\n\n' not in content and not _is_prose(content):
            return content
    return None


def _last_number(text: str) -> str | None:
    """Return the last number in a text in plain notation if it is no part of a formula."""
    matches = deque(_QUANTITY.finditer(text), maxlen=1)
    if not matches or not stands_alone(text, matches[0]):
        return None
    (match,) = matches
    if _OPERAND_BEFORE.search(text[: match.start()]) or _OPERAND_AFTER.match(text, match.end()):
        return None
    return spell_quantity(match)


def _without_prose(line: str, position: int) -> str:
    """Return what is around a position of a line, up to words and punctuation on both sides."""
    for pattern in (_TEXT, _ALIGNED):
        line = pattern.sub(lambda match: ' ' * len(match.group()), line)
    words = list(_PROSE.finditer(line))
    start = max((word.end() for word in words if word.end() <= position), default=0)
    end = min((word.start() for word in words if word.start() > position), default=len(line))
    return line[start:end]


def _right_side(formula: str) -> str:
    """Return what follows the last equals sign outside brackets; all of several equations."""
    formula = _ALIGNED.sub('', formula)
    if '\\begin' not in formula:
        rows = [row for row in formula.replace('&', '').split('\\\\') if row.strip()]
        formula = rows[-1] if rows else ''
    formula = formula.strip(' ,;*$\n\t').rstrip('. ')
    outside = [
        sign.end() for sign in _EQUALS.finditer(formula) if _balanced(formula[: sign.start()])
    ]
    several = len(outside) > 1 and _SEVERAL.search(formula)
    side = formula[outside[-1] :] if outside and not several else formula
    return side.strip()


def _balanced(text: str) -> bool:
    """Return whether all brackets and environments that open in a text close in it."""
    pairs = (('{', '}'), ('(', ')'), ('\\begin', '\\end'))
    return all(text.count(opening) == text.count(closing) for opening, closing in pairs)


def _is_short(text: str) -> bool:
    return len(_WORD.findall(text)) <= _MAX_WORDS


def _is_prose(formula: str) -> bool:
    return bool(_FORMULA_WORD.search(_TEXT.sub('', formula)))
