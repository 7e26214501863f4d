"""Penalty for answers in another language than the question, or in several."""

import re
from collections.abc import Sequence
from typing import Any

SCRIPTS = ('question', 'chinese', 'latin')

_HAN = re.compile(r'[\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff]')
_WORD = re.compile(r'[A-Za-zÀ-ɏ]{3,}')
# What belongs to no language: tags, code, formulas, LaTeX commands with what they are applied to.
# Each pattern is bounded or possessive, so that it takes linear time.
_NEUTRAL = re.compile(
    r'</?[a-z]{1,20}>|```[^`]*+```|\$\$[^$]*+\$\$|\$[^$\n]*+\$|\\[A-Za-z]++|\\\((?:[^\\]|\\[^()])*+\\\)'
)


def language_mix(
    prompts: Sequence[str],
    completions: Sequence[str],
    *,
    script: str = 'question',
    **columns: Any,
) -> list[float | None]:
    """Minus the share of the words of a completion that are not in the expected script.

    0 for an answer in one language, -1 for one entirely in the other; the weight is positive. A
    word is a Chinese character, or a run of three Latin letters and more: variables (x, ab) and
    units (cm, kg) are in no language, nor are tags, formulas between `$` and LaTeX commands.
    Where there are no words the penalty is 0, since numbers are in no language either.

    Args:
        prompts: questions; the column `question` counts instead where the data set has one, since a
            prompt may hold a template in another language.
        completions: answers.
        script: 'chinese', 'latin', or 'question' for the one that most words of the question are
            in; None is returned for a question without words.
        columns: the data set's.

    Raises:
        ValueError: another `script`.
    """
    if script not in SCRIPTS:
        raise ValueError(f'script={script!r}: use one of {", ".join(SCRIPTS)}')
    rewards: list[float | None] = []
    questions = columns.get('question', prompts)
    for question, completion in zip(questions, completions, strict=True):
        expected = _script(question) if script == 'question' else script
        chinese, latin = _count(completion)
        foreign = latin if expected == 'chinese' else chinese
        rewards.append(-foreign / max(chinese + latin, 1) if expected else None)
    return rewards


def _script(text: str) -> str | None:
    chinese, latin = _count(text)
    return None if not chinese + latin else 'chinese' if chinese >= latin else 'latin'


def _count(text: str) -> tuple[int, int]:
    """Words of `text` that are Chinese and Latin."""
    text = _NEUTRAL.sub(' ', text)
    return len(_HAN.findall(text)), len(_WORD.findall(text))
