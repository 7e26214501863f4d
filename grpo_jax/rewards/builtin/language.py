"""Penalty for completions in another language than that of the question, or in several."""

import re
from collections.abc import Sequence

from grpo_jax.rewards.messages import on_texts

SCRIPTS = ('question', 'chinese', 'latin')

_HAN = re.compile(r'[\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff]')
_WORD = re.compile(r'[A-Za-zÀ-ɏ]{3,}')
# Text that belongs to no language: tags, code, formulas, LaTeX commands.
# Each pattern is bounded or possessive, so that it takes linear time.
_NEUTRAL = re.compile(
    r'</?[a-z]{1,20}>|```[^`]*+```|\$\$[^$]*+\$\$|\$[^$\n]*+\$|\\[A-Za-z]++|\\\((?:[^\\]|\\[^()])*+\\\)'
)


@on_texts
def language_mix(
    prompts: Sequence[str],
    completions: Sequence[str],
    question: Sequence[str] | None = None,
    *,
    script: str = 'question',
    **columns: object,
) -> list[float | None]:
    """Minus the share of the words of a completion that are not in the expected script.

    0 for a completion in the expected script, -1 for one entirely in the other; the weight is
    positive. A word is a Chinese character, or a run of three or more Latin letters: variables (x,
    ab) and units (cm, kg) belong to no language, nor do tags, code, formulas between `$` and LaTeX
    commands. A completion without words has no penalty, since numbers belong to no language either.

    Args:
        prompts: N prompts.
        completions: N completions.
        question: N questions, used in place of the prompts where the data set has this column,
            since a prompt may contain a template in another language.
        script: 'chinese', 'latin', or 'question' for the script of most words of the question. The
            reward is None for a question without words.
        columns: the other columns of the data set.

    Raises:
        ValueError: an unknown `script`.
    """
    if script not in SCRIPTS:
        raise ValueError(f'script={script!r}: use one of {", ".join(SCRIPTS)}')
    rewards: list[float | None] = []
    questions = prompts if question is None else question
    for text, completion in zip(questions, completions, strict=True):
        expected = _main_script(text) if script == 'question' else script
        chinese, latin = _count_words(completion)
        foreign = latin if expected == 'chinese' else chinese
        rewards.append(-foreign / max(chinese + latin, 1) if expected else None)
    return rewards


def _main_script(text: str) -> str | None:
    chinese, latin = _count_words(text)
    return None if not chinese + latin else 'chinese' if chinese >= latin else 'latin'


def _count_words(text: str) -> tuple[int, int]:
    """Count the Chinese and the Latin words of `text`."""
    text = _NEUTRAL.sub(' ', text)
    return len(_HAN.findall(text)), len(_WORD.findall(text))
