"""Which special tokens are part of texts, and stop strings that are special tokens."""

from collections.abc import Collection, Sequence

from grpo_jax.data.chat import closing_tag, find_tokens, turn_markers
from grpo_jax.data.template_variables import template_texts
from grpo_jax.data.tokenizers import Tokenizer


def hidden_ids(
    tokenizer: Tokenizer,
    ends: Collection[int],
    *,
    visible: Sequence[str] | None = None,
    texts: Sequence[str] = (),
) -> frozenset[int]:
    """Return the ids that are left out of texts: special tokens, and what ends a completion.

    Args:
      tokenizer: tokenizer of the model.
      ends: ids that end a completion, marked as special or not.
      visible: special tokens that are part of a text. None: those that the chat template or `texts`
        mention, such as `<think>`, `<answer>` or tags of tools, unless they only frame a turn of
        the conversation.
      texts: the prompt's template and system message.

    Raises:
      ValueError: `visible` has a token that the tokenizer lacks, or one that ends a completion.
    """
    special = _special_tokens(tokenizer)
    ids = frozenset(int(end) for end in ends)
    if visible is None:
        shown = {special[token] for token in _mentioned_tags(tokenizer, special, texts)} - ids
    else:
        vocabulary = tokenizer.get_vocab()
        for token in visible:
            if token not in vocabulary or vocabulary[token] in ids:
                fault = 'ends a completion' if token in vocabulary else 'is no token'
                raise ValueError(
                    f'data.visible_tokens={tuple(visible)}: {token!r} {fault}: remove it'
                )
        shown = {vocabulary[token] for token in visible}
    return frozenset(special.values()) - shown | ids


def stop_ids(
    tokenizer: Tokenizer, stop_strings: Sequence[str], hidden: Collection[int]
) -> list[int]:
    """Return the ids of the stop strings that are single tokens of the tokenizer's own.

    Raises:
      ValueError: a stop string has other characters beside a token that is left out of texts, so it
        would never be found.
    """
    added = {token.content: id for id, token in tokenizer.added_tokens_decoder.items()}
    for stop in stop_strings:
        inside = [token for token, id in added.items() if token in stop and id in hidden]
        if inside and stop not in added:
            raise ValueError(
                f'stop string {stop!r} contains the special token {inside[0]!r}, which is not part '
                f'of the text: use {inside[0]!r} alone, or list it in data.visible_tokens'
            )
    return [added[stop] for stop in stop_strings if stop in added]


def _special_tokens(tokenizer: Tokenizer) -> dict[str, int]:
    """Return the tokens that decoding leaves out, with their ids."""
    decoder = tokenizer.added_tokens_decoder
    return {token.content: id for id, token in decoder.items() if token.special}


def _mentioned_tags(
    tokenizer: Tokenizer, special: Collection[str], texts: Sequence[str]
) -> set[str]:
    """Return the special tokens in the templates that do not frame turns."""
    named = {value for value in tokenizer.special_tokens_map.values() if isinstance(value, str)}
    text = '\n'.join([*template_texts(tokenizer), *texts])
    mentioned = set(find_tokens(text, special))
    pairs = {token: closing_tag(token) for token in special}
    for opening, closing in pairs.items():  # a template may split a text at one of a pair
        if closing in special and mentioned & {opening, closing}:
            mentioned |= {opening, closing}
    return mentioned - named - turn_markers(tokenizer, special)
