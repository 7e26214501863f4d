r"""A process that decides whether expressions are equal, one comparison at a time (see `pool`).

It runs as a script and imports neither this package nor JAX. It reads lines `[seconds, tree]` in
JSON, with the trees of `equivalence`, and writes `true` or `false` for each. The caller enforces
the deadline. This process limits its own memory, and its processor time so that it ends even if the
caller is killed.
"""

import contextlib
import functools
import gc
import importlib.util
import json
import logging
import math
import os
import pathlib
import resource
import sys
from typing import Any

import sympy
from latex2sympy2_extended import latex2sympy
from latex2sympy2_extended.latex2sympy2 import ConversionConfig
from sympy.core.function import AppliedUndef
from sympy.core.relational import Relational


def _load(name: str) -> Any:
    """Import a module beside this script without importing the package."""
    path = pathlib.Path(__file__).with_name(f'{name}.py')
    spec = importlib.util.spec_from_file_location(f'_{name}', path)
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


_values = _load('values')
_CONFIG = ConversionConfig(interpret_as_mixed_fractions=False, lowercase_symbols=False)
_MAX_INTEGERS = 1000  # in a set whose elements are compared one by one
_WARM_UP = (  # the parser is slow the first time that it parses a construction
    r'\frac{1+\sqrt{2}}{2}', 'x^2-2x+1', r'-3\pi', 'e^{-2}', r'2x\cdot y', r'\frac{x(x-1)}{y^2}',
    r'\sqrt[3]{5}', '3-4i', '2(x+3)(x-1)', r'-\frac{7}{2}', 'y=2x+3', 'x+2y-5=0', 'x_1', r'x\le 2',
    '|x-1|', r'\log_2 8', '5!', r'\frac{\pi}{6}+2k', r'\sin x', '(a+b)/c', '2^{10}', 'a^2b',
)  # fmt: skip


def main() -> None:
    """Evaluate the trees on standard input until it ends, in a copy of this process."""
    results = os.fdopen(os.dup(1), 'w')
    os.dup2(2, 1)  # keep what libraries print out of the results
    logging.disable()
    for text in _WARM_UP:
        same('is', text, text)
    gc.collect()
    gc.freeze()  # the parser's tables are permanent: exclude them from collection
    gc.set_threshold(20_000)
    memory = int(sys.argv[1])
    with contextlib.suppress(ValueError, OSError):  # macOS has no such limit
        resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
    # This process keeps the warm libraries; copies of it compare. It replaces one that is killed in
    # milliseconds, and ends after one that has read all of the input.
    while os.fork():
        _, status = os.wait()
        if not status:
            return
    try:
        print('ready', os.getpid(), file=results, flush=True)
    except BrokenPipeError:  # the caller has been killed
        os._exit(0)
    for line in sys.stdin:
        seconds, tree = json.loads(line)
        _limit_processor_time(seconds)
        print(json.dumps(evaluate(tree)), file=results, flush=True)


def evaluate(tree: Any) -> bool:
    """Evaluate a comparison tree; stop as soon as it is decided."""
    if isinstance(tree, bool):
        return tree
    kind, *rest = tree
    if kind in ('is', 'sets'):
        return same(kind, *rest)
    if kind == 'matching':
        return _matching(rest[0])
    return (all if kind == 'all' else any)(evaluate(branch) for branch in rest[0])


def _matching(table: list[list[Any]]) -> bool:
    r"""Return whether rows and columns can be paired so that each pair's tree is true.

    A row takes a column from another row that can have a third one: 1.414 and 1.4142 are both equal
    to `\sqrt{2}`, but not to each other.
    """
    equal = functools.lru_cache(None)(lambda row, column: evaluate(table[row][column]))
    row_of: dict[int, int] = {}  # column -> row

    def pair(row: int, seen: set[int]) -> bool:
        for column in range(len(table)):
            if column not in seen and equal(row, column):
                seen.add(column)
                if column not in row_of or pair(row_of[column], seen):
                    row_of[column] = row
                    return True
        return False

    return all(pair(row, set()) for row in range(len(table)))


def same(kind: str, a: Any, b: Any) -> bool:
    """Return whether two expressions or sets are equal; False if one cannot be parsed."""
    try:
        if kind == 'sets':
            return _same_sets(_real_set(a), _real_set(b))
        x, y = _parse(a), _parse(b)
        if a != b and x == y:  # equal texts ask whether there is a value
            return True
        if isinstance(x, sympy.Expr) and isinstance(y, sympy.Expr):
            return (
                _values.same_values(x, y)
                or _values.is_rounded(x, y, a)
                or _values.is_rounded(y, x, b)
            )
        if isinstance(x, Relational) and isinstance(y, Relational):
            return _same_relations(x, y)
        return bool(x == y)
    except MemoryError:
        os._exit(1)  # the state of the process is unknown
    except Exception:  # an answer that the libraries cannot handle counts as not equal
        return False


@functools.lru_cache(maxsize=4096)
def _parse(text: str) -> Any:
    """Parse `text` to a SymPy object with exact decimals.

    Raises:
        Exception: the text cannot be parsed.
    """
    expression = latex2sympy(
        text, is_real=None, normalization_config=None, conversion_config=_CONFIG
    )
    if not isinstance(expression, sympy.Basic):
        return expression
    if expression.has(AppliedUndef):
        raise ValueError(f'unknown function in {text!r}')
    floats = expression.atoms(sympy.Float)
    exact = {number: sympy.Rational(str(number)) for number in floats}
    exact |= {s: sympy.I for s in expression.free_symbols if s.name == 'i'}
    return expression.xreplace(exact) if exact else expression


