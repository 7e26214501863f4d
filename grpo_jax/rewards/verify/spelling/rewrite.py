"""One rewrite of a spelling: an example, and the pattern and replacement that make it."""

import re
from collections.abc import Callable
from typing import NamedTuple

BRACED = r'\{(?:[^{}]|\{(?:[^{}]|\{[^{}]*\})*\})*\}'  # an argument with at most three braces inside


class Rewrite(NamedTuple):
    """A rewrite of text. Applied to `before`, it gives `after`.

    Every match contains the string `needs`. To look for it first is faster than to search for the
    pattern in every text.
    """

    before: str
    after: str
    pattern: re.Pattern[str]
    replacement: str | Callable[[re.Match[str]], str]
    needs: str

    def __call__(self, text: str) -> str:
        return self.pattern.sub(self.replacement, text) if self.needs in text else text


def rewrite(
    before: str,
    after: str,
    pattern: str,
    replacement: str | Callable[[re.Match[str]], str],
    *,
    needs: str = '',
) -> Rewrite:
    """Make a rewrite from an example, a pattern, its replacement and what a match contains."""
    return Rewrite(before, after, re.compile(pattern), replacement, needs)
