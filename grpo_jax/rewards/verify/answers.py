r"""Grades of completions by the reference answers of the known data sets.

A reference is the answer alone, or a solution that has it after `####` or in `\boxed{…}`.
"""

from collections.abc import Sequence
from typing import NamedTuple

from grpo_jax.rewards.verify.equivalence import SECONDS, equivalent_pairs
from grpo_jax.rewards.verify.extraction import extract_math, find_chinese_number, find_number
from grpo_jax.rewards.verify.numbers import Number, normalize_number, parse_number, same_number

DATASETS = ('cmath', 'gsm8k', 'math', 'mawps', 'svamp')

_FIND_NUMBER = {
    'gsm8k': find_number,
    'svamp': find_number,
    'mawps': find_number,
    'cmath': find_chinese_number,
}


class Grades(NamedTuple):
    """Grades of the completions of several problems; [i][j] is completion j of problem i."""

    correct: list[list[bool]]
    extracted: list[list[str | None]]  # the answers that were graded, None where there is none
    timeouts: int  # completions that count as wrong because the comparison reached its deadline


def grade_answers(
    dataset: str,
    references: Sequence[str],
    completions: Sequence[Sequence[str]],
    *,
    seconds: float = SECONDS,
) -> Grades:
    r"""Grade every completion by the rules of its data set.

    Args:
        dataset: 'math' (answers in LaTeX, `extract_math`), 'gsm8k', 'svamp', 'mawps' (numbers,
            `extract_answer`) or 'cmath' (numbers in Chinese text, `extract_chinese`).
        references: for each problem the answer alone, or a solution that has it in `\boxed{…}` or
            after `####`.
        completions: for each problem any number of completions.
        seconds: the deadline of each comparison of expressions.

    Raises:
        ValueError: an unknown data set, lists of different lengths, or a reference without an
            answer.
    """
    if dataset not in DATASETS:
        raise ValueError(f'unknown data set {dataset!r}: use one of {", ".join(DATASETS)}')
    if len(references) != len(completions):
        raise ValueError(
            f'{len(references)} references for {len(completions)} problems: give one for each'
        )
    if dataset == 'math':
        return _grade_math(references, completions, seconds)
    return _grade_numbers(dataset, references, completions)


def reference_answer(text: object, *, boxes: str = 'last') -> str:
    r"""Return the reference in a column `answer`: after `####`, in `\boxed{…}`, or all of it.

    `boxes` is that of `extract_math`.
    """
    answer = '' if text is None else str(text).rpartition('####')[2].strip()
    has_box = any(command in answer for command in ('\\boxed', '\\fbox', '\\framebox'))
    return (extract_math(answer, boxes=boxes) or '') if has_box else answer


def reference_number(text: object) -> Number | None:
    """Return the reference as a number; None if it is not one."""
    return parse_number(reference_answer(text))


def equals_number(text: str | None, reference: Number) -> bool:
    """Return whether the number extracted from a completion is the reference."""
    number = parse_number(text) if text else None
    # Extraction from a sentence drops the percent sign, so drop the reference's as well.
    return number is not None and same_number(number, reference._replace(percent=False))


def _grade_numbers(
    dataset: str, references: Sequence[str], completions: Sequence[Sequence[str]]
) -> Grades:
    grades = Grades([], [], 0)
    for row, (text, group) in enumerate(zip(references, completions, strict=True)):
        reference = reference_number(text)
        if reference is None:
            raise ValueError(f'reference {row} of {dataset}, {text!r:.80}, is not a number')
        numbers = [_FIND_NUMBER[dataset](completion) for completion in group]
        grades.correct.append([equals_number(number, reference) for number in numbers])
        grades.extracted.append([number and normalize_number(number) for number in numbers])
    return grades


def _grade_math(
    references: Sequence[str], completions: Sequence[Sequence[str]], seconds: float
) -> Grades:
    answers = [reference_answer(text) for text in references]
    for row, (text, answer) in enumerate(zip(references, answers, strict=True)):
        if not answer:
            raise ValueError(f'reference {row} of math, {text!r:.80}, has no answer')
    extracted = [[extract_math(completion) for completion in group] for group in completions]
    pairs = [
        (answer, candidate or '')
        for answer, group in zip(answers, extracted, strict=True)
        for candidate in group
    ]
    results = iter(equivalent_pairs(pairs, seconds=seconds))
    same = [[next(results) for _ in group] for group in extracted]
    timeouts = sum(result is None for group in same for result in group)
    return Grades([[bool(result) for result in group] for group in same], extracted, timeouts)
