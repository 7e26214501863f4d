"""Conversations: lists of messages, and functions that take the texts of messages.

A message is a dictionary such as `{'role': 'user', 'content': 'How many?'}`. Its content is a text,
or a list of parts `{'type': 'text', 'text': …}`.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias, TypeVar, cast

Message: TypeAlias = Mapping[str, Any]
Conversation: TypeAlias = Sequence[Message]

F = TypeVar('F', bound=Callable[..., Any])


def answers_of(completions: Sequence[str]) -> list[list[dict[str, Any]]]:
    """Return completions as conversations of one message, by the role 'assistant'."""
    return [[{'role': 'assistant', 'content': text}] for text in completions]


def text_of(value: str | Conversation) -> str:
    """Return a text as it is, and the content of the last message of a conversation."""
    if isinstance(value, str):
        return value
    content = value[-1].get('content') if value else None
    if isinstance(content, str) or content is None:
        return content or ''
    return ''.join(part.get('text', '') for part in content)


def on_texts(function: F) -> F:
    """Decorate a function of prompts and completions that takes them as texts.

    It also accepts conversations, whose last messages it sees. `scoring.score` passes the rendered
    prompts, with all that the chat template adds to the messages.
    """

    @functools.wraps(function)
    def call(*args: Any, **columns: Any) -> Any:
        texts = [list(map(text_of, values)) for values in args[:2]]
        for name in columns.keys() & {'prompts', 'completions'}:
            columns[name] = list(map(text_of, columns[name]))
        return function(*texts, *args[2:], **columns)

    call.takes_texts = True  # type: ignore[attr-defined]
    return cast(F, call)


def takes_texts(function: Callable[..., object]) -> bool:
    """Return whether a reward function, with or without bound options, was made by `on_texts`."""
    while isinstance(function, functools.partial):
        function = function.func
    return getattr(function, 'takes_texts', False)
