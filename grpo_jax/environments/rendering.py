"""Messages of an environment as the tokens that the policy reads next."""

import functools
from collections.abc import Callable, Collection, Sequence
from typing import Any, TypeAlias

from grpo_jax.data import Tokenizer, turn_end
from grpo_jax.data.chat import render
from grpo_jax.data.literal_text import LiteralText
from grpo_jax.data.template_variables import template_texts
from grpo_jax.environments.turns import Message

_QUESTION, _ANSWER = 'the-words-of-the-user', 'the-words-of-the-assistant'
_REPLY = 'the-words-of-the-tool'
_CHARACTERS_PER_TOKEN = 16  # at most, of a reply that has to be cut

Messages: TypeAlias = Sequence[Message]
Form: TypeAlias = Callable[[Messages], list[dict[str, Any]]]  # a reply as part of a conversation


class Renderer:
    """Renders replies, so that the policy's own tokens stay what they are.

    With a chat template, a reply is what the template writes after the words of the assistant in a
    conversation that goes on with the reply: it is rendered with other words in their place, which
    are left out again with all before them. Templates that treat thoughts of earlier turns in
    another way have so no influence. A template that has no place for the role 'tool' gets the
    reply from the user.

    Special tokens that a reply spells do not become tokens.

    Args:
        tokenizer: of the model, with the variables of its template bound.
        chat: the prompts are rendered by the chat template.
        template: of a reply without a chat template, with `{reply}`.
        hidden: ids that are never part of a text, see `data.hidden_ids`.

    Raises:
        ValueError: the template has no `{reply}`, or the chat template fails or leaves the reply
            out.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        *,
        chat: bool,
        template: str = '\n{reply}\n',
        hidden: Collection[int] = (),
    ) -> None:
        self._tokenizer, self._chat, self._template = tokenizer, chat, template
        self._literal = LiteralText(tokenizer, _literal_ids(tokenizer) | {*hidden})
        if not chat:
            if template.count('{reply}') != 1:
                raise ValueError(f"template={template!r}: write '{{reply}}' in it, once")
            return
        self._ending, end = turn_end(tokenizer)
        self._end_token = str(tokenizer.convert_ids_to_tokens(end))
        self._conversations = _working_form(self._after_answer)

    def tokens(self, messages: Messages, *, ended_by_eos: bool) -> list[int]:
        """Return the tokens that follow a turn of the policy.

        Args:
            messages: the reply.
            ended_by_eos: the turn ends with the token that ends turns. Otherwise the chat template
                writes it first.
        """
        marked = [m | {'content': self._literal.mark(m['content'])} for m in messages]
        if not self._chat:
            reply = '\n'.join(message['content'] for message in marked)
            before, _, after = self._template.partition('{reply}')
            text = f'{before}{reply}{after}'
        else:
            between, text = self._after_answer(self._conversations(marked))
            if not ended_by_eos and between is not None:
                text = f'{self._ending}{self._end_token}{text}'
        return self._literal.encode([text], add_special_tokens=False)[0]

    def fit(
        self, messages: Messages, *, ended_by_eos: bool, longest: int
    ) -> tuple[list[int], bool]:
        """Return at most `longest` tokens that follow a turn, and whether the reply was cut.

        The contents of the messages are cut, never what the template writes around them; messages
        for which there is no room at all are left out from the end.

        Raises:
            ValueError: what the template writes around an empty reply is longer.
        """

        def cut(characters: int, count: int) -> list[int]:
            shorter = [m | {'content': m['content'][:characters]} for m in messages[:count]]
            return self.tokens(shorter, ended_by_eos=ended_by_eos)

        most = longest * _CHARACTERS_PER_TOKEN
        if sum(len(message['content']) for message in messages) <= most:
            whole = self.tokens(messages, ended_by_eos=ended_by_eos)
            if len(whole) <= longest:
                return whole, False
        for count in range(len(messages), 0, -1):
            best, low, high = cut(0, count), 0, most
            if len(best) > longest:
                continue
            while high - low > 1:
                middle = (low + high) // 2
                shorter = cut(middle, count)
                if len(shorter) <= longest:
                    best, low = shorter, middle
                else:
                    high = middle
            return best, True
        raise ValueError(f'{longest} tokens are too few for a reply by the template')

    def check(self, longest: int) -> None:
        """Raise ValueError if a reply of so many tokens has no room for any text."""
        empty = {'role': 'tool', 'name': 'tool', 'content': ''}
        least = len(self.tokens([empty], ended_by_eos=False))
        if longest <= least:
            raise ValueError(
                f'environment.reply_tokens={longest}: the template writes {least} tokens around a '
                'reply: raise it'
            )

    def _after_answer(self, conversation: list[dict[str, Any]]) -> tuple[str | None, str]:
        """Return what the template writes after the assistant's words.

        Returns:
            The part up to the token that ends the turn, None if there is no such token, and the
            part after that token.
        """
        (text,) = render(self._tokenizer, [conversation], add_generation_prompt=True)
        rest = text.partition(_ANSWER)[2]
        between, end, after = rest.partition(self._end_token)
        return (between, after) if end else (None, rest)


def _literal_ids(tokenizer: Tokenizer) -> frozenset[int]:
    """Return the ids of special tokens and of those that the chat template mentions."""
    templates = '\n'.join(template_texts(tokenizer))
    return frozenset(
        id
        for id, token in tokenizer.added_tokens_decoder.items()
        if token.special or (token.content.strip() and token.content in templates)
    )


def _after_text(messages: Messages) -> list[dict[str, Any]]:
    """A reply to the assistant's text."""
    return [*_exchange(), *map(dict, messages)]


