"""Tools: plain functions with docstrings and type hints that a model can call."""

import inspect
import json
import typing
from collections.abc import Callable
from typing import Any, TypeAlias

from grpo_jax.environments.failures import Failure
from grpo_jax.environments.turns import ToolCall

Tool: TypeAlias = Callable[..., Any]

_JSON_TYPES: dict[Any, Any] = {str: str, int: int, float: (int, float), bool: bool}
_NOT_TOOLS = ('reset', 'close', 'get_reward', 'check_options')  # public methods of a class


def schema(name: str, tool: Tool) -> dict[str, Any]:
    """Return the JSON schema of a tool, by which a chat template shows it to the model.

    Raises:
        ValueError: it has no docstring in Google's style, or a parameter without a type or a line.
    """
    from transformers.utils import chat_template_utils as utils  # slow, and needed for tools alone

    try:
        described: dict[str, Any] = utils.get_json_schema(tool)
    except (utils.DocstringParsingException, utils.TypeHintParsingException) as error:
        raise ValueError(
            f'tool {name!r}: {error}: give it a docstring with a summary, a section "Args:" with '
            'a line for each parameter, and type hints, which the model is shown'
        ) from error
    described['function']['name'] = name
    return described


def parameters(tool: Tool) -> list[str]:
    """Return the names of a tool's parameters.

    Raises:
        ValueError: it takes any number of arguments, or some by position alone.
    """
    named = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    found = inspect.signature(tool).parameters
    if wrong := [p.name for p in found.values() if p.kind not in named]:
        raise ValueError(
            f'tool {tool.__name__!r}: its parameter {wrong[0]!r} is not passed by name, as all '
            'arguments of a tool are: change it'
        )
    return list(found)


def fitting(tool: Tool, call: ToolCall) -> tuple[dict[str, Any], str]:
    """Return the arguments of a call as the tool takes them, and what is wrong, or ''.

    A number becomes a text where the tool is annotated with `str`.
    """
    hints = _hints(tool)
    arguments = {
        name: str(value)
        if hints.get(name) is str and isinstance(value, int | float) and value is not True
        else value
        for name, value in call.arguments.items()
    }
    try:
        inspect.signature(tool).bind(**arguments)
    except TypeError as error:
        return {}, f'{call.name}: {error}, of {", ".join(parameters(tool)) or "none"}'
    for name, value in arguments.items():
        kinds = _JSON_TYPES.get(hints.get(name))
        if kinds and (not isinstance(value, kinds) or isinstance(value, bool) != (kinds is bool)):
            kind = hints[name].__name__
            return {}, f'{call.name}: {name} is {value!r:.40}, not of type {kind}'
    return arguments, ''


def text_of(value: object) -> str:
    """Return what a tool returned as a text: values of JSON's types as JSON.

    Raises:
        Failure: it is neither.
    """
    if isinstance(value, str):
        return value
    try:
        return json.dumps(value, ensure_ascii=False)
    except (TypeError, ValueError, RecursionError) as error:
        kind = type(value).__name__
        text = f'it returned a value of type {kind}: return a text ({error})'
        raise Failure('not_text', text) from error


def methods_of(cls: type) -> dict[str, Tool]:
    """Return the public methods of a class by name, but those that are not for the model.

    They are bound to nothing: they tell their signatures and docstrings, and cannot be called.
    """
    members = {name: inspect.getattr_static(cls, name) for name in dir(cls)}
    return {
        name: getattr(cls, name) if not inspect.isfunction(member) else member.__get__(object())
        for name, member in members.items()
        if name not in _NOT_TOOLS
        and not name.startswith('_')
        and (inspect.isroutine(member) or isinstance(member, staticmethod | classmethod))
    }


def _hints(tool: Tool) -> dict[str, Any]:
    try:
        return typing.get_type_hints(tool)
    except (NameError, TypeError):
        return {}
