"""Group relative policy optimization (GRPO) in JAX: sample, score, update.

Research code imports what it needs from here. The rest is in the packages `algorithm` (the paper),
`engine` (the same numbers, faster), `models`, `rewards`, `data` and `run` (a training run).

Names are imported when first used, so that `grpo_jax.rewards` can be imported without JAX.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from grpo_jax.algorithm import losses, presets
    from grpo_jax.algorithm.advantages import group_advantages, process_advantages
    from grpo_jax.algorithm.config import Algorithm
    from grpo_jax.algorithm.critic import Critic, gae
    from grpo_jax.algorithm.explanation import TokenTerms, make_explain
    from grpo_jax.algorithm.logprobs import completion_logprobs
    from grpo_jax.algorithm.optimizer import adamw
    from grpo_jax.algorithm.presets import preset
    from grpo_jax.algorithm.program import init_state, make_train_step
    from grpo_jax.algorithm.sample import sample
    from grpo_jax.algorithm.update import train_step
    from grpo_jax.engine.compute import Compute
    from grpo_jax.models import ModelConfig, Transformer, init_params
    from grpo_jax.sharding import make_mesh
    from grpo_jax.types import (
        BaselinedRewards,
        Batch,
        FunctionRewards,
        Prompts,
        Rollout,
        Sampling,
        StepRewards,
        TrainState,
    )

_HOMES = {
    'algorithm.advantages': ('group_advantages', 'process_advantages'),
    'algorithm.config': ('Algorithm',),
    'algorithm.critic': ('Critic', 'gae'),
    'algorithm.explanation': ('TokenTerms', 'make_explain'),
    'algorithm.logprobs': ('completion_logprobs',),
    'algorithm.optimizer': ('adamw',),
    'algorithm.presets': ('preset',),
    'algorithm.program': ('init_state', 'make_train_step'),
    'algorithm.sample': ('sample',),
    'algorithm.update': ('train_step',),
    'engine.compute': ('Compute',),
    'models': ('ModelConfig', 'Transformer', 'init_params'),
    'sharding': ('make_mesh',),
    'types': (
        'BaselinedRewards',
        'Batch',
        'FunctionRewards',
        'Prompts',
        'Rollout',
        'Sampling',
        'StepRewards',
        'TrainState',
    ),
}
_MODULES = {name: module for module, names in _HOMES.items() for name in names}
_SUBMODULES = {'losses': 'algorithm.losses', 'presets': 'algorithm.presets'}

__all__ = [
    'Algorithm', 'BaselinedRewards', 'Batch', 'Compute', 'Critic', 'FunctionRewards', 'ModelConfig',
    'Prompts', 'Rollout', 'Sampling', 'StepRewards', 'TokenTerms', 'TrainState', 'Transformer',
    'adamw', 'completion_logprobs', 'gae', 'group_advantages', 'init_params', 'init_state',
    'losses', 'make_explain', 'make_mesh', 'make_train_step', 'preset', 'presets',
    'process_advantages', 'sample', 'train_step',
]  # fmt: skip


def __getattr__(name: str) -> Any:
    if name in _SUBMODULES:
        return importlib.import_module(f'{__name__}.{_SUBMODULES[name]}')
    if name not in _MODULES:
        raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
    return getattr(importlib.import_module(f'{__name__}.{_MODULES[name]}'), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
