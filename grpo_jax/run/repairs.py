"""Finds all problems of a config: after one of them the checks go on with a repaired config."""

import functools
import re
from collections.abc import Callable, Collection, Iterable, Iterator
from typing import Any, TypeVar

from ml_collections import ConfigDict

from grpo_jax.run.config import flatten, set_value
from grpo_jax.run.defaults import FREE, at, defaults
from grpo_jax.run.errors import problems_of

T = TypeVar('T')

# Without the right values of these keys nothing can be told of the tokens of the data set.
OF_TOKENS = (
    'tokenizer', 'pretrained', 'start', 'data.name', 'data.prompt', 'data.chat', 'data.system',
)  # fmt: skip

_FIRST = re.compile(r'([\w.]+)(?:(?:: | )(\w+)=)?')  # 'a.b=', 'a.b names' or 'a.b: c='
_SHORT = re.compile(r'(?<![\w.-])(\w+)=')


class Finder:
    """Runs checks on a config, and repairs what they find wrong before it goes on.

    A message that begins with a key is about the key: the key is set to its default, an entry of a
    dictionary in `FREE` or an item of a tuple is removed, and the check runs again. If that is not
    the culprit, another key of the same section is, which the message names; and where that cannot
    be, the only other key that the message names. A message that names a repaired key may be about
    the repair, and is left out.

    Args:
      config: with every key of `defaults()`.
      known: messages about the command line and the config file. Keys that they quote and that
        have their defaults stand for something wrong: values of the wrong type, or what an unknown
        key was meant for.

    Attributes:
      config: the config with its repairs; the given one is not changed.
      problems: the messages.
      repaired: the keys that have their defaults in the place of something wrong.
      doubtful: keys that may, because an unknown section was meant for theirs.
      shortened: dictionaries and tuples of which something was removed.
    """

    def __init__(self, config: ConfigDict, known: Iterable[str] = ()) -> None:
        self.config, self.problems = config, list[str]()
        quoted = {name for text in known for name in _quoted(text)}
        values = flatten(config) if quoted else {}
        unset = {
            key for key, x in flatten(defaults()).items() if key in values and values[key] == x
        }
        self.repaired = unset & quoted
        self.doubtful = {key for key in unset if any(key.startswith(f'{q}.') for q in quoted)}
        self.shortened = set[str]()
        self._copied = False

    def run(self, check: Callable[[ConfigDict], T], *, unless: Iterable[str] = ()) -> T | None:
        """Runs a check until it finds nothing more.

        Args:
          check: takes the config; raises a ValueError or OSError for problems.
          unless: keys that the check cannot do without; it is skipped if one of them is repaired.

        Returns:
          What the check returns; None if it fails or is skipped.
        """
        while self.repaired.isdisjoint(unless):
            try:
                return check(self.config)
            except (ValueError, OSError) as error:
                messages = problems_of(error)
            self.add(messages)
            if not any([self._repair(text) for text in messages]):
                return None
        return None

    def add(self, messages: Iterable[str]) -> None:
        """Adds messages, but those that are known or may be about a repair."""
        for text in messages:
            if text not in self.problems and not self._follows(text):
                self.problems.append(text)

    def remove(self, key: str, wrong: Collection[Any]) -> bool:
        """Removes entries of a dictionary, or items of a tuple; returns whether there are any."""
        value = at(self.config, key)
        left: Any = tuple(x for x in value if x not in wrong)
        if key in FREE:
            left = {name: value[name] for name in left}
        if len(left) == len(value):
            return False
        self._set(key, left)
        self.shortened.add(key)
        if not left:
            self.repaired.add(key)
        return True

    def _follows(self, text: str) -> bool:
        """Whether a message may be about a repair."""
        if any(text.startswith(f'{key}: ') for key in self.shortened):
            return True  # no entry is named: it is about one that is left out
        first = _first_key(text)
        return first in self.doubtful or not self.repaired.isdisjoint(_keys_in(text))

    def _repair(self, text: str) -> bool:
        """Changes the config so that a message does not hold; returns whether it could."""
        key = _first_key(text)
        if key is not None and self._remove_item(key, text):
            return True
        keys = [] if key is None else [key, *_of_section(key, text)]
        others = _keys_in(text) - {key}
        if len(others) == 1 and (key is None or key in self.repaired):
            keys += others
        return any(self._reset(other) for other in keys)

    def _remove_item(self, key: str, text: str) -> bool:
        """Removes the entry of a dictionary, or the items of a tuple, that a message names."""
        value = at(self.config, key)
        if isinstance(value, tuple):
            return self.remove(key, [item for item in value if f' names {item!r}' in text])
        if key not in FREE:
            return False
        wrong = [name for name in value if text.startswith(f'{key}.{name}')]
        return self.remove(key, sorted(wrong, key=len)[-1:])

    def _reset(self, key: str) -> bool:
        """Sets a key to its default; returns whether that changes it."""
        default = flatten(defaults())[key]
        done = self.repaired | self.shortened
        if key in done or flatten(self.config)[key] == default:
            return False
        self._set(key, default)
        self.repaired.add(key)
        return True

    def _set(self, key: str, value: Any) -> None:
        if not self._copied:
            self.config, self._copied = self.config.copy_and_resolve_references(), True
        set_value(self.config, key, value)


@functools.cache
def _known_keys() -> tuple[str, ...]:
    return tuple(flatten(defaults()))


def _first_key(message: str) -> str | None:
    """The key that a message begins with, also as 'section: name='; None if it begins with none."""
    known, match = _known_keys(), _FIRST.match(message)
    for key in (f'{match[1]}.{match[2]}', match[1]) if match else ():
        if key in known and ('.' in key or _is_named(key, message)):
            return key
    return next((path for path in FREE if message.startswith(f'{path}.')), None)


def _is_named(key: str, message: str) -> bool:
    """Whether a message begins with a key without a section, which is a word too: 'start the …'."""
    return bool(re.match(rf"{key}(=| is |:? ['\"])", message))


def _quoted(message: str) -> Iterator[str]:
    """What a message quotes, and the keys of `--config.key=value` in it."""
    for match in re.finditer(r"'([\w.]+)'|--config\.([\w.]+)=", message):
        yield match[1] or match[2]


def _keys_in(message: str) -> set[str]:
    """The keys that a message names: by their paths, or as 'name=' of some section."""
    known = _known_keys()
    keys = {
        key for key in known
        if '.' in key and re.search(rf'(?<![\w.]){re.escape(key)}(?!\w|\.\w)', message)
    }  # fmt: skip
    key = _first_key(message)
    if key is not None:
        keys.add(key)
    section = key.partition('.')[0] if key else ''
    for name in _SHORT.findall(message):
        matching = [k for k in known if k == name or k.endswith(f'.{name}')]
        keys |= {k for k in matching if k.startswith(f'{section}.')} or set(matching)
    return keys


def _of_section(key: str, message: str) -> Iterator[str]:
    """The other keys of a key's own section that a message names as 'name='."""
    section = key.rpartition('.')[0]
    for name in _SHORT.findall(message):
        other = f'{section}.{name}'
        if section and other != key and other in _known_keys():
            yield other
