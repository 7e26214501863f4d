"""Calls reward functions in worker processes, which may crash, hang or run out of memory."""

import atexit
import base64
import functools
import json
import os
import pathlib
import pickle
import sys
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from grpo_jax import plugins
from grpo_jax.rewards.call_options import CallOptions
from grpo_jax.rewards.calls import RewardFunction
from grpo_jax.rewards.logs import Logs, TrainerState
from grpo_jax.rewards.output import printable
from grpo_jax.rewards.processes import Lost, ProcessPool

_SCRIPT = pathlib.Path(__file__).with_name('isolated_worker.py')

_pools: dict[str, ProcessPool] = {}  # by what their workers are started with


class Request(NamedTuple):
    """What a function is called with."""

    arguments: Mapping[str, Sequence[object]]
    trainer_state: TrainerState | None


class Result(NamedTuple):
    """What a function returned, as JSON types, and logged."""

    returned: object
    logs: Logs


def call(
    function: RewardFunction, options: CallOptions, requests: Sequence[Request]
) -> list[Result | str]:
    """Call a function in parallel.

    Args:
        function: its options are bound by `functools.partial`.
        options: with its path.
        requests: the arguments of each call.

    Returns:
        The results; for a call that failed, why.

    Raises:
        ChildProcessError: the worker processes do not start.
    """
    pool = _pool_of(function, options)
    encoded = [_encode((dict(r.arguments), r.trainer_state)) for r in requests]
    results = pool.run(encoded, seconds=options.timeout)
    return [_result(result, options) for result in results]


def _result(line: str | Lost, options: CallOptions) -> Result | str:
    if line is Lost.TIMEOUT:
        return f'it did not return within its deadline of {options.timeout:g} s'
    if isinstance(line, Lost):
        return (
            'its worker process ended (it crashed, called os._exit, or used more than '
            f'memory={options.memory:g} GiB)'
        )
    try:
        answer = json.loads(line)
        if 'error' in answer:
            return printable(str(answer['error']))
        return Result(answer['returned'], Logs(answer['metrics'], answer['extra']))
    except (ValueError, TypeError, KeyError):
        return 'its worker process wrote something else than a result'


def _pool_of(function: RewardFunction, options: CallOptions) -> ProcessPool:
    """Return the pool of a function; it closes at exit."""
    bound = function.keywords if isinstance(function, functools.partial) else {}
    spec = {
        'path': options.path,
        'folders': plugins.folders(),
        'search': sys.path,
        'memory': options.memory,
        'options': _encode(bound),
    }
    # JAX in a worker must not take the devices of the run.
    environment = {**os.environ, 'JAX_PLATFORMS': 'cpu', 'PYTHONUNBUFFERED': '1'}
    key = json.dumps(spec)
    if key not in _pools:
        _pools[key] = ProcessPool(
            [sys.executable, '-P', str(_SCRIPT), key], environment=environment
        )
        atexit.register(_pools[key].close)
    return _pools[key]


def _encode(value: object) -> str:
    return base64.b64encode(pickle.dumps(value)).decode()


def _forget_after_fork() -> None:
    """Detach a forked child, which must not use or kill the workers of its parent."""
    for pool in _pools.values():
        atexit.unregister(pool.close)
    _pools.clear()


os.register_at_fork(after_in_child=_forget_after_fork)
