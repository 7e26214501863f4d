"""The forms that an environment can have, and how each replies to a turn.

- A function of batches, `environment(prompts, completions, turns, **columns)`.
- A class with `reply(text)`, and maybe `reset(**columns)` and `close()`; one object per episode.
- Tools: functions with docstrings and type hints.
- A class whose public methods are tools, with `reset(**columns)`, as TRL's `environment_factory`.
"""

import abc
import functools
from collections.abc import Callable, Sequence
from typing import Any

from grpo_jax.environments import tool_calls
from grpo_jax.environments.calls import (
    Caller,
    Episode,
    accepted,
    begin,
    check_columns,
    check_reset,
    close,
    reward_of,
    said,
    tool_message,
    user_message,
)
from grpo_jax.environments.failures import Failure
from grpo_jax.environments.recognition import BATCH, Toolbox
from grpo_jax.environments.tools import fitting, parameters, schema, text_of
from grpo_jax.environments.turns import Reply, ToolCall, clean

MOST_CALLS = 64  # that run at the same time


class Form(abc.ABC):
    """Replies to turns. Its methods run in threads, and what they raise is a failure.

    Attributes:
        batched: whether `respond` takes any number of turns, or one.
        stateful: whether an episode has a `state`, which is lost when a call takes too long.
        most_calls: calls of `respond` that run at the same time.
        tools: schemas of the tools.
    """

    batched: bool
    stateful: bool
    most_calls: int
    tools: list[dict[str, Any]]
    _caller: Caller

    @abc.abstractmethod
    def respond(
        self, episodes: Sequence[Episode], texts: Sequence[str], *, last: bool
    ) -> list[Reply]:
        """Reply to turns of episodes; `last`: of their last turn, so that no reply is read."""

    def close(self, state: Any) -> None:
        """Close the object of an episode."""
        close(state, self._caller)

    @abc.abstractmethod
    def fail(self, text: str, error: str) -> Reply:
        """Return the reply that tells the model of an error in the place of any other."""

    @abc.abstractmethod
    def check(self, columns: Sequence[str]) -> None:
        """Raise ValueError if the environment needs a column that the data set lacks."""


class BatchForm(Form):
    """A function of batches."""

    batched, stateful = True, False

    def __init__(self, function: Callable[..., Any], caller: Caller) -> None:
        self._function, self._caller = function, caller
        self.tools: list[dict[str, Any]] = []
        self.most_calls = most_calls_of(function)

    def respond(
        self, episodes: Sequence[Episode], texts: Sequence[str], *, last: bool
    ) -> list[Reply]:
        """Call the function."""
        names = {name: None for episode in episodes for name in episode.columns}
        columns = {name: [e.columns.get(name) for e in episodes] for name in names}
        arguments = accepted(self._function, columns) | {
            'prompts': [episode.prompt for episode in episodes],
            'completions': list(texts),
            'turns': [list(episode.turns) for episode in episodes],
        }
        values = self._caller.call(self._function, **arguments)
        if not isinstance(values, list | tuple) or len(values) != len(texts):
            shape = f' of {len(values)}' if isinstance(values, list | tuple) else ''
            raise Failure(
                'not_text',
                f'it returned a {type(values).__name__}{shape} for {len(texts)} completions: '
                'return a list with a text, or None, for each',
            )
        return [said(value) for value in values]

    def fail(self, text: str, error: str) -> Reply:
        """See `Form`."""
        return said(error)

    def check(self, columns: Sequence[str]) -> None:
        """See `Form`."""
        check_columns(self._function, [*BATCH, *columns], columns)


