r"""A process that decides whether expressions are equal, one comparison at a time (see `pool`).

It runs as a script and imports neither this package nor JAX. It reads lines `[seconds, tree]` in
JSON, with the trees of `equivalence`, and writes `true` or `false` for each. The caller enforces
the deadline. This process limits its own memory, and its processor time so that it ends even if the
caller is killed.
"""

import contextlib
import functools
import gc
import json
import logging
import math
import os
import re
import resource
import sys
from typing import Any

import sympy
from latex2sympy2_extended import NormalizationConfig
from math_verify import LatexExtractionConfig, parse, verify
from sympy.core.function import AppliedUndef

_CONFIG = [
    LatexExtractionConfig(
        boxed_match_priority=0,
        normalization_config=NormalizationConfig(
            basic_latex=True, units=False, malformed_operators=True, nits=True, boxed='last'
        ),
    )
]
_DIGITS = 40  # precision of numerical values
_EQUAL = sympy.Float('1e-25', _DIGITS)  # relative difference of equal values
# For smaller values the difference is absolute: cancellation leaves rounding errors near 1e-100.
_SMALLEST = sympy.Float('1e-65', _DIGITS)
_POINTS = 4  # points at which expressions with variables are compared
_MIN_POINTS = 2  # points at which both must have a value
_DECIMAL = re.compile(r'-?[0-9]*\.([0-9]+)')
_WARM_UP = (  # the parser is slow the first time that it parses a construction
    r'\frac{1+\sqrt{2}}{2}', 'x^2-2x+1', r'-3\pi', 'e^{-2}', r'2x\cdot y', r'\frac{x(x-1)}{y^2}',
    r'\sqrt[3]{5}', '3-4i', '2(x+3)(x-1)', r'-\frac{7}{2}', 'y=2x+3', 'x+2y-5=0', 'f(x)', r'x\le 2',
    '|x-1|', r'\log_2 8', '5!', r'\frac{\pi}{6}+2k', r'\sin x', '(a+b)/c', '2^{10}', '[1,2)',
)  # fmt: skip


def main() -> None:
    """Evaluate the trees on standard input until it ends."""
    results = os.fdopen(os.dup(1), 'w')
    os.dup2(2, 1)  # keep what libraries print out of the results
    logging.disable()
    for text in _WARM_UP:
        same(text, text)
    gc.collect()
    gc.freeze()  # the parser's tables are permanent: exclude them from collection
    gc.set_threshold(20_000)
    memory = int(sys.argv[1])
    with contextlib.suppress(ValueError, OSError):  # macOS has no such limit
        resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
    print('ready', file=results, flush=True)
    for line in sys.stdin:
        seconds, tree = json.loads(line)
        _limit_processor_time(seconds)
        print(json.dumps(evaluate(tree)), file=results, flush=True)


def evaluate(tree: Any) -> bool:
    """Evaluate a comparison tree; stop as soon as it is decided."""
    if isinstance(tree, bool):
        return tree
    kind, *rest = tree
    if kind == 'is':
        return same(*rest)
    return (all if kind == 'all' else any)(evaluate(branch) for branch in rest[0])


def same(a: str, b: str) -> bool:
    """Return whether two expressions are equal; False if one of them cannot be parsed."""
    try:
        x, y = _parse(a), _parse(b)
        if x is None or y is None:
            return False
        equal = _compare_values(x, y, a, b)
        if equal is not None:
            return equal
        return bool(verify(x, y, timeout_seconds=None, allow_set_relation_comp=True))
    except MemoryError:
        os._exit(1)  # the state of the process is unknown
    except Exception:  # an answer that the libraries cannot handle counts as not equal
        return False


@functools.lru_cache(maxsize=4096)
def _parse(text: str) -> Any:
    """Parse `text` to a SymPy object with exact decimals; return None if it cannot be parsed."""
    boxed = '\\boxed{' + text.replace('%', '\\%') + '}'
    parsed = parse(boxed, _CONFIG, extraction_mode='first_match', parsing_timeout=None)
    if not parsed or isinstance(parsed[0], str):
        return None
    expression = parsed[0]
    floats = expression.atoms(sympy.Float) if isinstance(expression, sympy.Basic) else ()
    exact = {number: sympy.Rational(str(number)) for number in floats}
    return expression.xreplace(exact) if exact else expression


def _compare_values(x: Any, y: Any, a: str, b: str) -> bool | None:
    """Compare two expressions by their values at several points; None if they have no values.

    Except for contrived expressions, those that agree to 25 digits at four points are equal. This
    is faster than simplification, and its time is bounded.
    """
    if not isinstance(x, sympy.Expr) or not isinstance(y, sympy.Expr):
        return None
    if x.has(AppliedUndef) or y.has(AppliedUndef):
        return None
    names = sorted({s.name for s in x.free_symbols | y.free_symbols} - {'i'})
    if not names:
        values = _value(x, {}), _value(y, {})
        if None in values:
            return None
        p, q = values
        return _equal(p, q) or _rounded(p, q, a) or _rounded(q, p, b)
    agreed = 0
    for k in range(_POINTS):
        point = {
            # Distinct rationals of both signs; none is whole, as an odd number over an even one.
            name: sympy.Rational((-1) ** (k + j * (k // 2)) * (10 * k + 6 * j + 15), 4 * j + 8)
            for j, name in enumerate(names)
        }
        values = _value(x, point), _value(y, point)
        if None in values:
            continue
        if not _equal(*values):
            return False
        agreed += 1
    return True if agreed >= _MIN_POINTS else None


def _value(x: Any, point: dict[str, Any]) -> Any:
    """Evaluate `x` at a point as a finite complex number; None if it has no such value."""
    symbols = {s: sympy.I if s.name == 'i' else point[s.name] for s in x.free_symbols}
    value = x.xreplace(symbols).evalf(_DIGITS, chop=False)
    real, imaginary = value.as_real_imag()
    finite = all(part.is_Float or part.is_Rational for part in (real, imaginary))
    return value if finite and value.is_finite else None


def _equal(x: Any, y: Any) -> bool:
    return bool(abs(x - y) <= _EQUAL * max(abs(x), abs(y), _SMALLEST))


def _rounded(decimal: Any, value: Any, text: str) -> bool:
    """Return whether the decimal `text` is `value` rounded or truncated.

    The tolerance is that of `numbers.same_number`.
    """
    match = _DECIMAL.fullmatch(text)
    if not match or not value.is_real or _equal(value, sympy.Integer(round(value))):
        return False
    error = abs(decimal - value)
    return bool(error * 10 ** len(match[1]) < 1 and error * 1000 <= max(abs(decimal), abs(value)))


def _limit_processor_time(seconds: float) -> None:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    limit = math.ceil(usage.ru_utime + usage.ru_stime + seconds) + 1
    _, hard = resource.getrlimit(resource.RLIMIT_CPU)
    with contextlib.suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_CPU, (limit, hard))


if __name__ == '__main__':
    main()
