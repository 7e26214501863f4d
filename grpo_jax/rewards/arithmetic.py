"""Rewards for chains of arithmetic steps: prompt `37+58+21=`, completion `37+58=95;95+21=116`.

A prompt joins whole numbers by `+`, `-` or `*` and ends in `=`. It is worked out strictly from left
to right (`2+3*4=` is 20), one operation per step, so n + 1 numbers need n steps.
"""

import operator
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

# Every spelling of a number but the shortest is malformed (`007`, `+5`, `-0`), so text equality is
# equality of numbers. Possessive quantifiers (`*+`) never backtrack: matching is linear.
_INTEGER = r'(0|-?[1-9][0-9]*+)'
_WHOLE = re.compile(_INTEGER)
_PROBLEM = re.compile(rf'{_INTEGER}(?:[+*-]{_INTEGER})++=')
_OPERATION = re.compile(rf'([+*-]){_INTEGER}')
STEP = re.compile(rf'{_INTEGER}([+*-]){_INTEGER}={_INTEGER}')
_OPERATORS = {'+': operator.add, '-': operator.sub, '*': operator.mul}
_MAX_DIGITS = 1000  # Python refuses to read or print integers of more than 4300 digits


class Step(NamedTuple):
    """The verdict on one step; its text is `completion[start:end]`, without the `;`."""

    start: int
    end: int
    right: bool


def exact_answer(
    prompts: Sequence[str], completions: Sequence[str], answer: Sequence[str | int], **columns: Any
) -> list[float | None]:
    """1.0 where the text after the last `=` of the completion is the whole number in `answer`.

    The comparison is of texts: `0116` or `116;` is not 116. Without a `=` there is no answer: 0.0.

    Raises:
        ValueError: an entry of `answer` is not a whole number.
    """
    rewards: list[float | None] = []
    for row, (completion, expected) in enumerate(zip(completions, answer, strict=True)):
        wanted = str(expected).strip()
        if not _WHOLE.fullmatch(wanted):
            raise ValueError(
                f'column answer, row {row}: {expected!r} is not a whole number like 116 or -5; '
                'for worked solutions use gsm8k_answer'
            )
        rewards.append(float(final_result(completion) == wanted))
    return rewards


def final_result(completion: str) -> str | None:
    """The text after the last `=`, or None without one: the answer that a chain votes for."""
    _, equals, found = completion.rpartition('=')
    return found.strip() if equals else None


def check_steps(prompt: str, completion: str) -> list[Step] | None:
    """A verdict for every written step, in order; None where the prompt is not a chain problem.

    Steps are the non-blank pieces between `;`. The k-th is right if it reads `a∘b=c` where
    - a is the result stated by step k - 1, right or wrong (at k = 1 the prompt's first number),
    - ∘ and b are the k-th operation of the prompt,
    - c equals a∘b.
    So a slip makes exactly one step wrong when what follows is consistent with it. A step beyond
    those the prompt needs is wrong, and so is one after a malformed step, which states no result.
    """
    problem = _parse_problem(prompt)
    if problem is None:
        return None
    previous: str | None = problem[0]
    operations = problem[1]
    steps: list[Step] = []
    for piece in re.finditer('[^;]+', completion):
        text = piece.group().strip()
        if not text:
            continue
        start = piece.start() + piece.group().index(text)
        match = STEP.fullmatch(text)
        right = False
        if match and len(steps) < len(operations):
            left, symbol, operand, result = match.groups()
            follows = left == previous and (symbol, operand) == operations[len(steps)]
            right = follows and result == _evaluate(left, symbol, operand)
        steps.append(Step(start, start + len(text), right))
        previous = match.group(4) if match else None
    return steps


def arithmetic_steps(
    prompts: Sequence[str], completions: Sequence[str], **columns: Any
) -> list[float | None]:
    """Right steps (see `check_steps`) divided by the number of steps that the prompt needs.

    The denominator is the problem's, so a step left out counts as wrong and a step too many gains
    nothing. None where the prompt is not a chain problem.
    """
    rewards: list[float | None] = []
    for prompt, completion in zip(prompts, completions, strict=True):
        problem, steps = _parse_problem(prompt), check_steps(prompt, completion)
        if problem is None or steps is None:
            rewards.append(None)
        else:
            rewards.append(sum(step.right for step in steps) / len(problem[1]))
    return rewards


def _parse_problem(prompt: str) -> tuple[str, list[tuple[str, str]]] | None:
    """The first number and the (symbol, operand) of each step that `prompt` needs."""
    prompt = prompt.strip()
    first = _WHOLE.match(prompt)
    if first is None or not _PROBLEM.fullmatch(prompt):
        return None
    return first.group(), _OPERATION.findall(prompt, first.end())


def _evaluate(left: str, symbol: str, operand: str) -> str | None:
    if max(len(left), len(operand)) > _MAX_DIGITS:
        return None
    return str(_OPERATORS[symbol](int(left), int(operand)))