class ObjectForm(Form):
    """A class with a method `reply`, of which every episode has an object."""

    batched, stateful = False, True

    def __init__(self, factory: Callable[[], Any], cls: type, caller: Caller) -> None:
        self._factory, self._cls, self._caller = factory, cls, caller
        self.tools: list[dict[str, Any]] = []
        self.most_calls = most_calls_of(cls)

    def respond(
        self, episodes: Sequence[Episode], texts: Sequence[str], *, last: bool
    ) -> list[Reply]:
        """Call `reply` of the episode's object, after `reset` in its first turn."""
        ((episode,), (text,)) = episodes, texts
        begin(episode, self._factory, self._caller)
        reply = said(self._caller.call(episode.state.reply, text))
        return [reply._replace(reward=reward_of(episode.state, self._caller))]

    def fail(self, text: str, error: str) -> Reply:
        """See `Form`."""
        return said(error)

    def check(self, columns: Sequence[str]) -> None:
        """See `Form`."""
        check_reset(self._cls, columns)


class ToolForm(Form):
    """Tools, which are the same for all episodes, or the methods of an object of the episode."""

    batched = False

    def __init__(self, box: Toolbox, caller: Caller, *, on_error: str) -> None:
        self._box, self._caller, self._on_error = box, caller, on_error
        self.stateful = box.make is not None
        described = box.descriptions()
        self.parameters = {name: parameters(tool) for name, tool in described.items()}
        self.tools = [schema(name, tool) for name, tool in described.items()]
        self.most_calls = min(map(most_calls_of, [*described.values(), box.cls]))
        self.format = 'hermes'

    def respond(
        self, episodes: Sequence[Episode], texts: Sequence[str], *, last: bool
    ) -> list[Reply]:
        """Carry out the calls in a turn; without any, the episode is over."""
        ((episode,), (text,)) = episodes, texts
        if self._box.make is not None:
            begin(episode, self._box.make, self._caller)
        calls = tool_calls.parse(text, self.format, self.parameters)
        if not calls or last:
            reply = Reply(None, 'turn_limit' if calls else 'end', calls=calls)
            return [reply._replace(reward=reward_of(episode.state, self._caller))]
        results = [self._carry_out(call, episode) for call in calls]
        messages = tuple(tool_message(c, t) for c, (t, *_) in zip(calls, results, strict=True))
        failed = [(outcome, detail) for _, outcome, detail in results if outcome != 'reply']
        outcome, detail = failed[0] if failed else ('reply', '; '.join(d for *_, d in results if d))
        over = self._on_error == 'end' and any(o != 'bad_call' for o, _ in failed)
        reward = reward_of(episode.state, self._caller)
        return [Reply(None if over else messages, outcome, detail, calls, reward)]

    def fail(self, text: str, error: str) -> Reply:
        """See `Form`."""
        calls = tool_calls.parse(text, self.format, self.parameters)
        messages = [tool_message(call, error) for call in calls] or [user_message(error)]
        return Reply(tuple(messages), 'error', calls=calls)

    def check(self, columns: Sequence[str]) -> None:
        """See `Form`."""
        if self._box.cls is not None:
            check_reset(self._box.cls, columns)

    def _carry_out(self, call: ToolCall, episode: Episode) -> tuple[str, str, str]:
        """Return the text of a call's reply, its outcome and a detail."""
        error = call.error
        arguments: dict[str, Any] = {}
        if not error:
            tool = self._box.functions.get(call.name) or getattr(episode.state, call.name)
            arguments, error = fitting(tool, call)
        if error:
            return f'error: {error}', 'bad_call', error
        try:
            text, note = clean(text_of(self._caller.call(tool, **arguments)))
        except Failure as failure:
            detail = f'{call.name}: {failure.detail}'
            return f'error: {failure.text}', failure.outcome, detail
        return text, 'reply', note and f'{call.name}: {note}'


def most_calls_of(environment: Any) -> int:
    """Return the attribute `most_calls` of a function or class: its calls at the same time.

    Raises:
        ValueError: it is no whole number above 0.
    """
    while isinstance(environment, functools.partial):
        environment = environment.func
    most = getattr(environment, 'most_calls', MOST_CALLS)
    if isinstance(most, bool) or not isinstance(most, int) or most < 1:
        raise ValueError(f'most_calls={most!r} of {environment!r:.60}: make it 1 or more')
    return min(most, MOST_CALLS)
