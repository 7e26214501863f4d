"""Environments: what replies to the turns of a policy, such as tools and games.

    environment = environments.build('calculator', {}, turns=4, seconds=10.0)
    with environment.episodes() as episodes:
        episodes.start(0, 'What is 123 * 456?', {})
        episodes.submit([environments.EndedTurn(0, 'calculator(123 * 456)')])
        (answer,) = episodes.ready(seconds=10.0)

An environment is a function of batches, a class with `reply`, or tools: functions, or the methods
of a class as in TRL's `environment_factory` (see `forms`). `Episodes` calls it in threads, with
deadlines; what goes wrong is an outcome of one turn. `tool_calls` reads what models write, and
`Renderer` makes tokens of the replies.
"""

from grpo_jax.environments.builtin.gym import gym_rows
from grpo_jax.environments.environment import Environment, build
from grpo_jax.environments.episodes import Episodes
from grpo_jax.environments.rendering import Renderer
from grpo_jax.environments.tool_calls import FORMATS, parse
from grpo_jax.environments.turns import (
    OUTCOMES,
    Answer,
    EndedTurn,
    Message,
    Reply,
    ToolCall,
    Turn,
)

__all__ = [
    'FORMATS',
    'OUTCOMES',
    'Answer',
    'EndedTurn',
    'Environment',
    'Episodes',
    'Message',
    'Renderer',
    'Reply',
    'ToolCall',
    'Turn',
    'build',
    'gym_rows',
    'parse',
]
