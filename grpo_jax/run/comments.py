"""Descriptions of options, read from the comments and docstrings beside their definitions."""

import ast
import inspect
import io
import re
import textwrap
import tokenize
from collections.abc import Iterator
from typing import Any


class Source:
    """The source of a function, class or module, with its comments by line."""

    def __init__(self, owner: Any) -> None:
        self.text = textwrap.dedent(inspect.getsource(owner))
        self.tree = ast.parse(self.text)
        lines = self.text.splitlines()
        self.trailing: dict[int, str] = {}
        self.alone: dict[int, str] = {}
        for token in tokenize.generate_tokens(io.StringIO(self.text).readline):
            if token.type == tokenize.COMMENT:
                row, column = token.start
                text = token.string.lstrip('# ').strip()
                before = lines[row - 1][:column].strip()
                (self.trailing if before else self.alone)[row] = text

    def comment(self, first: int, last: int) -> str:
        """The comment behind the lines first to last, or else in the lines above them."""
        for row in (first, last):
            if row in self.trailing:
                return _without_directives(self.trailing[row])
        above: list[str] = []
        while first - 1 - len(above) in self.alone:
            above.insert(0, self.alone[first - 1 - len(above)])
        return ' '.join(above)

    def fields(self) -> dict[str, str]:
        """Comments of the annotated fields of a class."""
        return {
            node.target.id: self.comment(node.lineno, node.end_lineno or node.lineno)
            for node in ast.walk(self.tree)
            if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name)
        }

    def items(self, node: ast.Dict) -> dict[str, str]:
        """Comments of the items of a dictionary, those inside it under dotted names."""
        comments: dict[str, str] = {}
        for key, value in zip(node.keys, node.values, strict=True):
            if isinstance(key, ast.Constant):
                name = str(key.value)
                comments[name] = self.comment(key.lineno, value.end_lineno or key.lineno)
                if isinstance(value, ast.Dict):
                    inner = self.items(value).items()
                    comments |= {f'{name}.{path}': text for path, text in inner}
        return comments

    def assignments(self) -> Iterator[tuple[str, ast.expr, int]]:
        """Every assignment: the dotted target, the value and its line."""
        for node in ast.walk(self.tree):
            if isinstance(node, ast.Assign):
                yield ast.unparse(node.targets[0]), node.value, node.lineno
            elif isinstance(node, ast.AnnAssign) and node.value:
                yield ast.unparse(node.target), node.value, node.lineno


def docstring_entries(owner: Any, section: str) -> dict[str, str]:
    """The entries of a section such as 'Args' of a docstring in Google style."""
    lines = (inspect.getdoc(owner) or '').splitlines()
    entries: dict[str, str] = {}
    name = ''
    inside = False
    for line in lines:
        if line and not line.startswith(' '):
            inside = line == f'{section}:'
        elif inside and (match := re.match(r'\s+\*{0,2}(\w+): (.*)', line)):
            name = match[1]
            entries[name] = match[2]
        elif inside and name and line.strip():
            entries[name] += ' ' + line.strip()
    return entries


def first_paragraph(owner: Any) -> str:
    """The first paragraph of a docstring, on one line."""
    return ' '.join((inspect.getdoc(owner) or '').split('\n\n')[0].split())


def source_without_docstring(owner: Any) -> str:
    """The source of a function without its docstring."""
    source = Source(owner)
    (function,) = source.tree.body
    assert isinstance(function, ast.FunctionDef | ast.ClassDef)
    lines = source.text.splitlines()
    first = function.body[0]
    if isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant):
        del lines[first.lineno - 1 : first.end_lineno]
        while not lines[first.lineno - 1].strip():
            del lines[first.lineno - 1]
    kept = [line for line in lines if not line.startswith('@')]
    return '\n'.join(re.sub(r'\s+# type: ignore.*', '', line) for line in kept)


def _without_directives(comment: str) -> str:
    """The comment without what is for linters and type checkers, which comes last or first."""
    parts = [part.strip() for part in re.split(r'\s+#\s+', comment)]
    return ' '.join(part for part in parts if not re.match(r'(type|noqa|fmt):?', part))
