"""Run tests whose calls of the tested program are answered by another process.

The tests see values of Python's own types (see `values`), or `Remote` objects, which can be called
and passed back, but not compared. A process of this kind serves one program after the other; each
is checked in a copy of it.
"""

import builtins
import importlib
import os
import signal
import socket
import sys
import types
from collections.abc import Mapping
from typing import Any

from grpo_jax.rewards.sandbox.inside.cases import count_cases, free_names
from grpo_jax.rewards.sandbox.inside.channel import Channel, ChannelError
from grpo_jax.rewards.sandbox.inside.process import connect, limit_resources
from grpo_jax.rewards.sandbox.inside.values import ValueCodeError, decode, encode

_REPORTED = 77  # exit status of a copy that has sent its result
# Exceptions that mean something else to the loops and generators of the tests.
_FLOW = (StopIteration, StopAsyncIteration)


class Stopped(BaseException):
    """The program has ended, left the test, or answered something that is not an answer."""


class Program:
    """The tested program, at the other end of a channel.

    Attributes:
        calls: how many calls it has answered.
        stopped: why it cannot pass any more, whatever the tests make of the exception.
    """

    def __init__(self, channel: Channel):
        self._channel = channel
        self.calls = 0
        self.stopped: str | None = None

    def wait_until_loaded(self) -> None:
        """Wait until the program has run as a module; raise what it raised."""
        self._result(self._receive())

    def ask(self, request: Mapping[str, Any]) -> Any:
        """Return the answer to a request, or raise what the program raised."""
        return self._result(self._ask(request))

    def call(self, reference: int, positional: tuple[Any, ...], named: Mapping[str, Any]) -> Any:
        """Call an object of the program with copies of the arguments."""
        arguments = encode([list(positional), dict(named)], _reference)
        answer = self._ask({'call': reference, 'arguments': arguments})
        self.calls += 1
        return self._result(answer)

    def _ask(self, request: Mapping[str, Any]) -> Any:
        if self.stopped:
            raise Stopped(self.stopped)
        try:
            self._channel.send(request)
        except ChannelError as error:
            raise self._stop(str(error)) from error
        return self._receive()

    def _receive(self) -> Any:
        try:
            answer = self._channel.receive()
        except ChannelError as error:
            raise self._stop(str(error)) from error
        if not isinstance(answer, dict):
            raise self._stop('its answer is not an answer')
        return answer

    def _result(self, answer: Mapping[str, Any]) -> Any:
        if 'raised' not in answer:
            return self._value(answer.get('value'))
        kinds, message = answer['raised'], str(answer.get('message'))[:1000]
        for kind in kinds if isinstance(kinds, list) else []:
            error = getattr(builtins, kind, None) if isinstance(kind, str) else None
            if isinstance(error, type) and issubclass(error, BaseException):
                if not issubclass(error, Exception):
                    raise self._stop(f'it raised {kind}')
                raise RuntimeError(message) if issubclass(error, _FLOW) else _made(error, message)
        raise self._stop('it raised an unknown exception')

    def _value(self, code: Any) -> Any:
        try:
            return decode(code, self._remote)
        except ValueCodeError as error:
            raise self._stop(str(error)) from error

    def _remote(self, reference: Any) -> 'Remote':
        if not isinstance(reference, int):
            raise ValueCodeError(f'{reference!r:.40} is no reference')
        return Remote(self, reference)

    def _stop(self, reason: str) -> Stopped:
        self.stopped = reason
        return Stopped(reason)


class Remote:
    """An object of the program: a function, a class or an instance of its own classes."""

    __slots__ = ('_program', '_reference')
    __hash__ = None  # type: ignore[assignment]

    def __init__(self, program: Program, reference: int):
        self._program, self._reference = program, reference

    def __call__(self, *positional: Any, **named: Any) -> Any:
        return self._program.call(self._reference, positional, named)

    def __getattr__(self, name: str) -> Any:
        if name.startswith('__'):
            raise AttributeError(name)
        return self._program.ask({'object': self._reference, 'attribute': name})

    def _refuse(self, *others: object) -> Any:
        raise TypeError("the tests can't judge an object of the program's own: only plain values")

    __eq__ = __ne__ = __lt__ = __le__ = __gt__ = __ge__ = __bool__ = _refuse


