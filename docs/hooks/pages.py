"""MkDocs hooks: generated tables, the source of functions, formulas, and links into the repository.

In a page, `<!-- table: NAME -->` inserts a table of `tables.TABLES` and `<!-- source: PATH -->` the
source of a function without its docstring. Formulas become MathML, which browsers show without a
script. The changelog and the benchmark results are pages, although they are outside of `docs/`.
"""

import html
import importlib
import pathlib
import posixpath
import re
import sys
from typing import Any

from latex2mathml import converter
from mkdocs.structure.files import File

ROOT = pathlib.Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))  # MkDocs loads this file by its path

from docs.hooks import tables  # noqa: E402
from grpo_jax.run import comments  # noqa: E402

# Files of the repository that are part of the site.
INCLUDED = (
    'CHANGELOG.md', 'benchmarks/RESULTS.md', 'benchmarks/growth.png',
    'benchmarks/quantized_base.png', 'benchmarks/study.png',
)  # fmt: skip

_MARKER = re.compile(r'<!-- (table|source): (.+?) -->')
_LINK = re.compile(r'\[([^\]]*)\]\(([^)#\s]+)\)')
_FORMULA = re.compile(r'<(span|div) class="arithmatex">\\[(\[](.*?)\\[)\]]</\1>', re.DOTALL)


def on_files(files: Any, config: Any) -> Any:
    """Adds files from outside of `docs/`."""
    for name in INCLUDED:
        files.append(File.generated(config, name, abs_src_path=str(ROOT / name)))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Inserts generated parts, and resolves links to files of the repository."""
    return link_repository(insert(markdown), page.file.src_uri)


def on_page_content(content: str, **_: Any) -> str:
    """Turns formulas into MathML."""

    def convert(match: re.Match[str]) -> str:
        display = 'block' if match[1] == 'div' else 'inline'
        latex = html.unescape(match[2]).strip().replace(r'\log', r'\log\,')  # a space after it
        return str(converter.convert(latex, display=display))

    return _FORMULA.sub(convert, content)


def insert(markdown: str) -> str:
    """The page with its generated parts."""

    def part(match: re.Match[str]) -> str:
        kind, name = match.groups()
        if kind == 'table':
            return tables.TABLES[name]()
        module, _, function = name.rpartition('.')
        value = getattr(importlib.import_module(module), function)
        return f'```python\n{comments.source_without_docstring(value)}\n```'

    return _MARKER.sub(part, markdown)


def link_repository(markdown: str, page: str) -> str:
    """Rewrites links that leave `docs/`: to a page if the file is one, else to its name."""

    def rewrite(match: re.Match[str]) -> str:
        text, link = match.groups()
        path = posixpath.normpath(posixpath.join('docs', posixpath.dirname(page), link))
        if page in INCLUDED or ':' in link or path.startswith('docs/'):
            return match[0]
        if path in INCLUDED:
            return f'[{text}]({posixpath.relpath(path, posixpath.dirname(page) or ".")})'
        return text if path in text else f'{text} (`{path}`)'

    return _LINK.sub(rewrite, markdown)
