"""Python values as JSON, so that tests and the tested program exchange plain data.

What is decoded is a value of exactly one of the types below, whose `==` and other methods are those
of Python: a subclass, and with it every method of the sender's own, is left behind. None, booleans,
texts, finite floats, lists and integers below 2^63 are JSON's own; any other value is an object
with one key, the name of its type.
"""

import collections
import collections.abc
import datetime
import itertools
from collections.abc import Callable, Iterator
from decimal import Decimal
from fractions import Fraction
from typing import Any

MAX_ITEMS = 100_000  # of an iterator
_SMALL = 2**63
_MAX_DIGITS = 1000  # of a decimal number


class ValueCodeError(Exception):
    """A value cannot be sent, or a message does not spell a value."""


def encode(value: Any, refer: Callable[[Any], Any]) -> Any:
    """Return a value as JSON.

    Args:
        value: a value. A subclass of a type is sent as that type, an iterator as its items.
        refer: called with an object of any other type; returns what is sent as its reference, or
            raises ValueCodeError.

    Raises:
        ValueCodeError: an iterator has more than `MAX_ITEMS` items, or `refer` raises it.
        RecursionError: a container is nested too deeply or contains itself.
    """
    if value is None or isinstance(value, bool):
        return value
    for kind, write in _WRITERS:
        if isinstance(value, kind):
            return write(value, lambda item: encode(item, refer))
    return {'reference': refer(value)}


def decode(code: Any, resolve: Callable[[Any], Any]) -> Any:
    """Return the value that JSON spells.

    Args:
        code: what `encode` has returned, or anything else.
        resolve: called with a reference; returns what stands for it.

    Raises:
        ValueCodeError: it spells no value.
    """
    try:
        return _decode(code, resolve)
    except ValueCodeError:
        raise
    except (TypeError, ValueError, ArithmeticError, RecursionError) as error:
        raise ValueCodeError(f'not the code of a value: {error}') from error


def _decode(code: Any, resolve: Callable[[Any], Any]) -> Any:
    if code is None or isinstance(code, bool | int | float | str):
        return code
    if isinstance(code, list):
        return [_decode(item, resolve) for item in code]
    if len(code) != 1:
        raise ValueCodeError(f'not the code of a value: {len(code)} keys')
    ((kind, body),) = code.items()
    if kind == 'reference':
        return resolve(body)
    if kind not in _READERS:
        raise ValueCodeError(f'not the code of a value: {kind!r:.40}')
    return _READERS[kind](_decode(body, resolve))


def _write_float(value: float, item: Any) -> Any:
    plain = float.__float__(value)
    return plain if abs(plain) < float('inf') else {'float': repr(plain)}


def _write_int(value: int, item: Any) -> Any:
    plain = int.__int__(value)
    return plain if -_SMALL < plain < _SMALL else {'int': hex(plain)}


def _write_items(kind: str) -> Callable[[Any, Any], Any]:
    return lambda value, item: {kind: [item(each) for each in value]}


def _write_pairs(kind: str) -> Callable[[Any, Any], Any]:
    return lambda value, item: {kind: [[item(key), item(each)] for key, each in value]}


def _write_iterator(value: Iterator[Any], item: Any) -> Any:
    items = list(itertools.islice(value, MAX_ITEMS + 1))
    if len(items) > MAX_ITEMS:
        raise ValueCodeError(f'an iterator of more than {MAX_ITEMS} items')
    return {'iterator': [item(each) for each in items]}


def _dict(pairs: list[list[Any]]) -> dict[Any, Any]:
    return dict([(key, value) for key, value in pairs])


def _decimal(text: str) -> Decimal:
    if len(text) > _MAX_DIGITS:
        raise ValueCodeError(f'a decimal number of {len(text)} digits')
    return Decimal(text)


# In this order: a datetime is a date.
_WRITERS: tuple[tuple[Any, Callable[[Any, Any], Any]], ...] = (
    (int, _write_int),
    (float, _write_float),
    (str, lambda value, item: str.__str__(value)),
    (list, lambda value, item: [item(each) for each in value]),
    (tuple, _write_items('tuple')),
    (dict, lambda value, item: _write_pairs('dict')(dict.items(value), item)),
    (set, _write_items('set')),
    (frozenset, _write_items('frozenset')),
    (complex, lambda value, item: {'complex': [item(value.real), item(value.imag)]}),
    (bytes, lambda value, item: {'bytes': value.hex()}),
    (bytearray, lambda value, item: {'bytearray': value.hex()}),
    (range, lambda value, item: {'range': [value.start, value.stop, value.step]}),
    (collections.deque, _write_items('deque')),
    (type({}.keys()), _write_items('dict_keys')),
    (type({}.values()), _write_items('dict_values')),
    (type({}.items()), _write_pairs('dict_items')),
    (Decimal, lambda value, item: {'Decimal': str(value)}),
    (Fraction, lambda value, item: {'Fraction': [item(value.numerator), item(value.denominator)]}),
    (datetime.datetime, lambda value, item: {'datetime': value.isoformat()}),
    (datetime.date, lambda value, item: {'date': value.isoformat()}),
    (datetime.time, lambda value, item: {'time': value.isoformat()}),
    (
        datetime.timedelta,
        lambda value, item: {'timedelta': [value.days, value.seconds, value.microseconds]},
    ),
    (collections.abc.Iterator, _write_iterator),
)  # fmt: skip
_READERS: dict[str, Callable[[Any], Any]] = {
    'int': lambda text: int(text, 16),
    'float': float,
    'tuple': tuple,
    'dict': _dict,
    'set': set,
    'frozenset': frozenset,
    'complex': lambda parts: complex(*parts),
    'bytes': bytes.fromhex,
    'bytearray': bytearray.fromhex,
    'range': lambda parts: range(*parts),
    'deque': collections.deque,
    'dict_keys': lambda items: dict.fromkeys(items).keys(),
    'dict_values': lambda items: dict(enumerate(items)).values(),
    'dict_items': lambda pairs: _dict(pairs).items(),
    'Decimal': _decimal,
    'Fraction': lambda parts: Fraction(*parts),
    'datetime': datetime.datetime.fromisoformat,
    'date': datetime.date.fromisoformat,
    'time': datetime.time.fromisoformat,
    'timedelta': lambda parts: datetime.timedelta(*parts),
    'iterator': iter,
}
