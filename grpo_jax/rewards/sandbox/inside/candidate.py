"""Run one program that a model wrote, and answer the calls of its tests or run it on inputs.

This process knows neither the tests nor the expected outputs. Whatever the program does to it, it
can only send other values or outputs, which is what it may choose anyway.
"""

import builtins
import gc
import io
import os
import select
import signal
import sys
import types
from collections.abc import Mapping
from typing import Any

from grpo_jax.rewards.sandbox.inside.channel import Channel, ChannelError
from grpo_jax.rewards.sandbox.inside.process import connect, limit_resources
from grpo_jax.rewards.sandbox.inside.values import decode, encode

ENDED, FAILED, TIMEOUT = b'E', b'F', b'T'  # how a case ended
_MAX_MESSAGE = 1000  # characters of an exception's message


def main(descriptor: int, user: int) -> None:
    """Wait for a program and serve it; see `process.connect` for the arguments."""
    channel = Channel(connect(descriptor, user))
    gc.collect()
    gc.freeze()
    try:
        channel.send('ready')
        order = channel.receive()
    except ChannelError:  # there is no program
        os._exit(0)
    limit_resources(order['limits'])
    vars(builtins).update(exit=sys.exit, quit=sys.exit)  # which Python's `site` would define
    if order['kind'] == 'calls':
        serve_calls(channel, order['program'])
    else:
        serve_cases(channel, order['program'], order['seconds'])


def serve_calls(channel: Channel, program: str) -> None:
    """Run a program as a module, then answer calls until the other side ends."""
    objects: list[Any] = []  # what a reference is the index of
    module = types.ModuleType('program')
    sys.modules['program'] = module
    try:
        channel.send(_outcome(lambda: exec(compile(program, 'program.py', 'exec'), vars(module))))
        while True:
            request = channel.receive()
            channel.send(_answer(request, vars(module), objects))
    except ChannelError:
        os._exit(0)


def _answer(request: Any, names: Mapping[str, Any], objects: list[Any]) -> Any:
    """Answer a request. Arguments are copies: what a call changes in them is not sent back."""
    if 'name' in request:
        if request['name'] not in names:
            return {'raised': ['NameError'], 'message': f'name {request["name"]!r} is not defined'}
        return _outcome(lambda: names[request['name']], objects)
    if 'attribute' in request:
        return _outcome(lambda: getattr(objects[request['object']], request['attribute']), objects)
    positional, named = decode(request['arguments'], objects.__getitem__)
    return _outcome(lambda: objects[request['call']](*positional, **named), objects)


def _outcome(run: Any, objects: list[Any] | None = None) -> dict[str, Any]:
    try:
        value = run()
        if objects is None:
            return {'value': None}
        return {'value': encode(value, lambda item: _refer(item, objects))}
    except BaseException as error:  # with SystemExit, which the tests are told of
        kinds = [kind.__name__ for kind in type(error).__mro__]
        return {'raised': kinds, 'message': _text(error)}


def _refer(item: Any, objects: list[Any]) -> int:
    objects.append(item)
    return len(objects) - 1


def _text(error: BaseException) -> str:
    try:
        return str(error)[:_MAX_MESSAGE]
    except Exception:
        return ''


def serve_cases(channel: Channel, program: str, seconds: float) -> None:
    """Run a program on one input after the other, each in a copy of this process.

    Only the copies return from this function: they end as any program does, with its functions for
    the exit and its threads. A program that cannot be compiled ends this process.
    """
    code = compile(program, 'program.py', 'exec')
    while True:
        try:
            text = channel.receive_bytes()
        except ChannelError:
            os._exit(0)
        with _file() as reads, _file() as writes:
            reads.write(text)
            reads.seek(0)
            child = os.fork()
            if not child:
                channel.close()
                os.dup2(reads.fileno(), 0)
                os.dup2(writes.fileno(), 1)
                _run_as_main(code)
                return
            status = _wait(child, seconds)
            writes.seek(0)
            channel.send_bytes(status + writes.read())


def _file() -> io.FileIO:
    """Return a file without a name."""
    name = 'case'
    file = io.FileIO(os.open(name, os.O_CREAT | os.O_EXCL | os.O_RDWR), 'r+')
    os.unlink(name)
    return file


def _run_as_main(code: types.CodeType) -> None:
    sys.stdin = open(0, closefd=False)  # noqa: SIM115
    sys.stdout = open(1, 'w', closefd=False)  # noqa: SIM115
    module = types.ModuleType('__main__')
    sys.modules['__main__'] = module
    exec(code, vars(module))


def _wait(child: int, seconds: float) -> bytes:
    """Wait for a copy, end it after so many seconds, and return how it ended."""
    descriptor = os.pidfd_open(child)
    ended, _, _ = select.select([descriptor], [], [], seconds)
    os.close(descriptor)
    if not ended:
        os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    if not ended:
        return TIMEOUT
    return FAILED if status else ENDED
