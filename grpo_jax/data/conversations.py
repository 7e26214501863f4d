"""Conversations in the columns of a data set: which column is the prompt, and what is in it.

A conversation is a list of messages such as `{'role': 'user', 'content': 'How many?'}`, as in data
sets for TRL: in a column `prompt`, whose last message the model answers, or in `messages`, whose
last one is the answer of a demonstration.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

Message: TypeAlias = dict[str, Any]
Conversation: TypeAlias = list[Message]

_COLUMNS = ('prompt', 'messages')
_DEMONSTRATIONS = ('completion', 'messages')
_ONE_COLUMN = re.compile(r'\{(\w+)\}')


def is_conversation(value: object) -> bool:
    """Return whether a value is a non-empty list of messages."""
    return (
        isinstance(value, list)
        and bool(value)
        and all(isinstance(message, dict) and 'role' in message for message in value)
    )


def prompt_column(template: str, row: Mapping[str, Any]) -> str | None:
    """Return the column with the conversations that a prompt template stands for.

    Args:
      template: `'{name}'` for a column of conversations. The default of `data.prompt`,
        `'{question}'`, stands for the conversation in `prompt` or `messages` of a row without it.
      row: a row of the data set.

    Returns:
      The column, or None if the template is to be filled with text.
    """
    return _column(template, row, '{question}', _COLUMNS)


def prompt_of(
    row: Mapping[str, Any], column: str, *, system: str = '', number: int = 0
) -> Conversation:
    """Return the messages that are the prompt of a row.

    Of a demonstration in `messages` the last message, the assistant's, is left out. Elsewhere a
    last message of the assistant is the beginning of the answer, which a completion continues.

    Args:
      row: a row of the data set.
      column: its column with a conversation.
      system: system message of a conversation that has none of its own.
      number: of the row, for error messages.

    Raises:
      ValueError: the messages are malformed, or there is nothing to answer.
    """
    messages = [_message(m, column, number) for m in _messages(row, column, number)]
    if column == 'messages' and messages[-1]['role'] == 'assistant':
        messages = messages[:-1]
    if not messages or messages[-1]['role'] == 'system':
        raise ValueError(
            f'row {number}: column {column!r} has no message that can be answered: end it with one '
            'of the user'
        )
    if system and messages[0]['role'] != 'system':
        messages = [{'role': 'system', 'content': system}, *messages]
    return messages


def demonstration_of(template: str, row: Mapping[str, Any], number: int) -> str | None:
    """Return the last message of the assistant in the column that a template stands for.

    Args:
      template: as in `prompt_column`, with the default `'{demonstration}'` and the columns
        `completion` and `messages`.
      row: a row of the data set.
      number: of the row, for error messages.

    Returns:
      The content of the message, or None if the template is to be filled with text.

    Raises:
      ValueError: the conversation does not end with a text of the assistant.
    """
    column = _column(template, row, '{demonstration}', _DEMONSTRATIONS)
    if column is None:
        return None
    last = _message(_messages(row, column, number)[-1], column, number)
    if last['role'] != 'assistant' or not isinstance(last.get('content'), str):
        raise ValueError(
            f'row {number}: column {column!r} does not end with a text of the assistant, which '
            'would be the demonstration: add it, or remove the row'
        )
    return str(last['content'])


def _column(
    template: str, row: Mapping[str, Any], default: str, others: Sequence[str]
) -> str | None:
    match = _ONE_COLUMN.fullmatch(template)
    if match is None:
        return None
    # Only the default stands for other columns: any other template would have no effect.
    names = others if template == default and match[1] not in row else [match[1]]
    return next((name for name in names if is_conversation(row.get(name))), None)


def _messages(row: Mapping[str, Any], column: str, number: int) -> Conversation:
    value = row[column]
    if not is_conversation(value):
        raise ValueError(
            f"row {number}: column {column!r} is not a list of messages {{'role': …, 'content': "
            f'…}} as in other rows, but {value!r:.60}: fix it, or remove the row'
        )
    messages: Conversation = value
    return messages


def _message(message: Message, column: str, number: int) -> Message:
    """Return a message with its content as text."""
    content = message.get('content')
    parts = content if isinstance(content, list) else []
    if any(not isinstance(part, dict) or part.get('type') != 'text' for part in parts):
        raise ValueError(
            f'row {number}: column {column!r} has a message with other parts than '
            f'text: {parts!r:.80}'
        )
    if isinstance(content, list):
        return message | {'content': ''.join(part['text'] for part in parts)}
    if not isinstance(content, str) and not message.get('tool_calls'):
        raise ValueError(
            f'row {number}: column {column!r} has a message whose content is {content!r:.60}: give '
            'it a text'
        )
    return message
