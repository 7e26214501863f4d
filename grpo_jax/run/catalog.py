"""What a config can name, with descriptions from the code: methods, rewards, prompt formats.

`--help=presets` and the like print it, and the documentation shows the same as tables.
"""

import ast
import inspect
import textwrap
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from grpo_jax.algorithm import presets
from grpo_jax.data import FORMATS
from grpo_jax.rewards import registry
from grpo_jax.run.comments import Source, first_paragraph
from grpo_jax.run.methods import RUN_KEYS

# What a function gets for every completion, in addition to the columns of the data.
_GIVEN = ('prompts', 'completions', 'completion_ids', 'text', 'completion')


class Listing(NamedTuple):
    """A table in Markdown: the first cell of a row is a name."""

    header: Sequence[str]
    rows: Sequence[Sequence[str]]


def preset_listing() -> Listing:
    """Every preset: its options of `Algorithm`, what a config has beside them, and its source."""
    source = Source(presets)
    assigned = {target: value for target, value, _ in source.assignments()}
    table_of_presets = assigned['PRESETS']
    assert isinstance(table_of_presets, ast.Dict)
    comments = source.items(table_of_presets)
    rows = []
    for name, options in presets.PRESETS.items():
        beside = {f'grpo.{key}': value for key, value in RUN_KEYS.get(name, {}).items()}
        rows.append((f'`{name}`', _settings(options), _settings(beside), comments.get(name, '')))
    return Listing(('preset', 'options of `Algorithm`', 'in a config also', 'source'), rows)


def convention_listing() -> Listing:
    """The conventions of other code bases."""
    rows = [(f'`{name}`', _settings(options)) for name, options in presets.CONVENTIONS.items()]
    return Listing(('name', 'options of `Algorithm`'), rows)


def format_listing() -> Listing:
    """The prompt formats."""
    rows = [
        (f'`{name}`', code(form.user), str(form.shots), ', '.join(map(code, form.stops)))
        for name, form in FORMATS.items()
    ]
    return Listing(('format', 'template of the question', 'worked examples', 'stop strings'), rows)


def _functions(functions: Mapping[str, Callable[..., Any]]) -> Listing:
    """Functions with their columns and options."""
    rows = []
    for name, function in functions.items():
        parameters = inspect.signature(function).parameters.values()
        options = [
            f'`{p.name}`' if p.default is p.empty else f'`{p.name}={p.default!r}`'
            for p in parameters
            if p.kind == p.KEYWORD_ONLY
        ]
        columns = [
            f'`{p.name}`'
            for p in parameters
            if p.kind == p.POSITIONAL_OR_KEYWORD and p.name not in _GIVEN
        ]
        text = first_paragraph(function)
        rows.append((f'`{name}`', text, ', '.join(columns), ', '.join(options)))
    return Listing(('name', 'value', 'columns', 'options'), rows)


LISTINGS: dict[str, Callable[[], Listing]] = {
    'presets': preset_listing,
    'conventions': convention_listing,
    'rewards': lambda: _functions(registry._REWARDS),
    'step rewards': lambda: _functions(registry._STEP_REWARDS),
    'extractors': lambda: _functions(registry._EXTRACTORS),
    'prompt formats': format_listing,
}

# What `--help=NAME` prints.
TOPICS: dict[str, tuple[str, ...]] = {
    'presets': ('presets', 'conventions'),
    'rewards': ('rewards', 'step rewards', 'extractors'),
    'formats': ('prompt formats',),
}


def topic_text(topic: str, width: int) -> str:
    """The listings of a key of `TOPICS` as text of lines that are at most `width` long."""
    lines: list[str] = []
    for title in TOPICS[topic]:
        listing = LISTINGS[title]()
        lines += ['', f'[{title}]']
        for name, *cells in listing.rows:
            lines.append(f'  {name}')
            for label, cell in zip(listing.header[1:], cells, strict=True):
                if cell:
                    lines += textwrap.wrap(
                        f'{label}: {cell}', width,
                        initial_indent=' ' * 6, subsequent_indent=' ' * 10,
                        break_long_words=False, break_on_hyphens=False,
                    )  # fmt: skip
    return '\n'.join(lines).strip('\n').replace('`', '')


def code(value: Any) -> str:
    """A value as code in Markdown."""
    if value is None:
        return 'automatic'
    return f'`{value.to_dict() if hasattr(value, "to_dict") else value!r}`'.replace('\n', '\\n')


def _settings(options: Mapping[str, Any]) -> str:
    return ', '.join(f'`{key}={value!r}`' for key, value in options.items())
