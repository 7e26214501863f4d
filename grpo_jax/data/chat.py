"""Chat templates: render prompts, and find how a template ends the assistant's messages."""

import re
from collections.abc import Sequence
from typing import cast

from grpo_jax.data.tokenizers import Tokenizer

_PLACEHOLDER = 'the-words-of-the-assistant'  # the assistant's message when a template is probed

Conversation = list[dict[str, str]]


def chat_prompts(tokenizer: Tokenizer, user_messages: Sequence[str], system: str) -> list[str]:
    """Render prompts by the tokenizer's chat template, up to where the assistant's message begins.

    Args:
      tokenizer: tokenizer with a chat template.
      user_messages: one message for each prompt.
      system: system message, or ''.

    Raises:
      ValueError: there is no chat template, or it fails, rejects the system message or ignores it.
    """
    prefix = [{'role': 'system', 'content': system}] if system else []
    conversations = [[*prefix, {'role': 'user', 'content': text}] for text in user_messages]
    prompts = _render(tokenizer, conversations, add_generation_prompt=True)
    if prefix and conversations:
        without_system = _render(tokenizer, [conversations[0][1:]], add_generation_prompt=True)
        if prompts[0] == without_system[0]:
            raise ValueError(
                f'the chat template ignores the system message {system!r}: write it into the '
                'prompt template'
            )
    return prompts


def turn_end(tokenizer: Tokenizer) -> tuple[str, int]:
    """Return how the chat template ends a message of the assistant.

    Returns:
      The text between the message and its end token, and the id of the end token. That is the first
      special token after the message, such as `<|im_end|>`, or the tokenizer's end-of-sequence
      token if the template writes none.

    Raises:
      ValueError: there is no chat template, or it fails or ignores the assistant's message.
    """
    conversation = [
        {'role': 'user', 'content': 'x'},
        {'role': 'assistant', 'content': _PLACEHOLDER},
    ]
    (text,) = _render(tokenizer, [conversation], add_generation_prompt=False)
    _, placeholder, ending = text.rpartition(_PLACEHOLDER)
    if not placeholder:
        raise ValueError("the chat template ignores the assistant's message: use another one")
    special = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
    longest_first = sorted(special, key=len, reverse=True)
    match = re.search('|'.join(map(re.escape, longest_first)), ending) if special else None
    if match is None:
        return '', tokenizer.eos_token_id
    return ending[: match.start()], tokenizer.get_vocab()[match.group()]


def _render(
    tokenizer: Tokenizer, conversations: list[Conversation], *, add_generation_prompt: bool
) -> list[str]:
    if not tokenizer.chat_template:
        raise ValueError(
            f'tokenizer {tokenizer.name_or_path!r} has no chat template: set chat=False, or use '
            'the tokenizer of a chat model'
        )
    try:
        import jinja2
    except ImportError as error:
        raise ValueError('chat templates need jinja2: pip install jinja2') from error
    try:
        texts = tokenizer.apply_chat_template(
            conversations, tokenize=False, add_generation_prompt=add_generation_prompt
        )
    except jinja2.TemplateError as error:
        if conversations[0][0]['role'] != 'system':
            raise ValueError(f'the chat template fails: {error}') from error
        # If the template also fails without a system message, this call reports that failure.
        _render(tokenizer, [conversations[0][1:]], add_generation_prompt=add_generation_prompt)
        raise ValueError(
            f'the chat template rejects the system message ({error}): remove it, or move its text '
            'into the prompt template'
        ) from error
    return cast(list[str], texts)
