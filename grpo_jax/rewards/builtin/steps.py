"""Step functions for process supervision.

A step function is `steps(prompts, completions, **columns) -> list[list[StepReward]]`: the steps of
each completion, in order.
"""

from collections.abc import Sequence

from grpo_jax.rewards.builtin.arithmetic import check_steps
from grpo_jax.rewards.checks import StepReward
from grpo_jax.rewards.messages import on_texts


@on_texts
def right_steps(
    prompts: Sequence[str], completions: Sequence[str], **columns: object
) -> list[list[StepReward]]:
    """1 for each right step of an arithmetic chain (see `check_steps`), 0 for a wrong one.

    A step includes the `;` after it, and the last step includes everything that follows.

    Raises:
        ValueError: a prompt is not a chain problem.
    """
    rewards = []
    for prompt, completion in zip(prompts, completions, strict=True):
        steps = check_steps(prompt, completion)
        if steps is None:
            raise ValueError(f'prompt {prompt!r} is not a chain of whole numbers like 37+58-21=')
        ends = [*(step.start for step in steps[1:]), len(completion)]
        rewards.append([
            StepReward(end, float(step.right)) for end, step in zip(ends, steps, strict=False)
        ])  # fmt: skip
    return rewards


@on_texts
def separated_steps(
    prompts: Sequence[str], completions: Sequence[str], *, separator: str = '\n', **columns: object
) -> list[list[StepReward]]:
    """Steps that end with `separator`, each worth 0, for a process reward model to score.

    Several separators in a row end one step, and the last step does not need one.
    """
    rewards = []
    for completion in completions:
        steps: list[StepReward] = []
        start = 0
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
