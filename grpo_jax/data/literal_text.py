"""Keeps special tokens that the text of a row spells out from becoming tokens.

Such text is marked before a chat template renders it, so that the tokens of the template stay what
they are, and is encoded as ordinary text after that.
"""

import re
from collections.abc import Collection, Sequence
from typing import Any

from grpo_jax.data.tokenizers import Tokenizer

_OPEN, _CLOSE = '\U000f0000', '\U000f0001'  # characters for private use
_MARK = re.compile(f'{_OPEN}([0-9]+){_CLOSE}')


class LiteralText:
    """Marks and encodes texts that spell special tokens.

    Args:
      tokenizer: tokenizer of the model.
      ids: of the tokens.
    """

    def __init__(self, tokenizer: Tokenizer, ids: Collection[int]) -> None:
        decoder = tokenizer.added_tokens_decoder
        self._tokenizer, self._ids = tokenizer, frozenset(ids)
        self._tokens = sorted({decoder[i].content for i in ids if i in decoder}, key=len)[::-1]
        spelled = '|'.join(map(re.escape, filter(None, self._tokens)))
        self._spelled = re.compile(spelled) if spelled else None

    def mark(self, value: Any) -> Any:
        """Return a value with marks in the place of tokens in its texts, at any depth."""
        if isinstance(value, str):
            return value if self._spelled is None else self._spelled.sub(self._mark_of, value)
        if isinstance(value, dict):
            return {key: self.mark(item) for key, item in value.items()}
        return [self.mark(item) for item in value] if isinstance(value, list | tuple) else value

    def find(self, texts: Sequence[str]) -> list[str]:
        """Return the first token that each text spells, of those that spell one."""
        found = (self._spelled.search(text) for text in texts) if self._spelled else ()
        return [match[0] for match in found if match]

    def encode(self, texts: Sequence[str], *, add_special_tokens: bool) -> list[list[int]]:
        """Return the token ids of texts with marks.

        Raises:
          ValueError: the tokenizer cannot read a token as text.
        """
        if not self._tokens:
            return list(
                self._tokenizer(list(texts), add_special_tokens=add_special_tokens).input_ids
            )
        plain = [text for text in texts if _OPEN not in text]
        encoded = iter(
            self._tokenizer(plain, add_special_tokens=add_special_tokens).input_ids if plain else ()
        )
        return [
            self._encode_marked(text, add_special_tokens) if _OPEN in text else next(encoded)
            for text in texts
        ]

    def _encode_marked(self, text: str, add_special_tokens: bool) -> list[int]:
        ids: list[int] = []
        for number, part in enumerate(_MARK.split(text)):  # text, index of a token, text, ...
            if number % 2:
                ids += self._encode_token(self._tokens[int(part) % len(self._tokens)])
            elif part or not number:
                first = add_special_tokens and not number
                ids += self._tokenizer(part, add_special_tokens=first).input_ids
        return ids

    def _encode_token(self, token: str) -> list[int]:
        options: dict[str, Any] = {'add_special_tokens': False, 'split_special_tokens': True}
        # Tokens that are added but not special are text in parts alone.
        for parts in ([token], [token[:1], token[1:]]):
            ids = [id for part in parts for id in self._tokenizer(part, **options).input_ids]
            if not self._ids & {*ids}:
                return ids
        raise ValueError(
            f'a row contains the special token {token!r} in its text, and the tokenizer cannot '
            'read it as text: change the row'
        )

    def _mark_of(self, match: re.Match[str]) -> str:
        return f'{_OPEN}{self._tokens.index(match[0])}{_CLOSE}'
