"""Rewards for programs: they are run, in a sandbox, with unit tests or on inputs."""

import json
import re
from collections.abc import Callable, Sequence
from decimal import Decimal

from grpo_jax.rewards import sandbox
from grpo_jax.rewards.messages import on_texts

_MEGABYTE = 2**20
_FENCE = re.compile(
    r'^[ \t]*```[ \t]*([\w+-]*)[^\n]*\n(.*?)(?:^[ \t]*```|\Z)', re.DOTALL | re.MULTILINE
)
_LANGUAGES = ('', 'py', 'python', 'python3')
_NUMBER = re.compile(r'[+-]?([0-9]{1,400}\.?[0-9]{0,400}|\.[0-9]{1,400})([eE][+-]?[0-9]{1,3})?')


@on_texts
def code_tests(
    prompts: Sequence[str],
    completions: Sequence[str],
    test: Sequence[object],
    entry_point: Sequence[str | None] | None = None,
    prefix: Sequence[str | None] | None = None,
    log_metric: Callable[[str, float], None] | None = None,
    *,
    partial: bool = False,
    seconds: float = 10.0,
    memory: int = 512,
    unsafe: bool = False,
    **columns: object,
) -> list[float | None]:
    """1.0 if a program passes its unit tests, as in HumanEval and MBPP, else 0.0.

    The program is the last Python block of a completion (see `extract_code`). It runs in a process
    that does not know the tests, which call it with copies of their arguments and get values of
    Python's own types: no `__eq__`, no patched module and no exit of the program reaches them.
    None where a row has no tests.

    Args:
        prompts: not used.
        completions: texts with programs.
        test: the tests' source, or a list of statements. Names that they use and do not define are
            the program's.
        entry_point: the name of the function that is passed to a function `check` of the tests.
        prefix: source that comes before a program, and that the tests may use: imports, helpers, or
            the beginning of a function that the completion continues.
        log_metric: gets the share of different programs that ran out of time.
        partial: reward the share of the `assert` statements that hold.
        seconds: for all tests of a program. A program that takes longer fails.
        memory: MiB of a program.
        unsafe: run programs without a sandbox, where bubblewrap cannot be installed: they can read
            and write whatever this process can. Use it in a container that may be lost.
        **columns: not used.

    Raises:
        SandboxError: there is no sandbox here.
        ValueError: a row of `test` is not a text or a list of texts.
    """
    jobs: list[sandbox.Job | None] = []
    for row, (completion, source) in enumerate(zip(completions, test, strict=True)):
        tests = '\n'.join(_texts(source, 'test', row))
        name = (entry_point[row] if entry_point else None) or ''
        before = (prefix[row] if prefix else None) or ''
        program = _program(before, extract_code(completion), name)
        jobs.append(
            sandbox.Tests(program, tests, _finished(before), name, partial)
            if tests.strip()
            else None
        )
    return _rewards(
        'code_tests', jobs, sandbox.Limits(seconds, memory * _MEGABYTE), unsafe, log_metric
    )


@on_texts
def code_io(
    prompts: Sequence[str],
    completions: Sequence[str],
    inputs: Sequence[object],
    outputs: Sequence[object],
    log_metric: Callable[[str, float], None] | None = None,
    *,
    partial: bool = False,
    seconds: float = 10.0,
    memory: int = 512,
    unsafe: bool = False,
    **columns: object,
) -> list[float | None]:
    """1.0 if a program prints the right output for every input, as in APPS and LiveCodeBench.

    The program is the last Python block of a completion (see `extract_code`). It has to end without
    an error. `same_output` compares what it prints, up to four times the length of what is expected
    and 64 KiB more. None where a row has no inputs.

    Args:
        prompts: not used.
        completions: texts with programs.
        inputs: what the program reads in each case, a list of texts (or its JSON).
        outputs: what it has to print in each case.
        log_metric: gets the share of different programs that ran out of time.
        partial: reward the share of cases that are right. A case that takes too long is the last.
        seconds: for each case.
        memory: MiB of a program.
        unsafe: run programs without a sandbox, see `code_tests`.
        **columns: not used.

    Raises:
        SandboxError: there is no sandbox here.
        ValueError: a row has not as many outputs as inputs, or they are not texts.
    """
    jobs: list[sandbox.Job | None] = []
    for row, completion in enumerate(completions):
        reads, prints = _texts(inputs[row], 'inputs', row), _texts(outputs[row], 'outputs', row)
        if len(reads) != len(prints):
            raise ValueError(
                f'row {row} has {len(reads)} inputs and {len(prints)} outputs: give one for each'
            )
        program = extract_code(completion)
        jobs.append(
            sandbox.Inputs(program, tuple(reads), tuple(prints), same_output, partial)
            if reads
            else None
        )
    return _rewards(
        'code_io', jobs, sandbox.Limits(seconds, memory * _MEGABYTE), unsafe, log_metric
    )


