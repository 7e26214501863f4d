"""Chat templates: render prompts, and find how a template frames messages."""

import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any, cast

from grpo_jax.data.tokenizers import Tokenizer

_PLACEHOLDER = 'the-words-of-the-assistant'  # the assistant's message when a template is probed
_QUESTION = 'the-words-of-the-user'

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
    prompts = render(tokenizer, conversations, add_generation_prompt=True)
    if prefix and conversations:
        without_system = render(tokenizer, [conversations[0][1:]], add_generation_prompt=True)
        if prompts[0] == without_system[0]:
            raise ValueError(
                f'the chat template ignores the system message {system!r}: write it into the '
                'prompt template'
            )
    return prompts


def conversation_prompts(
    tokenizer: Tokenizer, conversations: Sequence[Sequence[Mapping[str, Any]]]
) -> list[str]:
    """Render conversations by the tokenizer's chat template, up to what the assistant writes next.

    Where the last message is the assistant's, the prompt ends with it, so a completion continues
    it.

    Args:
      tokenizer: tokenizer with a chat template.
      conversations: lists of messages, see `conversations.prompt_of`.

    Raises:
      ValueError: there is no chat template, it fails, or it leaves out a message; names the row.
    """
    prompts = []
    for row, messages in enumerate(conversations):
        continues = messages[-1]['role'] == 'assistant'
        try:
            (text,) = render(
                tokenizer,
                [list(messages)],
                add_generation_prompt=not continues,
                continue_final_message=continues,
            )
        except ValueError as error:
            raise ValueError(f'row {row}: {error}') from error
        for message in messages:
            if message['role'] in ('system', 'user') and message['content'].strip() not in text:
                raise ValueError(
                    f'row {row}: the chat template leaves out the message {message!r:.80}: use '
                    'another template, or change the conversation'
                )
        prompts.append(text)
    return prompts


def turn_end(tokenizer: Tokenizer) -> tuple[str, int]:
    """Return how the chat template ends a message of the assistant.

    Returns:
      The text between the message and its end token, and the id of the end token. That is the first
      token of the tokenizer's own after the message, such as `<|im_end|>`, whether it is marked as
      special or not; or the tokenizer's end-of-sequence token if the template writes none.

    Raises:
      ValueError: there is no chat template, or it fails or ignores the assistant's message.
    """
    conversation = [
        {'role': 'user', 'content': 'x'},
        {'role': 'assistant', 'content': _PLACEHOLDER},
    ]
    (text,) = render(tokenizer, [conversation], add_generation_prompt=False)
    _, placeholder, ending = text.rpartition(_PLACEHOLDER)
    if not placeholder:
        raise ValueError("the chat template ignores the assistant's message: use another one")
    found = find_tokens(ending, _control_tokens(tokenizer, ending))
    if not found:
        return '', tokenizer.eos_token_id
    return ending[: ending.index(found[0])], tokenizer.get_vocab()[found[0]]


def turn_markers(tokenizer: Tokenizer, tokens: Collection[str]) -> set[str]:
    """Return which tokens the chat template writes around messages, without tags of reasoning.

    A pair such as `<think>` and `</think>` before the assistant's words belongs to the message. If
    the template cannot be rendered, all tokens are returned.
    """
    if not tokenizer.chat_template:
        return set()
    question, answer = {'role': 'user', 'content': _QUESTION}, _PLACEHOLDER
    conversation = [question, {'role': 'assistant', 'content': answer}, question]
    try:
        (text,) = render(tokenizer, [conversation], add_generation_prompt=False)
    except ValueError:
        return set(tokens)
    header = text.partition(_QUESTION)[2].partition(answer)[0]
    before_answer = find_tokens(header, tokens)
    pairs = {t for t in before_answer if closing_tag(t) in before_answer[before_answer.index(t) :]}
    return {*find_tokens(text, tokens)} - pairs - {closing_tag(token) for token in pairs}


def closing_tag(token: str) -> str:
    """Return the token that closes a tag: `</think>` for `<think>`, `[/THINK]` for `[THINK]`."""
    return f'{token[:1]}/{token[1:]}'


def find_tokens(text: str, tokens: Collection[str]) -> list[str]:
    """Return the tokens in a text in their order; where several begin, the longest."""
    longest_first = sorted(filter(None, tokens), key=len, reverse=True)
    return re.findall('|'.join(map(re.escape, longest_first)), text) if longest_first else []


def _control_tokens(tokenizer: Tokenizer, ending: str) -> list[str]:
    """Return the tokens that may end a turn.

    Those are the special tokens, and of the others what is neither white space nor a closing tag
    such as `</think>`: added tokens, and `<...>` in the text if it is in the vocabulary.
    """
    added = tokenizer.added_tokens_decoder.values()
    special = [token.content for token in added if token.special]
    others = [token.content for token in added] + re.findall(r'<[^<>\s]+>', ending)
    vocabulary = tokenizer.get_vocab()
    return special + [
        token for token in others if token.strip() and token[1:2] != '/' and token in vocabulary
    ]


def render(
    tokenizer: Tokenizer,
    conversations: Sequence[Sequence[Mapping[str, Any]]],
    *,
    add_generation_prompt: bool,
    continue_final_message: bool = False,
) -> list[str]:
    """Render conversations by the tokenizer's chat template.

    Raises:
      ValueError: there is no chat template, or it fails.
    """
    if not tokenizer.chat_template:
        raise ValueError(
            f'tokenizer {tokenizer.name_or_path or "bytes"!r} has no chat template: set '
            'data.chat=False, or use the tokenizer of a chat model'
        )
    try:
        import jinja2
    except ImportError as error:
        raise ValueError('chat templates need jinja2: pip install jinja2') from error
    try:
        texts = tokenizer.apply_chat_template(
            cast(Any, conversations),
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=continue_final_message,
        )
    except jinja2.TemplateError as error:
        if conversations[0][0]['role'] != 'system':
            raise ValueError(f'the chat template fails: {error}') from error
        # If the template also fails without a system message, this call reports that failure.
        render(
            tokenizer,
            [conversations[0][1:]],
            add_generation_prompt=add_generation_prompt,
            continue_final_message=continue_final_message,
        )
        raise ValueError(
            f'the chat template rejects the system message ({error}): remove it, or move its text '
            'into the prompt template'
        ) from error
    except (AttributeError, KeyError, TypeError) as error:  # in expressions of the template
        raise ValueError(f'the chat template fails: {type(error).__name__}: {error}') from error
    return cast(list[str], texts)
