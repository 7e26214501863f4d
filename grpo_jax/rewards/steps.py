"""Rewards of the steps that a completion consists of, for process supervision.

A step function is `steps(prompts, completions, **columns) -> list[list[StepReward]]`: for each
completion its steps in order. Public functions here are found by their names in a config.
"""

import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from grpo_jax.rewards.arithmetic import check_steps
from grpo_jax.rewards.scoring import RewardError


class StepReward(NamedTuple):
    """A step reaches from the end of the one before to its own end."""

    end: int  # characters from the start of the completion
    value: float


def right_steps(
    prompts: Sequence[str], completions: Sequence[str], **columns: Any
) -> list[list[StepReward]]:
    """1 for each right step of a chain of arithmetic (see `check_steps`), 0 for a wrong one.

    A step includes the `;` behind it, and the last one all that follows.

    Raises:
        ValueError: a prompt is not a chain problem.
    """
    rewards = []
    for prompt, completion in zip(prompts, completions, strict=True):
        steps = check_steps(prompt, completion)
        if steps is None:
            raise ValueError(f'prompt {prompt!r} is no chain of whole numbers like 37+58-21=')
        ends = [*(step.start for step in steps[1:]), len(completion)]
        rewards.append([
            StepReward(end, float(step.right)) for end, step in zip(ends, steps, strict=False)
        ])  # fmt: skip
    return rewards


def separated_steps(
    prompts: Sequence[str], completions: Sequence[str], *, separator: str = '\n', **columns: Any
) -> list[list[StepReward]]:
    """Steps that end with `separator`, each worth 0: for a process reward model to judge.

    Several separators in a row end one step, and the last step needs none.
    """
    del prompts
    rewards = []
    for completion in completions:
        steps, start = [], 0
        while start < len(completion):
            end = completion.find(separator, start)
            end = len(completion) if end < 0 else end + len(separator)
            while completion.startswith(separator, end):
                end += len(separator)
            if completion[start:end].strip():
                steps.append(StepReward(end, 0.0))
            start = end
        rewards.append(steps)
    return rewards


def score_steps(
    name: str,
    function: Callable[..., Any],
    prompts: Sequence[str],
    completions: Sequence[str],
    columns: Mapping[str, Sequence[Any]],
) -> list[list[StepReward]]:
    """Calls a step function and checks what it returns.

    Raises:
        RewardError: it raised, or returned anything but a list of steps with growing ends inside
            the completion for each completion.
    """
    try:
        returned = function(prompts=list(prompts), completions=list(completions), **columns)
    except Exception as error:
        raise RewardError(
            f'step rewards {name!r} raised {type(error).__name__}: {error}'
        ) from error
    if not isinstance(returned, list) or len(returned) != len(completions):
        raise RewardError(
            f'step rewards {name!r} returned no list with one entry for each of the '
            f'{len(completions)} completions'
        )
    for row, (steps, completion) in enumerate(zip(returned, completions, strict=True)):
        try:
            ends = [0, *(step[0] for step in steps)]
            finite = all(abs(float(step[1])) < float('inf') for step in steps)
        except (TypeError, IndexError, ValueError) as error:
            raise RewardError(
                f'step rewards {name!r}, row {row}: {steps!r} is no list of (end, value)'
            ) from error
        growing = all(a < b for a, b in itertools.pairwise(ends))
        if not growing or ends[-1] > len(completion) or not finite:
            raise RewardError(
                f'step rewards {name!r}, row {row}: {steps!r} for {completion!r}: ends must grow '
                'from 1 to the length of the completion, and values be finite'
            )
    return [[StepReward(*step) for step in steps] for steps in returned]
