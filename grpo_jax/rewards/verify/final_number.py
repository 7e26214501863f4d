r"""Find the final number of a worked solution, in English or Chinese.

A number is read whole (`2 1/2`, `1.5 \times 10^3`, `70\,000`) or not at all: one that is a part of
something larger, as in `\frac{1+\sqrt5}{2}`, `10-20` or `3, 4`, is no answer.
"""

import re
from collections import deque
from collections.abc import Callable, Sequence

from grpo_jax.rewards.verify.chinese import NUMERAL, chinese_to_digits, parse_numeral
from grpo_jax.rewards.verify.markers import final_part, last_boxed
from grpo_jax.rewards.verify.notation import plain_notation
from grpo_jax.rewards.verify.numbers import QUANTITY, spell_quantity

# What may stand between a marker and the number: white space, emphasis, mathematics delimiters, a
# word such as "about", the label of a choice, the name of the number.
_DELIMITERS = r'[\s:*$\\(\[{]*+'
_WORDS = (
    r'(?:(?:approximately|approx\.?|about|around|roughly|nearly|exactly|only|just|therefore|thus|'
    r'simply|still|now|then|equal to|equals|a total of|sim|US|USD|EUR|GBP|CNY|RMB|Rs\.?)'
    rf'(?![A-Za-z]){_DELIMITERS}|[=≈~]{_DELIMITERS})*+'
)
_CHOICE = r'(?:[A-H]\)[\s.:]*+)?+'
_NAME = rf'(?:[A-Za-z]{{1,8}} ?[=≈]{_DELIMITERS})?+'
_BEFORE = _DELIMITERS + _WORDS + _CHOICE + _NAME
_IS = r'(?:is|equals|(?:would|should|must|will) be|comes to)\b'
_AFTER_HASHES = re.compile(rf'####{_BEFORE}{QUANTITY}')
_AFTER_PHRASE = re.compile(rf'answer[\s*]*+(?:{_IS}|[:=]){_BEFORE}{QUANTITY}', re.IGNORECASE)
_AT_START = re.compile(rf'{_BEFORE}{QUANTITY}')
_QUANTITY = re.compile(QUANTITY)
_DETACHED_SIGN = re.compile(r'^([+-]) +(?=[0-9.$])')

_CHINESE_DELIMITERS = r'[\s:*$\\(\[{是为约共]*+'
_CHINESE_PHRASE = (
    rf'(?:答案|结果|得数)(?:应该|应当|应|就|大约)?+(?:[是为:]|等于){_CHINESE_DELIMITERS}'
    rf'(?:(?:等于|大约|共有|一共有|一共是){_CHINESE_DELIMITERS})?+(?:[A-Za-z] ?= ?)?+'
)
_AFTER_CHINESE_PHRASE = re.compile(_CHINESE_PHRASE + QUANTITY)
_NUMERAL_AFTER_PHRASE = re.compile(
    rf'(?P<before>{_CHINESE_PHRASE})(?P<minus>-?){NUMERAL}(?![^\n。；]{{0,40}}[0-9])'
)
_CHINESE_SENTENCE = re.compile(r'(?:^|[\s。；，*])答:([^\n]*+)')
_NUMERAL = re.compile(rf'(?P<minus>-?){NUMERAL}')

# What shows that a number is a part of something larger: before it, after it.
_WINDOW = 80  # characters before and after a number that are looked at
_FUNCTION = (
    r'\\(?:[dtc]?frac|sqrt|log|ln|lg|sin|cos|tan|sec|csc|cot|exp|binom|overline|pi|theta|'
    r'alpha|beta|phi|infty|sum|prod|int|pmod|bmod|mod)(?![A-Za-z])'
)
_IN_ARGUMENT = r'(?:\\(?!boxed|fbox|framebox)[A-Za-z]++|[\]}^_]) ?\{[^{}]*'
_PART_OF_FORMULA = re.compile(
    rf'(?:{_IN_ARGUMENT}|(?:[\^√π]|[0-9)}}\]]_|{_FUNCTION})[ ({{\[]*|\\sqrt ?\[[^\]]*'
    rf'|[0-9][.:,]|[0-9]{{4}}-[0-9]{{1,2}}-|\\pm ?|\\mp ?|±|/'
    r'|[0-9)][a-z] ?[+-] ?|(?<![A-Za-z\'])[b-zB-Z] ?\+ ?|[0-9]点'
    r'|\|[^|\s]*[0-9A-Za-z)] ?[+-] ?'
    r'|(?:[0-9)}\]] ?[*/]|(?<![A-Za-z])[A-Za-z] ?\*) ?[({\[]*|[0-9] ?[xX] ?)$'
)
_WHOLE_BEFORE = re.compile(r'(?<![0-9.])[0-9]+ ?- ?$')
_RIGHT_OF_SIGN = re.compile(r'[A-Za-z0-9)}\]] *[+-] *$')
_OPERAND = r'[0-9(\\.$√π]'
_CONTINUES = re.compile(
    rf'[ \t]*(?:(?:[+*/^]|(?:[A-Za-z]++ ){{1,3}}[+*] ) ?{_OPERAND}|- *[0-9\\.$√π]|[xX] ?[0-9]'
    rf'|:[0-9]|,(?: ?and)? ?-?\$?[0-9]|\.[0-9]|{_FUNCTION}|[√π]|\\over|(?:pi|sqrt)(?![A-Za-z])'
    r'|(?:to|through|or) \$?[0-9]|[~～至到] ?[0-9]|\\[pm][pm](?![A-Za-z])|±|点[0-9]'
    r'|!(?= ?[$=/^}\\])'
    r'|\^ ?(?:\{|[A-Za-z])(?!(?:st|nd|rd|th)(?![A-Za-z])))'
    r'|[xyzi](?![A-Za-z])|_[0-9{]|\.?\\(?:overline|dot)(?![a-z])'
)
_RELATION = re.compile(r'[<>≤≥≠]|\\(?:[lg]e?q?|[lg]t|ne)(?![A-Za-z])')
_ANOTHER = re.compile(r' *(?:and|&|\\&) *-?\\?\$?[0-9]')
_EQUALS = re.compile(r'[=≈]|\\approx')
_CLAUSE = re.compile(
    r', |(?<![A-Za-z])(?:because|since|as|so|which|that|if|when|where)(?![A-Za-z])'
)
_SENTENCE_END = re.compile(r'[.!?](?:\s|$)|[\n;。；]')

