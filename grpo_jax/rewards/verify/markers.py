r"""Where a completion has its answer: after its thought, in `<answer>` tags, in `\boxed{…}`."""

import re

_BOX = re.compile(
    r'\\(?:boxed|fbox|framebox)(?![A-Za-z])\s*+(?:(?P<open>\{)|(?P<bare>[+-]?[0-9.][^\s{}$\\]*+))'
    r'|\\[{}]|(?P<brace>[{}])'
)


def last_boxed(text: str) -> str | None:
    r"""Return the content of the last `\boxed{…}`; None if there is none or it is never closed.

    `\fbox{…}` and `\framebox{…}` are boxes too. There may be a space before the brace. `\boxed 5`
    has a number without braces.
    """
    spans = _box_spans(text)
    if not spans:
        return None
    start, end = spans[-1]
    return None if end is None else text[start:end]


def all_boxed(text: str) -> list[str]:
    r"""Return the contents of all closed `\boxed{…}` in order, of the inner one of nested ones."""
    closed = [(start, end) for start, end in _box_spans(text) if end is not None]
    starts = [start for start, _ in closed[1:]] + [len(text)]
    return [text[s:e] for (s, e), after in zip(closed, starts, strict=False) if e <= after]


def answer_tag(text: str) -> str | None:
    """Return the content of the last `<answer>…</answer>`, or None."""
    before, _, _ = text.rpartition('</answer>')
    _, opening, content = before.rpartition('<answer>')
    return content if opening else None


def final_part(text: str) -> tuple[str, bool]:
    """Return the text after the thought, in its answer tags if any, and whether it has them."""
    rest = text.rpartition('</think>')[2]
    text = rest if rest.strip() else text
    tagged = answer_tag(text)
    return (text, False) if tagged is None or not tagged.strip() else (tagged, True)


def _box_spans(text: str) -> list[tuple[int, int | None]]:
    """Return start and end of the content of each box, in order of the starts; None: not closed."""
    spans: list[tuple[int, int | None]] = []
    braces: list[int | None] = []  # that are open: the index of the box, None for others
    for token in _BOX.finditer(text):
        if token['open']:
            braces.append(len(spans))
            spans.append((token.end(), None))
        elif token['bare']:
            spans.append(token.span('bare'))
        elif token['brace'] == '{':
            braces.append(None)
        elif token['brace'] and braces and (box := braces.pop()) is not None:
            spans[box] = (spans[box][0], token.start())
    return spans
