"""Rewards for final answers: word problems such as GSM8K, mathematics in LaTeX, Chinese text."""

from collections.abc import Callable, Sequence

from grpo_jax.rewards.messages import on_texts
from grpo_jax.rewards.verify.answers import equals_number, reference_answer, reference_number
from grpo_jax.rewards.verify.equivalence import SECONDS, equivalent_pairs
from grpo_jax.rewards.verify.extraction import extract_math, find_chinese_number, find_number


@on_texts
def gsm8k_answer(
    prompts: Sequence[str], completions: Sequence[str], answer: Sequence[object], **columns: object
) -> list[float | None]:
    """1.0 if the number that `extract_answer` finds is the reference (see `same_number`), else 0.0.

    The reference is the number after the last `####` in `answer`, or all of `answer` without one.
    None where the reference is not a number.
    """
    return _compare_numbers(completions, answer, find_number)


@on_texts
def cmath_answer(
    prompts: Sequence[str], completions: Sequence[str], answer: Sequence[object], **columns: object
) -> list[float | None]:
    """As `gsm8k_answer`, with the number that `extract_chinese` finds."""
    return _compare_numbers(completions, answer, find_chinese_number)


@on_texts
def math_answer(
    prompts: Sequence[str],
    completions: Sequence[str],
    answer: Sequence[object],
    *,
    boxes: str = 'last',
    seconds: float = SECONDS,
    **columns: object,
) -> list[float | None]:
    r"""1.0 if the answer that `extract_math` finds is equivalent to the reference, else 0.0.

    `answer` is the reference alone (`\frac{1}{2}`) or a solution that has it in `\boxed{…}`. Where
    a completion or a solution has several boxes, the last counts, or with `boxes='all'` all of them
    as a list: `\boxed{1}` and `\boxed{2}` are the answer `1, 2`. An answer that takes more than
    `seconds` to compare counts as wrong. None where the reference is empty. `verify.equivalence`
    defines which answers are equivalent.
    """
    references = [reference_answer(text, boxes=boxes) for text in answer]
    extracted = [extract_math(text, boxes=boxes) or '' for text in completions]
    same = equivalent_pairs(list(zip(references, extracted, strict=True)), seconds=seconds)
    return [
        float(bool(equal)) if reference else None
        for reference, equal in zip(references, same, strict=True)
    ]


def _compare_numbers(
    completions: Sequence[str], answer: Sequence[object], find: Callable[[str], str | None]
) -> list[float | None]:
    rewards: list[float | None] = []
    for completion, text in zip(completions, answer, strict=True):
        reference = reference_number(text)
        rewards.append(
            None if reference is None else float(equals_number(find(completion), reference))
        )
    return rewards
