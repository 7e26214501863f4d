"""Calls of the user's code: an episode's object, its columns, and what is said."""

import copy
import dataclasses
import functools
import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from grpo_jax.environments.asynchronous import EventLoop
from grpo_jax.environments.failures import Failure, failures
from grpo_jax.environments.turns import Message, Reply, ToolCall, Turn, clean


@dataclasses.dataclass
class Episode:
    """What an environment knows of one completion.

    Attributes:
        completion: its number.
        prompt: as a text or as messages.
        columns: the row of the data set.
        turns: the earlier turns.
        state: the object of a stateful environment.
        begun: whether it is there and was reset.
        waits: whether a reply is being made.
        over: whether no reply follows.
    """

    completion: int
    prompt: str | Sequence[Mapping[str, Any]]
    columns: Mapping[str, Any]
    turns: list[Turn] = dataclasses.field(default_factory=list)
    state: Any = None
    begun: bool = False
    waits: bool = False
    over: bool = False


@dataclasses.dataclass
class Caller:
    """Calls functions of the user, which may be coroutines."""

    seconds: float
    loop: EventLoop = dataclasses.field(default_factory=EventLoop)

    def call(self, function: Callable[..., Any], *arguments: Any, **named: Any) -> Any:
        """Return what a function returns; raise `Failure` with its exception."""
        with failures():
            value = function(*arguments, **named)
            return self.loop.run(value, self.seconds) if inspect.isawaitable(value) else value


def tool_message(call: ToolCall, text: str) -> Message:
    """Return the message with the reply of a tool."""
    return {'role': 'tool', 'name': call.name or 'tool', 'content': text}


def user_message(text: str) -> Message:
    """Return the message with the reply of an environment."""
    return {'role': 'user', 'content': text}


def said(value: object) -> Reply:
    """Return the reply that an environment's own text, or None, stands for.

    Raises:
        Failure: it is neither.
    """
    if value is None:
        return Reply(None, 'end')
    if not isinstance(value, str):
        kind = type(value).__name__
        text = f'it returned a value of type {kind}: return a text, or None at the end'
        raise Failure('not_text', text)
    text, note = clean(value)
    return Reply((user_message(text),), 'reply', note)


def begin(episode: Episode, factory: Callable[[], Any], caller: Caller) -> None:
    """Make the object of an episode and call its `reset`, once.

    Raises:
        Failure: one of them raises, or `reset` returned a text that the model has not seen, because
            it is not in the prompt.
    """
    if episode.begun:
        return
    episode.state = caller.call(factory)
    observation = None
    if reset := getattr(episode.state, 'reset', None):
        columns = accepted(reset, {'prompt': episode.prompt, **episode.columns})
        observation = caller.call(reset, **columns)
    seen = _all_text(episode.prompt)
    if observation is not None and (
        not isinstance(observation, str) or observation.strip() not in seen
    ):
        raise Failure(
            'not_text',
            f'reset returned {observation!r:.60}, which is not in the prompt: the prompt is there '
            'before the episode begins, so write it into the rows of the data set',
        )
    episode.begun = True


def reward_of(state: Any, caller: Caller) -> float | None:
    """Return `get_reward()` of an episode's object, if it has one.

    Raises:
        Failure: it raises, or returns something else than a finite number or None.
    """
    if (get_reward := getattr(state, 'get_reward', None)) is None:
        return None
    value = caller.call(get_reward)
    if value is None:
        return None
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if not math.isfinite(number):
        text = f'get_reward returned {value!r:.60}: return a finite number, or None'
        raise Failure('not_text', text)
    return number


def accepted(function: Callable[..., Any], columns: Mapping[str, Any]) -> dict[str, Any]:
    """Return copies of the columns that a function takes, which it may change."""
    known = inspect.signature(function).parameters.values()
    names = {p.name for p in known}
    if any(p.kind == p.VAR_KEYWORD for p in known):
        names |= columns.keys()
    return {name: copy.deepcopy(value) for name, value in columns.items() if name in names}


def close(state: Any, caller: Caller) -> None:
    """Call `close` of an episode's object, if it has it; raise `Failure` with its exception."""
    if (end := getattr(state, 'close', None)) is not None:
        caller.call(end)


def check_reset(cls: type, columns: Sequence[str]) -> None:
    """Raise ValueError if `reset` of a class needs a column that the data set lacks."""
    if hasattr(cls, 'reset'):
        check_columns(cls.reset, ['self', 'prompt', *columns], columns)


def check_columns(
    function: Callable[..., Any], provided: Sequence[str], columns: Sequence[str]
) -> None:
    """Raise ValueError if a function has a parameter that is not provided."""
    for name, parameter in inspect.signature(function).parameters.items():
        variadic = parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
        if parameter.default is parameter.empty and not variadic and name not in provided:
            raise ValueError(
                f'{name_of(function)} needs {name!r}, which is not a column of the data set: '
                f'it has {", ".join(columns)}'
            )


def _all_text(prompt: str | Sequence[Mapping[str, Any]]) -> str:
    if isinstance(prompt, str):
        return prompt
    return '\n'.join(str(message.get('content') or '') for message in prompt)


def name_of(function: Callable[..., Any]) -> str:
    """Return the name of a function, with or without bound options."""
    while isinstance(function, functools.partial):
        function = function.func
    return getattr(function, '__qualname__', repr(function))
