"""Render prompts from rows: worked examples, the question, and the frame around them."""

import re
from collections.abc import Iterable, Mapping, Sequence

from grpo_jax.data.chat import chat_prompts, conversation_prompts
from grpo_jax.data.conversations import Conversation, prompt_column, prompt_of
from grpo_jax.data.formats import fill, get_format
from grpo_jax.data.questions import question_key
from grpo_jax.data.rows import Row
from grpo_jax.data.tokenizers import Tokenizer
from grpo_jax.data.values import text_of

_CALCULATOR = re.compile(r'<<[^<>]*>>')  # GSM8K's annotations


def render_prompts(
    template: str,
    rows: Sequence[Row],
    *,
    examples: Iterable[Row] = (),
    system: str = '',
    chat: Tokenizer | None = None,
) -> list[str]:
    """Render the prompt of every row.

    Args:
      template: name of a format or a template over columns, see `formats.get_format`. A column of
        conversations stands alone, as in '{messages}', see `conversations`.
      rows: rows of a data set.
      examples: rows for the worked examples of a few-shot format. The first ones with distinct
        questions are used; a prompt never shows its own question as an example.
      system: system message; '' selects that of the format.
      chat: tokenizer whose chat template frames the prompts, up to where the assistant's message
        begins. Its texts contain all special tokens: tokenize them without adding any.

    Raises:
      ValueError: the template does not fit the columns, there are too few examples, or the system
        message cannot be used; also as `chat.chat_prompts` and `chat.conversation_prompts`.
    """
    conversations = prompt_conversations(template, rows, system)
    if conversations is not None:
        if chat is None:
            raise ValueError(
                f'prompt {template!r} is a column of conversations, which a chat template renders: '
                'set data.chat=True'
            )
        return conversation_prompts(chat, conversations)
    prompt_format = get_format(template)
    system = system or prompt_format.system
    user_messages = _user_messages(template, rows, examples)
    if chat is not None:
        return chat_prompts(chat, user_messages, system)
    if system and '{system}' not in prompt_format.frame:
        raise ValueError(
            f'prompt {template!r} has no place for a system message: set data.chat=True, or '
            'write it into a template'
        )
    return [prompt_format.frame.format(user=user, system=system) for user in user_messages]


def _user_messages(template: str, rows: Sequence[Row], examples: Iterable[Row]) -> list[str]:
    """Return what the user says in each prompt, with the worked examples before it."""
    prompt_format = get_format(template)
    user_messages = [fill(prompt_format.user, row) for row in rows]
    if not prompt_format.shots:
        return user_messages
    candidates = _distinct(examples, prompt_format.shots + 1)
    worked = {key: _example(prompt_format.example, row) for key, row in candidates.items()}
    shown = [_examples_before(row, worked, template, prompt_format.shots) for row in rows]
    return [text + user for text, user in zip(shown, user_messages, strict=True)]


def prompt_messages(
    template: str, rows: Sequence[Row], *, examples: Iterable[Row] = (), system: str = ''
) -> list[Conversation]:
    """Return the prompts of rows as lists of messages: conversations, or a message of the user.

    Args:
      template: see `render_prompts`.
      rows: rows of a data set.
      examples: see `render_prompts`.
      system: see `render_prompts`.

    Raises:
      ValueError: as `render_prompts`.
    """
    conversations = prompt_conversations(template, rows, system)
    if conversations is not None:
        return conversations
    system = system or get_format(template).system
    prefix = [{'role': 'system', 'content': system}] if system else []
    messages = _user_messages(template, rows, examples)
    return [[*prefix, {'role': 'user', 'content': text}] for text in messages]


def prompt_conversations(
    template: str, rows: Sequence[Row], system: str = ''
) -> list[Conversation] | None:
    """Return the prompts of rows as lists of messages; None if the template is filled with text.

    Args:
      template: see `render_prompts`.
      rows: rows of a data set.
      system: system message of the conversations that have none.

    Raises:
      ValueError: a row's messages are malformed, see `conversations.prompt_of`.
    """
    column = prompt_column(template, rows[0]) if len(rows) else None
    if column is None:
        return None
    return [prompt_of(row, column, system=system, number=i) for i, row in enumerate(rows)]


def _distinct(examples: Iterable[Row], count: int) -> dict[str, Row]:
    """Return the first `count` rows with distinct questions, by question key."""
    distinct: dict[str, Row] = {}
    for row in examples:
        distinct.setdefault(question_key(fill('{question}', row)), row)
        if len(distinct) == count:
            break
    return distinct


def _example(template: str, row: Row) -> str:
    """Render a worked example, without GSM8K's annotations and its last line, the answer."""
    solution = _CALCULATOR.sub('', text_of(row.get('solution', ''))).strip()
    steps, marker, _ = solution.rpartition('####')
    solution = steps.strip() if marker else solution
    return fill(template, {**row, 'worked': f'{solution}\n' if solution else ''})


def _examples_before(row: Row, worked: Mapping[str, str], template: str, count: int) -> str:
    """Return the text of `count` worked examples whose questions differ from that of the row."""
    key = question_key(fill('{question}', row))
    examples = [text for other, text in worked.items() if other != key][:count]
    if len(examples) < count:
        raise ValueError(
            f'prompt {template!r} shows {count} worked examples, but there are {len(examples)} '
            'other than the question itself: provide more rows as examples'
        )
    return ''.join(f'{text}\n\n' for text in examples)