def _after_calls(messages: Messages) -> list[dict[str, Any]]:
    """A reply to calls that the assistant has made, which some templates insist on."""
    ids = [f'call{number:05d}' for number in range(len(messages))]
    calls = [
        {'id': id, 'type': 'function', 'function': {'name': m.get('name', ''), 'arguments': {}}}
        for id, m in zip(ids, messages, strict=True)
    ]
    question, answer = _exchange()
    replies = [dict(m) | {'tool_call_id': id} for id, m in zip(ids, messages, strict=True)]
    return [question, answer | {'tool_calls': calls}, *replies]


def _from_user(messages: Messages) -> list[dict[str, Any]]:
    """A reply in one message of the user."""
    content = '\n'.join(message['content'] for message in messages)
    return [*_exchange(), {'role': 'user', 'content': content}]


def _by_role(form: Form, messages: Messages) -> list[dict[str, Any]]:
    """A reply of tools in this form, and one of the user in the other."""
    return form(messages) if messages[0]['role'] == 'tool' else _from_user(messages)


def _exchange() -> list[dict[str, Any]]:
    return [{'role': 'user', 'content': _QUESTION}, {'role': 'assistant', 'content': _ANSWER}]


def _working_form(
    render_after: Callable[[list[dict[str, Any]]], tuple[str | None, str]],
) -> Form:
    """Return how a reply becomes a conversation that the template renders as a whole.

    Raises:
        ValueError: the template leaves out a reply in any form.
    """

    def works(form: Form, message: Message) -> bool:
        between, after = render_after(form([message]))
        return _REPLY in after and (form is not _after_calls or between is not None)

    error: ValueError | None = None
    for form in (_after_text, _after_calls):
        try:
            if works(form, {'role': 'tool', 'name': 'tool', 'content': _REPLY}):
                return functools.partial(_by_role, form)
        except ValueError:
            continue
    try:
        if works(_from_user, {'role': 'user', 'content': _REPLY}):
            return _from_user
    except ValueError as failed:
        error = failed
    raise ValueError(
        'the chat template leaves out what comes after a turn of the assistant, so no environment '
        f'can reply{f": {error}" if error else ""}: use another template'
    ) from error
