"""Extraction of the final answer from a completion: word problems, LaTeX, Chinese text.

Each function maps a completion to the answer in it, or to None if it has none, in linear time.
Where the completion thinks first, as in `<think>…</think><answer>…</answer>`, only the part after
the thought counts.
"""

import re
from collections import deque

from grpo_jax.rewards.verify.numbers import NUMBER, normalize_number, plain_notation

_NUMBER = re.compile(NUMBER)
_FILLER = r'[\s:*$\\(\[]*+'  # white space, emphasis and mathematics delimiters before the number
_AFTER_HASHES = re.compile(rf'####{_FILLER}{NUMBER}')
_AFTER_PHRASE = re.compile(rf'answer is{_FILLER}{NUMBER}', re.IGNORECASE)

# Chinese: the number follows 答案是 and the like, or ends the sentence that follows 答：.
_CHINESE_FILLER = r'[\s:*$\\(\[（：是为]*+'
_AFTER_CHINESE_PHRASE = re.compile(
    rf'(?:答案|结果)(?:应该|应|就)?+[是为：:]{_CHINESE_FILLER}{NUMBER}'
)
_CHINESE_SENTENCE = re.compile(r'(?:^|[\s。；，*])答[：:]([^\n]*+)')
_FULL_WIDTH = str.maketrans(
    {chr(0xFEE0 + ord(c)): c for c in '0123456789.%+-/$=<>' + 'abcdefghijklmnopqrstuvwxyz'}
)
_FULL_WIDTH_COMMA = re.compile(r'(?<=[０-９])，(?=[０-９]{3}(?![０-９]))')
_CHINESE_MIXED = re.compile(r'(?<![0-9])([0-9]{1,9})又([0-9]{1,9})/([0-9]{1,9})')

# Mathematics: the answer follows the phrase, in delimiters or up to the end of the sentence.
_PHRASE = re.compile(r'answer(?:\*\*)?(?: is|:)[\s:*]*+', re.IGNORECASE)
_MAX_ANSWER = 400  # characters after the phrase that can belong to the answer
_BEFORE_UNIT = re.compile(r'\s*+(?:$|(?!(?:and|or|pi|sqrt)\b)[A-Za-z])')
_DELIMITED = re.compile(
    r'\$\$?((?:[^$\\]|\\.)++)\$|\\\(((?:[^\\]|\\(?!\)))++)\\\)|\\\[((?:[^\\]|\\(?!\]))++)'
)
_SENTENCE_END = re.compile(r'[.!?。](?:\s|$|\*\*)|[;\n]|\*\*')
_WORD = re.compile(r'(?<![\\A-Za-z])[A-Za-z]{3,}+')
_MAX_WORDS = 3  # an answer may be a name, but not a sentence


def extract_answer(text: str) -> str | None:
    r"""Return the final number of a worked solution as `normalize_number` spells it, or None.

    The first of these rules that matches decides, with None if its number is malformed (`1,0001`):
    1. the number right after the last `####` that is followed by one,
    2. the first number in the last `\boxed{…}`, after the last `=` in it,
    3. the number right after the last `answer is` that is followed by one (in any case),
    4. the last number in the text.
    Between a marker and "right after" there may be white space, colons, `*`, `$` and opening
    brackets.
    """
    number = find_number(text)
    return normalize_number(number) if number else None


def extract_chinese(text: str) -> str | None:
    r"""Return the final number of a worked solution in Chinese as `normalize_number` spells it.

    As `extract_answer`, with full-width digits treated as ASCII and two rules between 2 and 3: the
    number right after the last `答案是` (or 为, ：), then the last in the line after `答：`. Units
    after the number are ignored; `3又1/2` is 3.5.
    """
    number = find_chinese_number(text)
    return normalize_number(number) if number else None


