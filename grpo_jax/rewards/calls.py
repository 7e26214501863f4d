"""Call reward functions, each with its own copies of the lists; async ones run concurrently."""

import functools
import inspect
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import TypeAlias, cast

# Called with keyword arguments; its result is checked here, so nothing is assumed about it.
RewardFunction: TypeAlias = Callable[..., object]


class RewardError(ValueError):
    """A reward function is wrong or wrongly used; the message names the function and the row."""


def call_functions(
    functions: Mapping[str, RewardFunction], arguments: Mapping[str, Sequence[object]]
) -> dict[str, object]:
    """Call each function with its own copies of the lists, all async functions concurrently.

    Args:
        functions: name -> function.
        arguments: name -> N values, the keyword arguments of every function.

    Returns:
        name -> the result of the function, unchecked.

    Raises:
        RewardError: a function raises.
    """
    returned: dict[str, object] = {}
    concurrent = {name: f for name, f in functions.items() if _is_async(f)}
    for name, function in functions.items():
        if name not in concurrent:
            try:
                returned[name] = function(**copy_arguments(arguments, function))
            except Exception as error:
                raise _raised(name, error, arguments) from error
    if concurrent:
        for name, result in _call_async(concurrent, arguments).items():
            if isinstance(result, BaseException):
                raise _raised(name, result, arguments) from result
            returned[name] = result
    return returned


def _call_async(
    functions: Mapping[str, RewardFunction], arguments: Mapping[str, Sequence[object]]
) -> dict[str, object]:
    """Call async functions concurrently; return the result or the exception of each."""
    import asyncio  # only here: it would add a quarter to the time to import this package
    from concurrent.futures import ThreadPoolExecutor

    async def call(function: RewardFunction) -> object:
        return await cast(Awaitable[object], function(**copy_arguments(arguments, function)))

    async def call_all() -> list[object]:
        return await asyncio.gather(*map(call, functions.values()), return_exceptions=True)

    # In a new thread, because the caller's may already run an event loop, as in notebooks.
    with ThreadPoolExecutor(max_workers=1) as thread:
        results = thread.submit(lambda: asyncio.run(call_all())).result()
    return dict(zip(functions, results, strict=True))


def _is_async(function: RewardFunction) -> bool:
    if isinstance(function, functools.partial):
        function = function.func
    call = getattr(function, '__call__', None)  # noqa: B004 an instance may have an async call
    return inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(call)


def copy_arguments(
    arguments: Mapping[str, Sequence[object]], function: RewardFunction
) -> dict[str, list[object]]:
    """Copy the arguments for a function, without columns that have the name of an option."""
    options = function.keywords if isinstance(function, functools.partial) else {}
    return {name: list(column) for name, column in arguments.items() if name not in options}


def _raised(
    name: str, error: BaseException, arguments: Mapping[str, Sequence[object]]
) -> RewardError:
    return RewardError(
        f'reward {name!r}, called with {", ".join(arguments)}, '
        f'raised {type(error).__name__}: {error}'
    )
