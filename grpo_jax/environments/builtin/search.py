"""Search in a corpus of JSON lines as a tool, ranked by BM25 (Robertson and Zaragoza, 2009)."""

import functools
import json
import math
import os
import pathlib
import re
from collections import Counter
from collections.abc import Callable, Sequence

from grpo_jax import plugins

_WORD = re.compile(r'\w+')
_K1, _B = 1.5, 0.75  # how repetitions of a word saturate, and how much long texts are discounted


class Index:
    """An index of texts by their words.

    Args:
        texts: the documents.
    """

    def __init__(self, texts: Sequence[str]) -> None:
        self.texts = texts
        counts = [Counter(words(text)) for text in texts]
        lengths = [sum(count.values()) for count in counts]
        mean = sum(lengths) / max(len(lengths), 1) or 1.0
        self._postings: dict[str, list[tuple[int, float]]] = {}
        for number, (count, length) in enumerate(zip(counts, lengths, strict=True)):
            discount = _K1 * (1 - _B + _B * length / mean)
            for word, times in count.items():
                weight = times * (_K1 + 1) / (times + discount)
                self._postings.setdefault(word, []).append((number, weight))

    def best(self, query: str, k: int) -> list[int]:
        """Return the numbers of at most k documents with words of the query, the best first."""
        scores: Counter[int] = Counter()
        for word in set(words(query)):
            found = self._postings.get(word, ())
            rarity = math.log(1 + (len(self.texts) - len(found) + 0.5) / (len(found) + 0.5))
            for number, weight in found:
                scores[number] += rarity * weight  # type: ignore[assignment]
        return sorted(scores, key=lambda number: (-scores[number], number))[:k]


def search(
    *, corpus: str, k: int = 3, text: str = 'text', title: str = 'title', longest: int = 1000
) -> Callable[[str], str]:
    """Return the tool `search`.

    Args:
        corpus: path of a file of JSON lines; a relative one is relative to the config file.
        k: documents in a reply.
        text: key of a document's text.
        title: key of its title, which may be missing.
        longest: characters of a document in a reply.

    Raises:
        ValueError: the file is missing or empty, or a line of it has no text; names the line.
    """
    for name, value in (('k', k), ('longest', longest)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f'options.{name}={value!r}: give a whole number above 0')
    path = pathlib.Path((plugins.folders() or ['.'])[0], os.path.expanduser(corpus))
    if not path.is_file():
        raise ValueError(f'options.corpus={corpus!r}: no such file as {path}')
    index = _index(path, path.stat().st_mtime_ns, text, title)

    def search(query: str) -> str:
        """Search the documents for the words of a query.

        Args:
            query: Words to look for.

        Returns:
            The texts of the best documents.
        """
        numbers = index.best(query, k)
        found = [f'[{rank}] {index.texts[n][:longest]}' for rank, n in enumerate(numbers, 1)]
        return '\n'.join(found) or 'nothing found'

    return search


def words(text: str) -> list[str]:
    """Return the words of a text, in lower case."""
    return _WORD.findall(text.casefold())


@functools.lru_cache(maxsize=4)
def _index(path: pathlib.Path, changed: int, text: str, title: str) -> Index:
    """Return the index of a file, which is read again when it has changed."""
    return Index(_read(path, text, title))


def _read(path: pathlib.Path, text: str, title: str) -> list[str]:
    documents = []
    for number, line in enumerate(path.read_bytes().splitlines(), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise ValueError(f'options.corpus: {path}, line {number}: {error}') from error
        if not isinstance(row, dict) or not isinstance(row.get(text), str):
            raise ValueError(
                f'options.corpus: {path}, line {number} has no text {text!r}: name the key '
                'in options.text'
            )
        name = row.get(title)
        documents.append(f'{name}: {row[text]}' if name else row[text])
    if not documents:
        raise ValueError(f'options.corpus: {path} has no documents')
    return documents