def extract_math(text: str) -> str | None:
    r"""Return the final answer of a worked solution in LaTeX, as it is written, or None.

    The first of these rules that matches decides:
    1. the content of the last `\boxed{…}`,
    2. the text after the last `answer is` or `answer:`: the number or delimited formula right after
       it, or at most three words and symbols up to the end of the sentence,
    3. all of `<answer>…</answer>` if it is one line of at most three words,
    4. the last number in the text.
    """
    text, tagged = _final_part(text)
    boxed = (last_boxed(text) or '').strip()
    if boxed:
        return boxed
    for phrase in reversed(deque(_PHRASE.finditer(text), maxlen=3)):
        if answer := _answer_at_start(text[phrase.end() : phrase.end() + _MAX_ANSWER]):
            return answer
    if tagged and '\n' not in text.strip() and len(_WORD.findall(text)) <= _MAX_WORDS:
        return text.strip() or None
    return _number(_last_match(_NUMBER, plain_notation(text)))


def find_number(text: str) -> str | None:
    """Return the number that `extract_answer` normalizes, as it is written."""
    text = plain_notation(_final_part(text)[0])
    return _number(
        _last_match(_AFTER_HASHES, text)
        or _NUMBER.search((last_boxed(text) or '').rpartition('=')[2])
        or _last_match(_AFTER_PHRASE, text)
        or _last_match(_NUMBER, text)
    )


def find_chinese_number(text: str) -> str | None:
    """Return the number that `extract_chinese` normalizes, as it is written."""
    text = _FULL_WIDTH_COMMA.sub(',', text).translate(_FULL_WIDTH)
    text = _CHINESE_MIXED.sub(_improper_fraction, plain_notation(_final_part(text)[0]))
    sentence = _last_match(_CHINESE_SENTENCE, text)
    return _number(
        _last_match(_AFTER_HASHES, text)
        or _NUMBER.search((last_boxed(text) or '').rpartition('=')[2])
        or _last_match(_AFTER_CHINESE_PHRASE, text)
        or (_last_match(_NUMBER, sentence[1]) if sentence else None)
        or _last_match(_AFTER_PHRASE, text)
        or _last_match(_NUMBER, text)
    )


def last_boxed(text: str) -> str | None:
    r"""Return the content of the last `\boxed{…}`; None if there is none or it is never closed."""
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
    """Return the content of the last `<answer>…</answer>`, or None."""
    before, _, _ = text.rpartition('</answer>')
    _, opening, content = before.rpartition('<answer>')
    return content if opening else None


def _final_part(text: str) -> tuple[str, bool]:
    """Return the text after the thought, in its answer tags if any, and whether it has them."""
    rest = text.rpartition('</think>')[2]
    text = rest if rest.strip() else text
    tagged = answer_tag(text)
    return (text, False) if tagged is None or not tagged.strip() else (tagged, True)


def _answer_at_start(text: str) -> str | None:
    """Return the answer that begins the text after `answer is`, or None."""
    text = text.strip()
    if match := _DELIMITED.match(text):
        return next(group for group in match.groups() if group is not None).strip()
    text = _SENTENCE_END.split(text, maxsplit=1)[0].strip(' *:,.')
    number = _NUMBER.match(text)
    if number and _BEFORE_UNIT.match(text, number.end()):
        return _number(number)
    return text if text and len(_WORD.findall(text)) <= _MAX_WORDS else None


def _number(match: re.Match[str] | None) -> str | None:
    """Return the number in a match of `NUMBER`, without currency sign and leading marker."""
    if not match:
        return None
    sign, value, divisor = match['sign'] or '', match['value'], match['divisor']
    return sign.strip('+') + value + (f'/{divisor}' if divisor else '')


def _improper_fraction(match: re.Match[str]) -> str:
    whole, top, bottom = map(int, match.groups())
    return f'{whole * bottom + top}/{bottom}'


def _last_match(pattern: re.Pattern[str], text: str) -> re.Match[str] | None:
    matches = deque(pattern.finditer(text), maxlen=1)
    return matches[0] if matches else None
