"""Extraction of the final answer from a completion: word problems, LaTeX, Chinese text.

Each function maps a completion to the answer in it, or to None if it has none, in linear time.
Where the completion thinks first, as in `<think>…</think><answer>…</answer>`, only the part after
the thought counts.
"""

from grpo_jax.rewards.verify.final_formula import after_phrase, last_formula, short_text
from grpo_jax.rewards.verify.final_number import find_chinese_number, find_number
from grpo_jax.rewards.verify.markers import all_boxed, final_part, last_boxed
from grpo_jax.rewards.verify.numbers import normalize_number

__all__ = [
    'extract_answer',
    'extract_chinese',
    'extract_math',
    'find_chinese_number',
    'find_number',
    'last_boxed',
]


def extract_answer(text: str) -> str | None:
    r"""Return the final number of a worked solution as `normalize_number` spells it, or None.

    The first of these rules that matches decides:
    1. the number right after the last `####` that is followed by one,
    2. the first number in the last `\boxed{…}`, after the last `=` in it,
    3. the number right after the last `answer is` or `answer:` that is followed by one (in any
       case),
    4. the last number in the text.
    Between a marker and "right after" there may be white space, colons, `*`, `$`, opening brackets,
    a word such as `about`, the label of a choice and a name such as `x =`. Where an equation
    follows, as in `The answer is 5+3=8`, its right side counts.

    A number is read whole: `2 1/2`, `2\frac12` and `2½` are 2.5, `1.5 \times 10^3` and `1.5e3` are
    1500, `70\,000` and `70 000` are 70000. The result is None if the number is malformed (`1,0001`)
    or a part of something that is not one number: a formula (`\frac{1+\sqrt5}{2}`), a range
    (`10-20`, after a marker), a list (`3, 4`, after a marker or in a box) or a date.
    """
    number = find_number(text)
    return normalize_number(number) if number else None


def extract_chinese(text: str) -> str | None:
    r"""Return the final number of a worked solution in Chinese as `normalize_number` spells it.

    As `extract_answer`, with two rules between 2 and 3: the number right after the last `答案是`
    (or 为, ：), then the last in the line after `答：`. Units after the number are ignored, also 万
    in `15万`. `负5` and `零下5` are -5, `3又1/2` and `3又2分之1` are 3.5, `3万5千` is 35000.
    Chinese numerals count after `答案是`, and in a line or text without digits: `三十五` is 35.
    """
    number = find_chinese_number(text)
    return normalize_number(number) if number else None


def extract_math(text: str, *, boxes: str = 'last') -> str | None:
    r"""Return the final answer of a worked solution in LaTeX, as it is written, or None.

    The first of these rules that matches decides:
    1. the content of the last `\boxed{…}` (or `\fbox{…}`),
    2. the text after the last `answer is` or `answer:`: the number or delimited formulas right
       after it, or at most three words and symbols up to the end of the clause,
    3. all of `<answer>…</answer>` if it is one line of at most three words,
    4. the last number in the text, or the formula that it is a part of, from the last `=` on.

    With `boxes='all'`, the first rule takes the contents of all boxes, joined by commas, each once:
    `\boxed{1}` and `\boxed{2}` are the list `1, 2`.

    Raises:
        ValueError: `boxes` is neither 'last' nor 'all'.
    """
    if boxes not in ('last', 'all'):
        raise ValueError(f"boxes is {boxes!r}: use 'last' or 'all'")
    text, tagged = final_part(text)
    contents = all_boxed(text) if boxes == 'all' else [last_boxed(text) or '']
    if boxed := ', '.join(filter(None, dict.fromkeys(map(str.strip, contents)))):
        return boxed
    return after_phrase(text) or (short_text(text) if tagged else None) or last_formula(text)
