"""Render prompts from rows: worked examples, the question, and the frame around them."""

import re
from collections.abc import Iterable, Mapping, Sequence

from grpo_jax.data.chat import chat_prompts
from grpo_jax.data.formats import fill, get_format
from grpo_jax.data.questions import question_key
from grpo_jax.data.rows import Row
from grpo_jax.data.tokenizers import Tokenizer

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
      template: name of a format or a template over columns, see `formats.get_format`.
      rows: rows of a data set.
      examples: rows for the worked examples of a few-shot format. The first ones with distinct
        questions are used; a prompt never shows its own question as an example.
      system: system message; '' selects that of the format.
      chat: tokenizer whose chat template frames the prompts, up to where the assistant's message
        begins. Its texts contain all special tokens: tokenize them without adding any.

    Raises:
      ValueError: the template does not fit the columns, there are too few examples, or the system
        message cannot be used; also as `chat.chat_prompts`.
    """
    prompt_format = get_format(template)
    system = system or prompt_format.system
    user_messages = [fill(prompt_format.user, row) for row in rows]
    if prompt_format.shots:
        candidates = _distinct(examples, prompt_format.shots + 1)
        worked = {key: _example(prompt_format.example, row) for key, row in candidates.items()}
        shown = [_examples_before(row, worked, template, prompt_format.shots) for row in rows]
        user_messages = [text + user for text, user in zip(shown, user_messages, strict=True)]
    if chat is not None:
        return chat_prompts(chat, user_messages, system)
    if system and '{system}' not in prompt_format.frame:
        raise ValueError(
            f'prompt {template!r} has no place for a system message: set chat=True, or write it '
            'into a template'
        )
    return [prompt_format.frame.format(user=user, system=system) for user in user_messages]


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
    solution = _CALCULATOR.sub('', row.get('solution', '')).strip()
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
