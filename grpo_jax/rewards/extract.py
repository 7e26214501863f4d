"""Finds the final answer in a completion: word problems, mathematics in LaTeX, Chinese.

Each function goes from a completion to the answer in it, None without one, in linear time. Where
the completion thinks first, as in `<think>…</think><answer>…</answer>`, only what follows counts.
"""

import re
from collections import deque

from grpo_jax.rewards.numbers import NUMBER, normalize_number, plain

_ANYWHERE = re.compile(NUMBER)
_FILLER = r'[\s:*$\\(\[]*+'  # white space, emphasis and mathematics delimiters before the number
_AFTER_HASHES = re.compile(rf'####{_FILLER}{NUMBER}')
_AFTER_PHRASE = re.compile(rf'answer is{_FILLER}{NUMBER}', re.IGNORECASE)

# Chinese: 答案是 and the like are followed by the number, 答： by a sentence that ends in it.
_CHINESE_FILLER = r'[\s:*$\\(\[（：是为]*+'
_AFTER_CHINESE = re.compile(rf'(?:答案|结果)(?:应该|应|就)?+[是为：:]{_CHINESE_FILLER}{NUMBER}')
_CHINESE_SENTENCE = re.compile(r'(?:^|[\s。；，*])答[：:]([^\n]*+)')
_FULL_WIDTH = str.maketrans(
    {chr(0xFEE0 + ord(c)): c for c in '0123456789.%+-/$=<>' + 'abcdefghijklmnopqrstuvwxyz'}
)
_FULL_WIDTH_COMMA = re.compile(r'(?<=[０-９])，(?=[０-９]{3}(?![０-９]))')
_CHINESE_MIXED = re.compile(r'(?<![0-9])([0-9]{1,9})又([0-9]{1,9})/([0-9]{1,9})')

# Mathematics: what follows the phrase, in delimiters or up to the end of the sentence.
_PHRASE = re.compile(r'answer(?:\*\*)?(?: is|:)[\s:*]*+', re.IGNORECASE)
_MAX_ANSWER = 400  # characters behind the phrase that can belong to the answer
_BEFORE_UNIT = re.compile(r'\s*+(?:$|(?!(?:and|or|pi|sqrt)\b)[A-Za-z])')
_DELIMITED = re.compile(
    r'\$\$?((?:[^$\\]|\\.)++)\$|\\\(((?:[^\\]|\\(?!\)))++)\\\)|\\\[((?:[^\\]|\\(?!\]))++)'
)
_SENTENCE_END = re.compile(r'[.!?。](?:\s|$|\*\*)|[;\n]|\*\*')
_WORD = re.compile(r'(?<![\\A-Za-z])[A-Za-z]{3,}+')
_MAX_WORDS = 3  # an answer may be a name; a sentence is none


def extract_answer(text: str) -> str | None:
    r"""The final number of a worked solution as `normalize_number` spells it; None if it has none.

    The first of these rules that finds a number decides, with None if it cannot be read (`1,0001`):
    1. the number right after the last `####` that has one,
    2. the first number inside the last `\boxed{…}`, behind its last `=`,
    3. the number right after the last `answer is` that has one (upper or lower case),
    4. the last number in the text.
    "Right after" passes over white space, colons, `*`, `$` and opening brackets.
    """
    found = find_number(text)
    return normalize_number(found) if found else None


def extract_chinese(text: str) -> str | None:
    r"""The final number of a worked solution in Chinese, as `normalize_number` spells it.

    As `extract_answer`, with full-width digits read like others and two rules between 2 and 3: the
    number right after the last `答案是` (or 为, ：), then the last in the line behind `答：`. Units
    after the number do not matter; `3又1/2` is 3.5.
    """
    found = find_chinese(text)
    return normalize_number(found) if found else None


def extract_math(text: str) -> str | None:
    r"""The final answer of a worked solution in LaTeX, as it is written; None if it has none.

    1. The content of the last `\boxed{…}`,
    2. all of `<answer>…</answer>` where it is one line,
    3. what follows the last `answer is` or `answer:`: the number or formula in delimiters right
       after it, or at most three words and symbols up to the end of the sentence,
    4. the last number in the text.
    """
    text, tagged = _final_part(text)
    boxed = (last_boxed(text) or '').strip()
    if boxed:
        return boxed
    for phrase in reversed(deque(_PHRASE.finditer(text), maxlen=3)):
        if found := _said(text[phrase.end() : phrase.end() + _MAX_ANSWER]):
            return found
    if tagged and '\n' not in text.strip() and len(_WORD.findall(text)) <= _MAX_WORDS:
        return text.strip() or None
    return _number(_last(_ANYWHERE, plain(text)))


def find_number(text: str) -> str | None:
    """The number that `extract_answer` spells, as it is written."""
    text = plain(_final_part(text)[0])
    return _number(
        _last(_AFTER_HASHES, text)
        or _ANYWHERE.search((last_boxed(text) or '').rpartition('=')[2])
        or _last(_AFTER_PHRASE, text)
        or _last(_ANYWHERE, text)
    )


def find_chinese(text: str) -> str | None:
    """The number that `extract_chinese` spells, as it is written."""
    text = _FULL_WIDTH_COMMA.sub(',', text).translate(_FULL_WIDTH)
    text = _CHINESE_MIXED.sub(_improper, plain(_final_part(text)[0]))
    sentence = _last(_CHINESE_SENTENCE, text)
    return _number(
        _last(_AFTER_HASHES, text)
        or _ANYWHERE.search((last_boxed(text) or '').rpartition('=')[2])
        or _last(_AFTER_CHINESE, text)
        or (_last(_ANYWHERE, sentence[1]) if sentence else None)
        or _last(_AFTER_PHRASE, text)
        or _last(_ANYWHERE, text)
    )


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


def answer_tag(text: str) -> str | None:
    """The content of the last `<answer>…</answer>`; None without one."""
    before, _, _ = text.rpartition('</answer>')
    _, opened, content = before.rpartition('<answer>')
    return content if opened else None


def _final_part(text: str) -> tuple[str, bool]:
    """What follows the thought and is inside the answer tags, and whether there are such tags."""
    rest = text.rpartition('</think>')[2]
    text = rest if rest.strip() else text
    tagged = answer_tag(text)
    return (text, False) if tagged is None or not tagged.strip() else (tagged, True)


def _said(text: str) -> str | None:
    """The answer at the beginning of what follows `answer is`; None where there is none."""
    text = text.strip()
    if match := _DELIMITED.match(text):
        return next(group for group in match.groups() if group is not None).strip()
    text = _SENTENCE_END.split(text, maxsplit=1)[0].strip(' *:,.')
    number = _ANYWHERE.match(text)
    if number and _BEFORE_UNIT.match(text, number.end()):
        return _number(number)
    return text if text and len(_WORD.findall(text)) <= _MAX_WORDS else None


def _number(match: re.Match[str] | None) -> str | None:
    """The number in a match, without currency and what the pattern has before it."""
    if not match:
        return None
    sign, value, divisor = match['sign'] or '', match['value'], match['divisor']
    return sign.strip('+') + value + (f'/{divisor}' if divisor else '')


def _improper(match: re.Match[str]) -> str:
    whole, top, bottom = map(int, match.groups())
    return f'{whole * bottom + top}/{bottom}'


def _last(pattern: re.Pattern[str], text: str) -> re.Match[str] | None:
    found = deque(pattern.finditer(text), maxlen=1)
    return found[0] if found else None
