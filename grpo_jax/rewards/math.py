"""Rewards for the final answer: word problems such as GSM8K, mathematics in LaTeX, Chinese."""

from collections.abc import Callable, Sequence
from typing import Any

from grpo_jax.rewards.equivalence import SECONDS, equivalent_pairs
from grpo_jax.rewards.extract import extract_math, find_chinese, find_number
from grpo_jax.rewards.numbers import Number, read_number, same_number


def gsm8k_answer(
    prompts: Sequence[str], completions: Sequence[str], answer: Sequence[str], **columns: Any
) -> list[float | None]:
    """1.0 where the number that `extract_answer` finds is the reference, see `same_number`.

    The reference is the number after the last `####` in `answer`, or all of `answer` without one.
    0.0 for another number or for none. None where the reference is no number.
    """
    return _numeric(completions, answer, find_number)


def cmath_answer(
    prompts: Sequence[str], completions: Sequence[str], answer: Sequence[str], **columns: Any
) -> list[float | None]:
    """As `gsm8k_answer`, with the number that `extract_chinese` finds."""
    return _numeric(completions, answer, find_chinese)


def math_answer(
    prompts: Sequence[str],
    completions: Sequence[str],
    answer: Sequence[str],
    *,
    seconds: float = SECONDS,
    **columns: Any,
) -> list[float | None]:
    r"""1.0 where what `extract_math` finds is equivalent to `answer`, see `equivalence`.

    0.0 for another answer, for none, and for one that takes more than `seconds` to compare.
    `answer` is the reference alone (`\frac{1}{2}`) or a solution that has it in `\boxed{…}`. None
    where it is empty.
    """
    references = [reference_answer(text) for text in answer]
    found = [extract_math(text) or '' for text in completions]
    same = equivalent_pairs(list(zip(references, found, strict=True)), seconds=seconds)
    return [
        float(bool(verdict)) if wanted else None
        for wanted, verdict in zip(references, same, strict=True)
    ]


def reference_answer(text: str) -> str:
    r"""The reference in a column `answer`: behind the last `####`, in `\boxed{…}`, or all of it."""
    text = str(text).rpartition('####')[2].strip()
    return (extract_math(text) or '') if '\\boxed' in text else text


def reference_number(text: str) -> Number | None:
    """The reference as a number; None where it is something else."""
    return read_number(reference_answer(text))


def _numeric(
    completions: Sequence[str], answer: Sequence[str], find: Callable[[str], str | None]
) -> list[float | None]:
    rewards: list[float | None] = []
    for completion, reference in zip(completions, answer, strict=True):
        wanted = reference_number(reference)
        rewards.append(None if wanted is None else float(is_number(find(completion), wanted)))
    return rewards


def is_number(found: str | None, wanted: Number) -> bool:
    """Whether a number found in a completion is the one that is wanted."""
    number = read_number(found) if found else None
    # A number found in a sentence has lost its percent sign, if it had one: so does the reference.
    return number is not None and same_number(number, wanted._replace(percent=False))
