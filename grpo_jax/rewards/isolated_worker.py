"""A process that calls one reward function (see `isolated`); it runs as a script.

Its argument is a JSON object that describes the function. It reads lines `[seconds, request]` and
writes a line of JSON for each. The caller enforces the deadline. What the function prints is lost.
"""

import asyncio
import base64
import contextlib
import functools
import inspect
import json
import os
import pickle
import resource
import sys
import threading
import time
from typing import Any

# Kept here, since the function may replace them.
_dumps, _loads, _unpickle = json.dumps, json.loads, pickle.loads
_write, _change_folder, _exit_now, _parent = os.write, os.chdir, os._exit, os.getppid

_LONGEST = 1000  # characters of an error


def main() -> None:
    """Answer the requests on standard input until it ends."""
    spec = _loads(sys.argv[1])
    results, requests = os.dup(1), os.fdopen(os.dup(0), 'rb')
    nothing = os.open(os.devnull, os.O_RDWR)
    for number in (0, 1, 2):  # keep what the function prints out of the results
        os.dup2(nothing, number)
    threading.Thread(target=_end_with, args=(_parent(),), daemon=True).start()
    sys.path[:] = spec['search']
    from grpo_jax import plugins
    from grpo_jax.rewards import registry

    plugins.set_folders(spec['folders'])
    function = functools.partial(registry.resolve(spec['path']), **_decode(spec['options']))
    memory = int(spec['memory'] * 2**30)
    with contextlib.suppress(ValueError, OSError, AttributeError):  # not on every platform
        resource.setrlimit(resource.RLIMIT_DATA, (memory, memory))
    folder = os.getcwd()
    _send(results, b'ready')
    for line in requests:
        try:
            answer = _dumps(_answer(function, *_decode(_loads(line)[1])), default=_plain)
        except BaseException as error:  # with SystemExit
            answer = _dumps({'error': _describe(error)})
        _send(results, answer.encode())
        with contextlib.suppress(OSError):  # it has been deleted
            _change_folder(folder)


def _answer(function: Any, arguments: dict[str, Any], trainer_state: Any) -> dict[str, Any]:
    from grpo_jax.rewards.calls import parameters
    from grpo_jax.rewards.logs import Logs

    logs = Logs({}, {})
    services = {
        'trainer_state': trainer_state,
        'log_metric': logs.log_metric,
        'log_extra': functools.partial(logs.log_extra, len(arguments['completions'])),
    }
    known = parameters(function)
    returned = function(**arguments, **{k: s for k, s in services.items() if k in known})
    if inspect.isawaitable(returned):
        returned = asyncio.run(_awaited(returned))
    return {'returned': returned, 'metrics': logs.metrics, 'extra': logs.extra}


async def _awaited(awaitable: Any) -> object:
    return await awaitable


def _plain(value: Any) -> object:
    """Return arrays and their numbers as JSON types, and anything else as a text."""
    return value.tolist() if hasattr(value, 'tolist') else repr(value)[:_LONGEST]


def _describe(error: BaseException) -> str:
    from grpo_jax.plugins import place_of

    return f'it raised {type(error).__name__}: {str(error)[:_LONGEST]}{place_of(error)}'


def _decode(text: str) -> Any:
    return _unpickle(base64.b64decode(text))


def _send(results: int, line: bytes) -> None:
    line += b'\n'
    while line:
        line = line[_write(results, line) :]


def _end_with(parent: int) -> None:
    """End this process when the one that started it has been killed."""
    while _parent() == parent:
        time.sleep(1)
    _exit_now(1)


if __name__ == '__main__':
    main()
