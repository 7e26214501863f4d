"""Rewards for chains of arithmetic steps: prompt `37+58+21=`, completion `37+58=95;95+21=116`.

A prompt joins whole numbers by `+`, `-` or `*` and ends in `=`. It is evaluated strictly from left
to right (`2+3*4=` is 20), one operation per step, so n + 1 numbers need n steps.
"""

import operator
import re
from collections.abc import Sequence
from typing import NamedTuple

from grpo_jax.rewards.messages import on_texts

# Only the shortest spelling of a number is valid (not `007`, `+5` or `-0`), so numbers are equal if
# and only if their texts are. Possessive quantifiers (`*+`) never backtrack: matching is linear.
_INTEGER = r'(0|-?[1-9][0-9]*+)'
_WHOLE = re.compile(_INTEGER)
_PROBLEM = re.compile(rf'{_INTEGER}(?:[+*-]{_INTEGER})++=')
_OPERATION = re.compile(rf'([+*-]){_INTEGER}')
STEP = re.compile(rf'{_INTEGER}([+*-]){_INTEGER}={_INTEGER}')
_OPERATORS = {'+': operator.add, '-': operator.sub, '*': operator.mul}
_MAX_DIGITS = 1000  # Python does not parse or print integers of more than 4300 digits


class Step(NamedTuple):
    """A written step, without its `;`, is `completion[start:end]`."""

    start: int
    end: int
    right: bool


@on_texts
def exact_answer(
    prompts: Sequence[str], completions: Sequence[str], answer: Sequence[object], **columns: object
) -> list[float | None]:
    """1.0 if the text after the last `=` of the completion is the whole number in `answer`.

    Else 0.0. Texts are compared, so `0116` or `116;` is not 116. Without `=` there is no answer.

    Raises:
        ValueError: an entry of `answer` is not a whole number.
    """
    rewards: list[float | None] = []
    for row, (completion, value) in enumerate(zip(completions, answer, strict=True)):
        expected = str(value).strip()
        if not _WHOLE.fullmatch(expected):
            raise ValueError(
                f'column answer, row {row}: {value!r} is not a whole number like 116 or -5; '
                'for worked solutions use gsm8k_answer'
            )
        rewards.append(float(final_result(completion) == expected))
    return rewards


def final_result(completion: str) -> str | None:
    """Return the text after the last `=`, the final answer of a chain, or None without one."""
    _, equals, result = completion.rpartition('=')
    return result.strip() if equals else None


def check_steps(prompt: str, completion: str) -> list[Step] | None:
    """Check every written step, in order; return None if the prompt is not a chain problem.

    Steps are the non-blank pieces between `;`. The k-th is right if it reads `a∘b=c` where
    - a is the result stated by step k - 1, right or wrong (at k = 1 the prompt's first number),
    - ∘ and b are the k-th operation of the prompt,
    - c equals a∘b.
    So an error makes exactly one step wrong if the later steps are consistent with it. Steps beyond
    those that the prompt needs are wrong, and so is a step after a malformed one, which states no
    result.
    """
    problem = _parse_problem(prompt)
    if problem is None:
        return None
    previous: str | None  # the result of the previous step, None if it is malformed
    previous, operations = problem
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


@on_texts
def arithmetic_steps(
    prompts: Sequence[str], completions: Sequence[str], **columns: object
) -> list[float | None]:
    """The number of right steps (see `check_steps`) divided by the number that the prompt needs.

    A missing step counts as wrong and an additional one does not count. None where the prompt is
    not a chain problem.
    """
    rewards: list[float | None] = []
    for prompt, completion in zip(prompts, completions, strict=True):
        problem, steps = _parse_problem(prompt), check_steps(prompt, completion)
        if problem is None or steps is None:
            rewards.append(None)
        else:
            _, operations = problem
            rewards.append(sum(step.right for step in steps) / len(operations))
    return rewards


def _parse_problem(prompt: str) -> tuple[str, list[tuple[str, str]]] | None:
    """Return the first number and the (symbol, operand) of each step that `prompt` needs."""
    prompt = prompt.strip()
    first = _WHOLE.match(prompt)
    if first is None or not _PROBLEM.fullmatch(prompt):
        return None
    return first.group(), _OPERATION.findall(prompt, first.end())


def _evaluate(left: str, symbol: str, operand: str) -> str | None:
    if max(len(left), len(operand)) > _MAX_DIGITS:
        return None
    return str(_OPERATORS[symbol](int(left), int(operand)))
