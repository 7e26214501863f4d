"""Python code as a tool, run in the sandbox of `rewards.sandbox`."""

import os
from typing import Any

from grpo_jax.rewards import sandbox

_MEGABYTE = 2**20
# Runs the cells of an episode. Those before the last one print nothing; what they raise ends them
# as it did before. The last one prints the value of its last expression, as an interpreter does.
_PROGRAM = """
import ast, io, sys, traceback
def run(number, source, names, show):
    file = f'cell {number}'
    try:
        tree = ast.parse(source, file)
        last = None
        if show and tree.body and isinstance(tree.body[-1], ast.Expr):
            last = ast.Expression(tree.body.pop().value)
        exec(compile(tree, file, 'exec'), names)
        if last is not None:
            value = eval(compile(last, file, 'eval'), names)
            if value is not None:
                print(repr(value))
    except SystemExit as end:
        if show and end.code not in (None, 0):
            print(f'SystemExit: {end.code}')
    except BaseException as error:
        if show:
            lines = [f for f in traceback.extract_tb(error.__traceback__) if f.filename == file]
            where = f', line {lines[-1].lineno}' if lines else ''
            kind = traceback.format_exception_only(error)[-1].strip()
            print(f'{kind} ({file}{where})')
cells, names, real = CELLS, {'__name__': '__main__'}, sys.stdout
for number, cell in enumerate(cells, 1):
    last = number == len(cells)
    sys.stdout = sys.stderr = real if last else io.StringIO()
    run(number, cell, names, last)
sys.stdout = real
"""


class Python:
    """The tool `python`, whose names stay from call to call.

    Every call runs in a new sandbox, after the earlier code of the episode, whose output is left
    out. Code that is not deterministic may so have other values than before.

    Args:
        seconds: for a call, with the earlier code.
        memory: MiB of a program.
        state: run the earlier code of the episode again; otherwise every call begins anew.
        longest: characters of output that are kept, its beginning and its end.
        unsafe: run programs without a sandbox, see `rewards.builtin.code.code_tests`.

    Raises:
        SandboxError: there is no sandbox here.
    """

    most_calls = len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else 1

    def __init__(
        self, *, seconds: float = 5.0, memory: int = 512, state: bool = True, longest: int = 4000,
        unsafe: bool = False,
    ) -> None:  # fmt: skip
        self._limits = sandbox.Limits(seconds, memory * _MEGABYTE)
        self._state, self._longest, self._unsafe = state, longest, unsafe
        self._cells: list[str] = []

    @staticmethod
    def check_options(**options: Any) -> None:
        """Check the options, and that programs can be run here.

        Raises:
            ValueError: an option is out of range, or there is no sandbox (SandboxError).
        """
        for name, least, most in (
            ('seconds', 0, 3600),
            ('memory', 63, 2**20),
            ('longest', 9, 2**16),
        ):
            value = options.get(name, most)
            number = isinstance(value, int | float) and not isinstance(value, bool)
            whole = name == 'seconds' or isinstance(value, int)
            if not (number and whole and least < value <= most):
                raise ValueError(
                    f'{name}={value!r}: give a number above {least} and at most {most}'
                )
        for name in ('state', 'unsafe'):
            if not isinstance(value := options.get(name, False), bool):
                raise ValueError(f'{name}={value!r}: make it True or False')
        sandbox.shared(unsafe=options.get('unsafe', False))

    def reset(self, **columns: Any) -> None:
        """Begin without any names."""
        self._cells = []

    def python(self, code: str) -> str:
        """Run Python code and return what it prints, and the value of its last line.

        Args:
            code: The code to run.

        Returns:
            The output.
        """
        cells = [*self._cells, code] if self._state else [code]
        program = _PROGRAM.replace('CELLS', ascii(cells), 1)
        job = sandbox.Inputs(program, ('',), ('',))
        (result,) = sandbox.shared(unsafe=self._unsafe).run([job], self._limits)
        if result.timeout:
            return f'error: the code did not end within {self._limits.seconds:g} seconds'
        if self._state:
            self._cells.append(code)
        if result.output is None:
            return f'error: the program was ended ({result.error}): was it out of memory?'
        return _shortened(result.output.rstrip('\n'), self._longest) or '(no output)'


def _shortened(text: str, longest: int) -> str:
    if len(text) <= longest:
        return text
    half = longest // 2
    return f'{text[:half]}\n… {len(text) - 2 * half} characters left out …\n{text[-half:]}'
