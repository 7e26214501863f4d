r"""A process that decides whether expressions are equal, one question at a time (see `pool`).

Run as a script: it imports neither this package nor JAX. It reads lines `[seconds, tree]` in JSON,
with the trees of `equivalence`, and writes `true` or `false` for each. The caller enforces the
deadline; this process limits its own memory, and its processor time so that it ends even where the
caller was killed.
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
_DIGITS = 40  # to which expressions are evaluated
_EQUAL = sympy.Float('1e-25', _DIGITS)  # relative difference of equal values
# Below it the difference is absolute: a sum that cancels leaves some 1e-100 of rounding.
_SMALLEST = sympy.Float('1e-65', _DIGITS)
_POINTS = 4  # values of the variables at which expressions are compared, two at least
_DECIMAL = re.compile(r'-?[0-9]*\.([0-9]+)')
_WARM_UP = (  # the parser is slow where it meets a construction for the first time
    r'\frac{1+\sqrt{2}}{2}', 'x^2-2x+1', r'-3\pi', 'e^{-2}', r'2x\cdot y', r'\frac{x(x-1)}{y^2}',
    r'\sqrt[3]{5}', '3-4i', '2(x+3)(x-1)', r'-\frac{7}{2}', 'y=2x+3', 'x+2y-5=0', 'f(x)', r'x\le 2',
    '|x-1|', r'\log_2 8', '5!', r'\frac{\pi}{6}+2k', r'\sin x', '(a+b)/c', '2^{10}', '[1,2)',
)  # fmt: skip


def main() -> None:
    """Answers until standard input ends."""
    answers = os.fdopen(os.dup(1), 'w')
    os.dup2(2, 1)  # whatever a library prints is no answer
    logging.disable()
    for text in _WARM_UP:
        same(text, text)
    gc.collect()
    gc.freeze()  # the parser's tables stay: no need to look at them again and again
    gc.set_threshold(20_000)
    memory = int(sys.argv[1])
    with contextlib.suppress(ValueError, OSError):  # macOS knows no such limit
        resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
    print('ready', file=answers, flush=True)
    for line in sys.stdin:
        seconds, tree = json.loads(line)
        _limit_processor_time(seconds)
        print(json.dumps(decide(tree)), file=answers, flush=True)


def decide(tree: Any) -> bool:
    """The verdict on a tree of questions, no more of them asked than decide it."""
    if isinstance(tree, bool):
        return tree
    kind, *rest = tree
    if kind == 'is':
        return same(*rest)
    return (all if kind == 'all' else any)(decide(branch) for branch in rest[0])


def same(a: str, b: str) -> bool:
    """Whether two expressions are equal; False where one cannot be read."""
    try:
        x, y = _expression(a), _expression(b)
        if x is None or y is None:
            return False
        verdict = _same_values(x, y, a, b)
        if verdict is not None:
            return verdict
        return verify(x, y, timeout_seconds=None, allow_set_relation_comp=True)
    except MemoryError:
        os._exit(1)  # what is left of the process is not to be trusted
    except Exception:  # whatever the libraries stumble over is no equal answer
        return False


@functools.lru_cache(maxsize=4096)
def _expression(text: str) -> Any:
    """`text` as SymPy reads it, None where it cannot; decimals are made exact."""
    boxed = '\\boxed{' + text.replace('%', '\\%') + '}'
    found = parse(boxed, _CONFIG, extraction_mode='first_match', parsing_timeout=None)
    if not found or isinstance(found[0], str):
        return None
    floats = found[0].atoms(sympy.Float) if isinstance(found[0], sympy.Basic) else ()
    return found[0].xreplace({x: sympy.Rational(str(x)) for x in floats}) if floats else found[0]


def _same_values(x: Any, y: Any, a: str, b: str) -> bool | None:
    """The verdict from the values of two expressions at some points; None where they have none.

    Forty digits at four points decide: expressions that agree there are equal, but for contrived
    ones. That is faster than simplification, and cannot run away.
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
            # Different rationals of both signs, none a whole number: (5k + 3j + 7) / (2j + 4).
            name: sympy.Rational((-1) ** (k + j * (k // 2)) * (10 * k + 6 * j + 15), 4 * j + 8)
            for j, name in enumerate(names)
        }
        values = _value(x, point), _value(y, point)
        if None in values:
            continue
        if not _equal(*values):
            return False
        agreed += 1
    return True if agreed >= 2 else None


def _value(x: Any, point: dict[str, Any]) -> Any:
    """`x` at a point as a finite complex number, None where it has no such value."""
    there = {s: sympy.I if s.name == 'i' else point[s.name] for s in x.free_symbols}
    value = x.xreplace(there).evalf(_DIGITS, chop=False)
    real, imaginary = value.as_real_imag()
    finite = all(part.is_Float or part.is_Rational for part in (real, imaginary))
    return value if finite and value.is_finite else None


def _equal(x: Any, y: Any) -> bool:
    return bool(abs(x - y) <= _EQUAL * max(abs(x), abs(y), _SMALLEST))


def _rounded(decimal: Any, value: Any, text: str) -> bool:
    """Whether `text`, a decimal, is `value` rounded or cut: as `numbers.same_number` has it."""
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