def check_options(*, partial: object, seconds: object, memory: object, unsafe: object) -> None:
    """Check the options of both functions, and that programs can be run here.

    Raises:
        ValueError: an option is out of range, or there is no sandbox (SandboxError).
    """
    for name, value in (('partial', partial), ('unsafe', unsafe)):
        if not isinstance(value, bool):
            raise ValueError(f'{name}={value!r}: make it True or False')
    if isinstance(seconds, bool) or not isinstance(seconds, int | float) or not 0 < seconds <= 3600:
        raise ValueError(f'seconds={seconds!r}: give a number above 0 and at most 3600')
    if isinstance(memory, bool) or not isinstance(memory, int) or not 64 <= memory <= 2**20:
        raise ValueError(f'memory={memory!r}: give MiB, at least 64')
    sandbox.shared(unsafe=unsafe is True)


code_tests.check_options = check_options  # type: ignore[attr-defined]
code_io.check_options = check_options  # type: ignore[attr-defined]


def extract_code(text: str) -> str:
    """Return the program in a completion.

    It is the last block of Python between fences of three backticks, which may lack its end, after
    a thought (`</think>`); all of the text where there are no fences, for models that continue a
    program.
    """
    answer = text.rpartition('</think>')[2]
    blocks = list(_FENCE.finditer(answer))
    python = [block[2] for block in blocks if block[1].lower() in _LANGUAGES]
    if python:
        return python[-1]
    return '' if blocks else answer


def same_output(printed: str, expected: str) -> bool:
    """Return whether two outputs have the same words in the same lines.

    White space at the ends of lines and empty lines at the end do not count. Numbers are compared
    by value: `1.50` is `1.5`.
    """
    ours, theirs = (text.rstrip().split('\n') for text in (printed, expected))
    return len(ours) == len(theirs) and all(map(_same_line, ours, theirs))


def _same_line(ours: str, theirs: str) -> bool:
    if ours.rstrip() == theirs.rstrip():
        return True
    a, b = ours.split(), theirs.split()
    return len(a) == len(b) and all(map(_same_word, a, b))


def _same_word(a: str, b: str) -> bool:
    if a == b:
        return True
    numbers = _NUMBER.fullmatch(a) and _NUMBER.fullmatch(b)
    return bool(numbers) and Decimal(a) == Decimal(b)


def _program(prefix: str, code: str, name: str) -> str:
    """Join what comes before a program and the program, which may repeat or continue it."""
    pattern = rf'^(async\s+def|def|class)\s+{re.escape(name)}\b|^{re.escape(name)}\s*='
    if not name or re.search(pattern, code, re.MULTILINE):
        return _finished(prefix) + code
    return prefix + code


def _finished(prefix: str) -> str:
    """Return a prefix that is source by itself: a function that it begins does nothing."""
    last = prefix.rstrip().rpartition('\n')[2]
    indent = last[: len(last) - len(last.lstrip())] + '    ' * last.endswith(':')
    return f'{prefix.rstrip()}\n{indent}pass\n' if indent else prefix and f'{prefix}\n'


def _texts(value: object, column: str, row: int) -> list[str]:
    """Return the texts of a column's value: a list, its JSON, or one text."""
    if value is None:
        return []
    if isinstance(value, str) and column != 'test':
        try:
            value = json.loads(value) if value.strip() else []
        except ValueError:
            value = None
    texts = [value] if isinstance(value, str) else value
    if not isinstance(texts, list | tuple) or not all(isinstance(text, str) for text in texts):
        raise ValueError(
            f'column {column}, row {row}: {value!r:.60} is not a list of texts: make it one'
        )
    return list(texts)


def _rewards(
    name: str,
    jobs: Sequence[sandbox.Job | None],
    limits: sandbox.Limits,
    unsafe: bool,
    log_metric: Callable[[str, float], None] | None,
) -> list[float | None]:
    """Run every different job once; equal completions of a prompt have equal rewards."""
    different = list(dict.fromkeys(job for job in jobs if job))
    if not different:
        return [None] * len(jobs)
    results = sandbox.shared(unsafe=unsafe).run(different, limits)
    if log_metric:
        log_metric(f'timeouts/{name}', sum(result.timeout for result in results) / len(results))
    rewards = {job: _reward(job, result) for job, result in zip(different, results, strict=True)}
    return [rewards[job] if job else None for job in jobs]


def _reward(job: sandbox.Job, result: sandbox.Result) -> float:
    return result.passed / result.cases if job.partial else float(result.passed == result.cases)
