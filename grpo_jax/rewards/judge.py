"""Verdicts on completions of the known data sets, wherever the completions come from."""

from collections.abc import Sequence
from typing import NamedTuple

from grpo_jax.rewards.equivalence import SECONDS, equivalent_pairs
from grpo_jax.rewards.extract import extract_math, find_chinese, find_number
from grpo_jax.rewards.math import is_number, reference_answer, reference_number
from grpo_jax.rewards.numbers import normalize_number

_FIND = {'gsm8k': find_number, 'svamp': find_number, 'mawps': find_number, 'cmath': find_chinese}
DATASETS = ('cmath', 'gsm8k', 'math', 'mawps', 'svamp')


class Verdicts(NamedTuple):
    """What `judge_answers` says of completions[i][j]."""

    correct: list[list[bool]]
    extracted: list[list[str | None]]  # the answers that were judged, None where there is none
    timeouts: int  # completions that are wrong because the comparison reached its deadline


def judge_answers(
    dataset: str,
    references: Sequence[str],
    completions: Sequence[Sequence[str]],
    *,
    seconds: float = SECONDS,
) -> Verdicts:
    r"""Judges every completion by the rules of its data set.

    Args:
      dataset: 'math' (answers in LaTeX, `extract_math`), 'gsm8k', 'svamp', 'mawps' (numbers,
        `extract_answer`) or 'cmath' (numbers in Chinese text, `extract_chinese`).
      references: for each problem the answer alone, or a solution that has it in `\boxed{…}` or
        behind `####`.
      completions: for each problem any number of completions.
      seconds: the deadline of a comparison of expressions.

    Raises:
      ValueError: an unknown data set, lists of different lengths, or a reference without an answer.
    """
    if dataset not in DATASETS:
        raise ValueError(f'unknown data set {dataset!r}: use one of {", ".join(DATASETS)}')
    if len(references) != len(completions):
        raise ValueError(
            f'{len(references)} references for {len(completions)} problems: give one for each'
        )
    judge = _judge_math if dataset == 'math' else _judge_numbers
    return judge(dataset, references, completions, seconds)


def _judge_numbers(
    dataset: str, references: Sequence[str], completions: Sequence[Sequence[str]], seconds: float
) -> Verdicts:
    correct, extracted = [], []
    for row, (reference, texts) in enumerate(zip(references, completions, strict=True)):
        wanted = reference_number(reference)
        if wanted is None:
            raise ValueError(f'reference {row} of {dataset}, {reference!r:.80}, is not a number')
        found = [_FIND[dataset](text) for text in texts]
        correct.append([is_number(number, wanted) for number in found])
        extracted.append([number and normalize_number(number) for number in found])
    return Verdicts(correct, extracted, 0)


def _judge_math(
    dataset: str, references: Sequence[str], completions: Sequence[Sequence[str]], seconds: float
) -> Verdicts:
    wanted = [reference_answer(text) for text in references]
    for row, (text, reference) in enumerate(zip(wanted, references, strict=True)):
        if not text:
            raise ValueError(f'reference {row} of {dataset}, {reference!r:.80}, has no answer')
    extracted = [[extract_math(text) for text in texts] for texts in completions]
    pairs = [(w, answer or '') for w, row in zip(wanted, extracted, strict=True) for answer in row]
    verdicts = iter(equivalent_pairs(pairs, seconds=seconds))
    rows = [[next(verdicts) for _ in row] for row in extracted]
    undecided = sum(verdict is None for row in rows for verdict in row)
    return Verdicts([[bool(verdict) for verdict in row] for row in rows], extracted, undecided)
