"""Environments by name, with their limits."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from grpo_jax.environments import tool_calls
from grpo_jax.environments.calls import Caller
from grpo_jax.environments.episodes import Episodes
from grpo_jax.environments.forms import BatchForm, Form, ObjectForm, ToolForm
from grpo_jax.environments.recognition import Batched, Kind, Stateful, recognize


class Environment:
    """What replies to the turns of a policy; see `build`.

    Attributes:
        name: of the config.
        tools: JSON schemas of its tools, for the chat template; empty if it has none.
        format: in which tool calls are written, a key of `tool_calls.FORMATS`; '' without tools.
    """

    def __init__(
        self, name: str, form: Form, *, format: str, turns: int, seconds: float, on_error: str
    ) -> None:
        self.name, self.tools, self.format = name, form.tools, format
        self._form, self._turns, self._seconds, self._on_error = form, turns, seconds, on_error

    def episodes(self) -> Episodes:
        """Return the episodes of a new rollout."""
        return Episodes(
            self._form,
            f'environment {self.name!r}',
            turns=self._turns,
            seconds=self._seconds,
            on_error=self._on_error,
        )

    def check(self, columns: Sequence[str]) -> None:
        """Raise ValueError if the environment needs a column that the data set lacks."""
        try:
            self._form.check(columns)
        except ValueError as error:
            raise ValueError(f'environment {self.name!r}: {error}') from error


def build(
    name: str,
    options: Mapping[str, Any],
    *,
    turns: int,
    seconds: float,
    format: str = 'auto',
    on_error: str = 'reply',
    templates: Sequence[str] = (),
) -> Environment:
    """Return the environment called `name`.

    Args:
        name: a built-in ('calculator', 'guess', 'gym', 'python', 'search' or 'tools'), or the path
            'package.module:name' or './file.py:name' of a function or class.
        options: keyword arguments of a class, or keyword-only ones of a function.
        turns: largest number of turns of the policy.
        seconds: deadline of a call.
        format: of tool calls, a key of `tool_calls.FORMATS`; 'auto': by the templates and tools.
        on_error: what follows from a failure: 'reply', the policy reads the error, or 'end'.
        templates: the chat templates of the tokenizer.

    Raises:
        ValueError: the name leads to no environment, an option is unknown, missing or wrong, or a
            number is out of range; the message names the option or argument.
    """
    if turns < 1:
        raise ValueError(f'turns={turns}: make it at least 1')
    if not 0 < seconds < math.inf:
        raise ValueError(f'seconds={seconds}: give a number of seconds above 0')
    for key, value, known in (
        ('format', format, ('auto', *tool_calls.FORMATS)),
        ('on_error', on_error, ('reply', 'end')),
    ):
        if value not in known:
            raise ValueError(f'{key}={value!r} is unknown: use one of {", ".join(known)}')
    form = _form(recognize(name, options), Caller(seconds), on_error)
    written = ''
    if isinstance(form, ToolForm):
        written = form.format = _format(format, templates, form.parameters)
    elif format != 'auto':
        raise ValueError(f'format={format!r} has no effect, as environment {name!r} has no tools')
    return Environment(name, form, format=written, turns=turns, seconds=seconds, on_error=on_error)


def _form(kind: Kind, caller: Caller, on_error: str) -> Form:
    if isinstance(kind, Batched):
        return BatchForm(kind.function, caller)
    if isinstance(kind, Stateful):
        return ObjectForm(kind.make, kind.cls, caller)
    return ToolForm(kind, caller, on_error=on_error)


def _format(format: str, templates: Sequence[str], parameters: tool_calls.Parameters) -> str:
    """Return the format of tool calls.

    Raises:
        ValueError: no tool takes blocks of code.
    """
    if format == 'auto':
        format = tool_calls.detect(templates, parameters)
    if format == 'fenced' and tool_calls.code_tool(parameters) is None:
        raise ValueError(
            "format='fenced' needs one tool with the single parameter 'code', and the tools are "
            f'{", ".join(parameters)}: use another format'
        )
    return format