def _same_relations(x: Any, y: Any) -> bool:
    """Return whether one relation is a multiple of the other, or both have the same solutions."""
    p, q = (r.gts - r.lts if r.func in _INEQUALITIES else r.lhs - r.rhs for r in (x, y))
    strict = [r.func in (sympy.StrictLessThan, sympy.StrictGreaterThan) for r in (x, y)]
    directed = x.func in _INEQUALITIES
    if directed != (y.func in _INEQUALITIES) or (not directed and x.func != y.func):
        return False
    if strict[0] == strict[1] and _proportional(p, q, directed):
        return True
    if not directed:
        tops = [sympy.fraction(sympy.together(side))[0] for side in (p, q)]
        return _proportional(tops[0], tops[1], False)
    variables = x.free_symbols | y.free_symbols
    return len(variables) == 1 and _same_sets(x.as_set(), y.as_set())


_INEQUALITIES = (
    sympy.LessThan,
    sympy.GreaterThan,
    sympy.StrictLessThan,
    sympy.StrictGreaterThan,
)


def _proportional(p: Any, q: Any, positive: bool) -> bool:
    """Return whether p is a constant multiple of q, with a positive factor if `positive`."""
    names = sorted({s.name for s in p.free_symbols | q.free_symbols})
    for k in range(_values.POINTS):
        point = _values.sample_point(names, k, False)
        with contextlib.suppress(ArithmeticError, ValueError):
            at_p, at_q = _values.substitute(p, point), _values.substitute(q, point)
            zeros = [_values.same_numbers(value, sympy.Integer(0)) for value in (at_p, at_q)]
            if zeros[0] != zeros[1]:
                return False
            if not zeros[0]:
                if positive and not (at_p / at_q).evalf(15).is_positive:
                    return False
                return _values.same_values(p * at_q, q * at_p)
    return False


def _real_set(node: Any) -> Any:
    """Build the SymPy set of a description (see `real_sets`)."""
    kind, *rest = node
    if kind == 'interval':
        return sympy.Interval(*(_parse(end).doit() for end in rest[:2]), *rest[2:])
    if kind == 'points':
        return sympy.FiniteSet(*map(_parse, rest[0]))
    if kind == 'relation':
        relation = _parse(rest[0])
        if isinstance(relation, sympy.And):
            return sympy.Intersection(*(part.as_set() for part in relation.args))
        return relation.as_set()
    if kind == 'integers':
        return sympy.Range(_parse(rest[0]), sympy.oo) if rest[0] != '-\\infty' else sympy.S.Integers
    if kind == 'naturals':
        return sympy.S.Naturals0
    if kind == 'minus':
        return _real_set(rest[0]) - _real_set(rest[1])
    if kind == 'either':
        both = sympy.Intersection(*map(_real_set, rest[0]))
        return sympy.Union(*map(_real_set, rest[0])) if both is sympy.S.EmptySet else both
    joined = (sympy.Union if kind == 'union' else sympy.Intersection)(*map(_real_set, rest[0]))
    if ['naturals'] in rest[0] and joined.contains(0) != sympy.false:
        raise ValueError('whether 0 is a natural number is a convention')
    return joined


def _same_sets(x: Any, y: Any) -> bool:
    """Return whether two unions of intervals and points are the same."""
    if x == y:
        return True
    pieces = [_pieces(each) for each in (x, y)]
    return len(pieces[0]) == len(pieces[1]) and all(
        p.left_open == q.left_open
        and p.right_open == q.right_open
        and (p.start == q.start or _values.same_values(p.start, q.start))
        and (p.end == q.end or _values.same_values(p.end, q.end))
        for p, q in zip(*pieces, strict=True)
    )


def _pieces(union: Any) -> list[Any]:
    """Return the intervals of a union in increasing order; a point is an interval."""
    intervals: list[Any] = []
    for piece in union.args if isinstance(union, sympy.Union) else [union]:
        if isinstance(piece, sympy.Interval):
            intervals.append(piece)
        elif piece == sympy.S.Reals:
            intervals.append(sympy.Interval(-sympy.oo, sympy.oo))
        elif isinstance(piece, sympy.FiniteSet) or (
            isinstance(piece, sympy.Range) and 0 <= piece.size <= _MAX_INTEGERS
        ):
            intervals += [_Point(element) for element in piece]
        elif piece is not sympy.S.EmptySet:
            raise ValueError(f'{piece} is no interval')
    return sorted(intervals, key=lambda interval: interval.start)


class _Point:
    """A closed interval of one point, which SymPy would turn into a finite set."""

    left_open = right_open = False

    def __init__(self, value: Any):
        self.start = self.end = value


def _limit_processor_time(seconds: float) -> None:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    limit = math.ceil(usage.ru_utime + usage.ru_stime + seconds) + 1
    _, hard = resource.getrlimit(resource.RLIMIT_CPU)
    with contextlib.suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_CPU, (limit, hard))


if __name__ == '__main__':
    main()
