"""Rewards for word problems whose worked solution ends in a number, such as GSM8K.

`extract_answer` and `normalize_number` return numbers in one canonical spelling, so that equal
answers are equal strings: a majority vote can count them as they are.
"""

import re
from collections import deque
from collections.abc import Sequence
from fractions import Fraction
from typing import Any

_MAX_CHARACTERS = 100  # a longer number is not read: no exact arithmetic on hostile text

# Every repetition is possessive (`++`, `*+`) and starts at a character that it alone can start at,
# so a search over n characters takes O(n) steps. A hyphen after a word or a closing bracket is an
# operator or a dash, not a sign.
_NUMBER = (
    r'(?P<sign>(?<![\w)}\]%])[+-])?(?:\\?\$)?'
    r'(?P<value>[0-9]++(?:,[0-9]++)*+(?:\.[0-9]++)?|(?<![\w.])\.[0-9]++)'
    r'(?:/(?P<divisor>[0-9]++))?'
)
_ANYWHERE = re.compile(_NUMBER)
_FILLER = r'[\s:*$\\(\[]*+'  # white space, emphasis and mathematics delimiters before the number
_AFTER_HASHES = re.compile(rf'####{_FILLER}{_NUMBER}')
_AFTER_PHRASE = re.compile(rf'answer is{_FILLER}{_NUMBER}', re.IGNORECASE)
_GROUPED = re.compile(r'[0-9]{1,3}(?:,[0-9]{3})++(?:\.[0-9]++)?')
_LATEX_FRACTION = re.compile(r'(?<![0-9])\\[dt]?frac\{([0-9]++)\}\{([0-9]++)\}')


def gsm8k_answer(
    prompts: Sequence[str], completions: Sequence[str], answer: Sequence[str], **columns: Any
) -> list[float | None]:
    """1.0 where `extract_answer(completion)` is the number after the last `####` in `answer`.

    0.0 for another number or for none. None where `answer` has no number there.
    """
    rewards: list[float | None] = []
    for completion, solution in zip(completions, answer, strict=True):
        _, marker, ending = solution.rpartition('####')
        wanted = normalize_number(ending) if marker else None
        rewards.append(None if wanted is None else float(extract_answer(completion) == wanted))
    return rewards


def extract_answer(text: str) -> str | None:
    r"""The final number of a worked solution as `normalize_number` spells it; None if it has none.

    The first of these rules that finds a number decides, with None if it cannot be read (`1,0001`):
    1. the number right after the last `####` that has one,
    2. the first number inside the last `\boxed{…}`,
    3. the number right after the last `answer is` that has one (upper or lower case),
    4. the last number in the text.
    "Right after" passes over white space, colons, `*`, `$` and opening brackets.
    """
    text = _plain(text)
    match = (
        _last(_AFTER_HASHES, text)
        or _ANYWHERE.search(last_boxed(text) or '')
        or _last(_AFTER_PHRASE, text)
        or _last(_ANYWHERE, text)
    )
    return _canonical(match) if match else None


def normalize_number(text: str) -> str | None:
    r"""The canonical spelling of the number that `text` consists of; None if it is anything else.

    Drops thousands separators, `$`, `%` (50% is 50), a trailing period, a plus sign and superfluous
    zeros: `$1,000.50.` becomes `1000.5`. Fractions become decimals where these end (`1/2` and
    `\frac{1}{2}` become `0.5`) and are else reduced (`2/6` becomes `1/3`). Commas must separate
    thousands: `1,2` is a list, not a number. Longer than 100 characters is not a number.
    """
    text = _plain(text).strip().rstrip('.').removesuffix('%').removesuffix('\\').strip('$ ')
    match = _ANYWHERE.fullmatch(text)
    return _canonical(match) if match else None


def last_boxed(text: str) -> str | None:
    r"""The content of the last `\boxed{…}`, braces balanced; None if absent or never closed."""
    start = text.rfind('\\boxed{')
    if start < 0:
        return None
    start += len('\\boxed{')
    depth = 1
    for brace in re.finditer('[{}]', text[start:]):
        depth += 1 if brace.group() == '{' else -1
        if depth == 0:
            return text[start : start + brace.start()]
    return None


def _last(pattern: re.Pattern[str], text: str) -> re.Match[str] | None:
    found = deque(pattern.finditer(text), maxlen=1)
    return found[0] if found else None


def _plain(text: str) -> str:
    """Rewrite the typographic minus, LaTeX thousands separators and fractions in plain form."""
    text = text.replace('\N{MINUS SIGN}', '-').replace('{,}', ',').replace('\\!', '')
    return _LATEX_FRACTION.sub(r'\1/\2', text)


def _canonical(match: re.Match[str]) -> str | None:
    """Spell a match of `_NUMBER`; None if it is too long, badly grouped or divided by zero."""
    value, divisor = match['value'], match['divisor'] or '1'
    if len(match.group()) > _MAX_CHARACTERS or not divisor.strip('0'):
        return None
    if ',' in value and not _GROUPED.fullmatch(value):
        return None
    number = Fraction(value.replace(',', '')) / int(divisor)
    sign = '-' if match['sign'] == '-' and number else ''
    # A decimal ends after k places where 10^k is a multiple of the reduced denominator. As 2^a has
    # 0.3 a digits, four times the length that is read covers every denominator that divides one.
    places = (k for k in range(4 * _MAX_CHARACTERS) if 10**k % number.denominator == 0)
    k = next(places, None)
    if k is None:
        return f'{sign}{number}'
    whole, rest = divmod(int(number * 10**k), 10**k)
    return f'{sign}{whole}.{rest:0{k}d}' if k else f'{sign}{whole}'
