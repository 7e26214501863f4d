"""The values of columns: read from JSON, and written as text in prompts and files.

A value is what JSON can say: text, a number, a boolean, None, a list or a dictionary.
"""

import json
from typing import Any


class SpelledFloat(float):
    """A number that is printed as its file spells it, such as `0.10` or `1E5`."""

    text: str

    def __new__(cls, text: str) -> 'SpelledFloat':
        """Make the number that `text` spells."""
        number = super().__new__(cls, text)
        number.text = text
        return number

    def __getnewargs__(self) -> Any:  # for copies
        return (self.text,)

    def __repr__(self) -> str:
        return self.text

    def __format__(self, spec: str) -> str:
        return format(float(self), spec) if spec else self.text


def parse_json(text: str | bytes) -> Any:
    """Parse JSON; a number keeps its spelling where Python would write it in another way.

    Raises:
      ValueError: it is not JSON.
    """
    if isinstance(text, bytes):
        text = text.decode(json.detect_encoding(text), 'surrogatepass')
    try:
        return _decode(text)
    except RecursionError as error:
        raise ValueError('it is nested too deeply') from error


def json_text(value: Any) -> str:
    """Return a value as JSON, with numbers in the spelling of their file.

    Raises:
      TypeError: it is not a value of JSON, such as a date or bytes.
    """
    if isinstance(value, SpelledFloat):
        return value.text
    if isinstance(value, list | tuple):
        return f'[{", ".join(map(json_text, value))}]'
    if isinstance(value, dict):
        items = (f'{_encode(str(k))}: {json_text(x)}' for k, x in value.items())
        return f'{{{", ".join(items)}}}'
    return _encode(value)


def text_of(value: Any) -> str:
    """Return a text as it is, and any other value as JSON."""
    return value if isinstance(value, str) else json_text(value)


def _parse_float(text: str) -> float:
    number = float(text)
    return number if repr(number) == text else SpelledFloat(text)


# `json.loads` and `json.dumps` make a new decoder and encoder for each call with an option.
_decode = json.JSONDecoder(parse_float=_parse_float).decode
_encode = json.JSONEncoder(ensure_ascii=False).encode
