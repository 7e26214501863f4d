"""Read the source of tests: the names that they expect, and their cases."""

import ast
import builtins
import sys


def free_names(source: str) -> tuple[set[str], set[str]]:
    """Return the names that tests use and do not define, if they are not Python's own.

    Returns:
        Modules of the standard library, whose attributes alone are used, and all others.
    """
    used: set[str] = set()
    called: set[str] = set()  # or used in another way that is not for an attribute
    defined = set(dir(builtins))
    tree = ast.parse(source)
    owners = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Name):
            (used if isinstance(node.ctx, ast.Load) else defined).add(node.id)
            if id(node) not in owners:
                called.add(node.id)
        elif isinstance(node, ast.arg):
            defined.add(node.arg)
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            defined.add(node.name)
        elif isinstance(node, ast.alias):
            defined.add((node.asname or node.name).partition('.')[0])
        elif isinstance(node, ast.ExceptHandler) and node.name:
            defined.add(node.name)
    modules = (used - called - defined) & sys.stdlib_module_names
    return modules, used - defined - modules


def count_cases(source: str) -> tuple[ast.Module, int]:
    """Return tests that go on after a failed `assert` and note its outcome, and their number.

    An `assert` of a constant, such as `assert True`, is no case. The outcome of case n is passed to
    a function `__grade__(n, right)`.
    """
    cases = _Cases()
    tree = cases.visit(ast.parse(source))
    return ast.fix_missing_locations(tree), cases.count


class _Cases(ast.NodeTransformer):
    def __init__(self) -> None:
        self.count = 0

    def visit_Assert(self, node: ast.Assert) -> ast.stmt:
        if isinstance(node.test, ast.Constant):
            return node
        template = ast.parse(
            'try:\n    pass\n'
            f'except Exception:\n    __grade__({self.count}, False)\n'
            f'else:\n    __grade__({self.count}, True)'
        )
        self.count += 1
        statement = template.body[0]
        assert isinstance(statement, ast.Try)
        statement.body = [node]
        return statement
