"""Names of a run's stages, in their order: sft, reward, grpo, reward-2, grpo-2, ..."""

import re


def stage_order(name: str) -> tuple[int, int]:
    """A sort key of stage names."""
    kind, _, iteration = name.partition('-')
    return (0 if kind == 'sft' else int(iteration or 1), ('sft', 'reward', 'grpo').index(kind))


def is_stage(name: str) -> bool:
    """Whether a name is that of a stage; folders may hold other files."""
    return re.fullmatch(r'sft|(reward|grpo)(-[1-9]\d*)?', name) is not None