def main(descriptor: int, user: int) -> None:
    """Check programs until the other side ends; see `process.connect` for the arguments."""
    control = connect(descriptor, user)
    channel = Channel(control)
    channel.send('ready')
    while True:
        _, descriptors, _, _ = socket.recv_fds(control, 1, 1)
        if not descriptors:
            os._exit(0)
        order = channel.receive()
        child = os.fork()
        if not child:
            _check_in_copy(channel, Channel(socket.socket(fileno=descriptors[0])), order)
        os.close(descriptors[0])
        _, status = os.waitpid(child, 0)
        if os.waitstatus_to_exitcode(status) != _REPORTED:
            channel.send({'passed': 0, 'cases': 0, 'error': 'the tests ended without a result'})


def _check_in_copy(results: Channel, channel: Channel, order: Mapping[str, Any]) -> None:
    try:
        limit_resources(order['limits'])
        signal.alarm(order['seconds'])
        report = check(Program(channel), order)
        results.send(report)
        os._exit(_REPORTED)
    finally:
        os._exit(1)


def check(program: Program, order: Mapping[str, Any]) -> dict[str, Any]:
    """Run tests; return how many cases there are, how many passed, and what went wrong.

    Args:
        program: the tested program.
        order: `test`, the source of the tests; `prefix`, source that they need; `entry_point`, the
            name that is passed to a function `check` of the tests, or ''; `partial`, whether to
            count cases: the tests' `assert` statements.
    """
    passed: dict[int, bool] = {}
    tests, cases = count_cases(order['test']) if order['partial'] else (order['test'], 0)
    error = ''
    try:
        program.wait_until_loaded()
        _run(program, order, tests, _grader(passed))
    except BaseException as raised:
        error = f'{type(raised).__name__}: {raised}'[:200]
    if not program.calls:
        error = error or 'the tests have not called the program'
    error = program.stopped or error
    if not cases:
        return {'passed': int(not error), 'cases': 1, 'error': error}
    # With an error beside the cases, at least one counts as failed.
    right = min(sum(passed.values()), cases - bool(error)) if program.calls else 0
    return {'passed': right, 'cases': cases, 'error': error}


def _run(program: Program, order: Mapping[str, Any], tests: Any, grade: Any) -> None:
    module = types.ModuleType('tests')
    sys.modules['tests'] = module  # where dataclasses look
    names = vars(module)
    names['__grade__'] = grade
    exec(compile(order['prefix'], 'prefix.py', 'exec'), names)
    modules, others = free_names(order['test'])
    for name in modules - names.keys():  # never from the program, which could judge itself
        names[name] = importlib.import_module(name)
    for name in others - names.keys():
        names |= _defined(program, name)
    entry_point = order['entry_point']
    if entry_point:
        names[entry_point] = program.ask({'name': entry_point})
    exec(compile(tests, 'tests.py', 'exec'), names)
    if entry_point and callable(names.get('check')):
        names['check'](names[entry_point])


def _defined(program: Program, name: str) -> dict[str, Any]:
    """Return the object of a name that the program defines, if it does."""
    try:
        return {name: program.ask({'name': name})}
    except NameError:
        return {}


def _grader(passed: dict[int, bool]) -> Any:
    """Return the function that notes the outcome of a case, which may run several times."""

    def grade(case: int, right: bool) -> None:
        passed[case] = right and passed.get(case, True)

    return grade


def _reference(value: Any) -> int:
    if not isinstance(value, Remote):
        raise ValueCodeError(
            f"{type(value).__name__}: the program can't get this object: only plain values and "
            'objects of its own can be passed'
        )
    return value._reference


def _made(error: type[Exception], message: str) -> Exception:
    """Return an exception of a type; some types, such as UnicodeDecodeError, want more."""
    try:
        return error(message)
    except TypeError:
        return ValueError(message) if issubclass(error, ValueError) else RuntimeError(message)