Rule = Callable[[str], str | None]  # '' where the number is malformed or a part of something


def find_number(text: str) -> str | None:
    """Return the number that `extract_answer` normalizes, as it is written or as a fraction."""
    return _first(plain_notation(final_part(text)[0]), _RULES)


def find_chinese_number(text: str) -> str | None:
    """Return the number that `extract_chinese` normalizes, as `find_number`."""
    text = plain_notation(final_part(text)[0])
    if text.isascii():
        return _first(text, _RULES)
    text = _NUMERAL_AFTER_PHRASE.sub(_with_digits, chinese_to_digits(text))
    return _first(text, _CHINESE_RULES)


def number_at_start(text: str) -> tuple[str, str] | None:
    """Return the whole number that begins a text in plain notation, and the text after it."""
    text = _DETACHED_SIGN.sub(r'\1', text)
    match = _QUANTITY.match(text)
    number = spell_quantity(match) if match and not _continues(text, match.end()) else None
    return (number, text[match.end() :]) if match and number else None


def stands_alone(text: str, match: re.Match[str]) -> bool:
    """Return whether a match of `QUANTITY` in a text is not a part of a formula, range or list."""
    if match['divisor'] and _WHOLE_BEFORE.search(text[: match.start()]):
        return False  # 2-1/2 may be 2 1/2
    return not _part_of_formula(text, match.start()) and not _continues(text, match.end())


def _first(text: str, rules: Sequence[Rule]) -> str | None:
    """Return the number of the first rule that matches; None if that is malformed or a part."""
    found = (rule(text) for rule in rules)
    return next((number for number in found if number is not None), None) or None


def _after(pattern: re.Pattern[str]) -> Rule:
    """Make the rule for the number after the last marker that is followed by one."""

    def rule(text: str) -> str | None:
        match = _last_match(pattern, text)
        return None if match is None else _at_marker(text, match)

    return rule


def _at_marker(text: str, match: re.Match[str]) -> str:
    """Return the number of a match, or the right side where it begins an equation: 8 for 5+3=8."""
    if not _continues(text, match.end()):
        return spell_quantity(match) or ''
    rest = _SENTENCE_END.split(text[match.end() : match.end() + 5 * _WINDOW], maxsplit=1)[0]
    *equation, side = _EQUALS.split(rest)
    result = _AT_START.match(side) if equation else None
    if result is None or _CLAUSE.search('='.join(equation)) or _continues(side, result.end()):
        return ''
    return spell_quantity(result) or ''


def _in_box(text: str) -> str | None:
    """Return the first number in the last box, after the last equals sign in it."""
    content = _EQUALS.split(last_boxed(text) or '')[-1]
    match = _QUANTITY.search(content)
    if match is None:
        return None
    before = content[max(0, match.start() - _WINDOW) : match.start()]
    if not stands_alone(content, match) or _RIGHT_OF_SIGN.search(before):
        return ''
    if _RELATION.search(content) or _ANOTHER.match(content, match.end()):
        return ''
    return spell_quantity(match) or '' if content[match.end() : match.end() + 1] != '!' else ''


def _last(text: str) -> str | None:
    """Return the last number in the text."""
    match = _last_match(_QUANTITY, text)
    if match is None:
        return None
    return spell_quantity(match) or '' if stands_alone(text, match) else ''


def _last_in_chinese_sentence(text: str) -> str | None:
    """Return the last number in the line after 答：, in digits or else in Chinese numerals."""
    sentence = _last_match(_CHINESE_SENTENCE, text)
    if sentence is None:
        return None
    number = _last(sentence[1])
    return _last_numeral(sentence[1]) if number is None else number


def _last_numeral(text: str) -> str | None:
    match = _last_match(_NUMERAL, text)
    value = parse_numeral(match['numeral']) if match else None
    return None if match is None or value is None else f'{match["minus"]}{value}'


def _with_digits(match: re.Match[str]) -> str:
    value = parse_numeral(match['numeral'])
    return match.group() if value is None else f'{match["before"]}{match["minus"]}{value}'


def _part_of_formula(text: str, start: int) -> bool:
    return bool(_PART_OF_FORMULA.search(text[max(0, start - _WINDOW) : start]))


def _continues(text: str, end: int) -> bool:
    return bool(_CONTINUES.match(text[end : end + _WINDOW]))


def _last_match(pattern: re.Pattern[str], text: str) -> re.Match[str] | None:
    matches = deque(pattern.finditer(text), maxlen=1)
    return matches[0] if matches else None


_RULES = (_after(_AFTER_HASHES), _in_box, _after(_AFTER_PHRASE), _last)
_CHINESE_RULES = (
    _after(_AFTER_HASHES),
    _in_box,
    _after(_AFTER_CHINESE_PHRASE),
    _last_in_chinese_sentence,
    _after(_AFTER_PHRASE),
    _last,
    _last_numeral,
)
