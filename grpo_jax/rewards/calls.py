"""Call reward functions, each with its own copies of the lists; async ones run concurrently."""

import functools
import inspect
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TypeAlias, cast

from grpo_jax.plugins import did_you_mean, place_of
from grpo_jax.rewards.messages import takes_texts

# Called with keyword arguments; its result is checked here, so nothing is assumed about it.
RewardFunction: TypeAlias = Callable[..., object]
Columns: TypeAlias = Mapping[str, Sequence[object]]

# Every function is called with these; its other parameters are columns or options.
ARGUMENTS = ('prompts', 'completions', 'completion_ids')
# What a function gets only if its signature names it.
SERVICES = ('trainer_state', 'log_metric', 'log_extra')


class RewardError(ValueError):
    """A reward function is wrong or wrongly used; the message names the function and the row."""


def call_functions(
    functions: Mapping[str, RewardFunction],
    texts: Columns,
    *,
    conversations: Columns | None = None,
    services: Mapping[str, object] | None = None,
    kind: str = 'reward',
) -> dict[str, object]:
    """Call each function with its own copies of the lists.

    Whatever is awaitable in the results, such as those of `async def` functions and of wrappers
    around them, is awaited concurrently.

    Args:
        functions: name -> function.
        texts: name -> N values, the keyword arguments of every function.
        conversations: replaces `texts` for functions that were not made by `messages.on_texts`.
        services: name -> object, passed to the functions whose signatures name them.
        kind: what error messages call a function.

    Returns:
        name -> the result of the function, unchecked.

    Raises:
        RewardError: a function raises, or ends the program.
    """
    returned: dict[str, object] = {}
    try:
        for name, function in functions.items():
            plain = conversations is None or takes_texts(function)
            arguments = texts if plain else cast(Columns, conversations)
            with _named_errors(f'{kind} {name!r}', arguments):
                named = {
                    key: s for key, s in (services or {}).items() if key in parameters(function)
                }
                returned[name] = function(**copy_arguments(arguments, function), **named)
    except BaseException:
        for result in returned.values():
            if inspect.iscoroutine(result):
                result.close()  # it will never be awaited
        raise
    awaitables = {name: r for name, r in returned.items() if inspect.isawaitable(r)}
    return returned | _await_all(awaitables, texts, kind) if awaitables else returned


def _await_all(
    awaitables: Mapping[str, Awaitable[object]], arguments: Columns, kind: str
) -> dict[str, object]:
    """Await concurrently; return the results."""
    import asyncio  # only here: it would add a quarter to the time to import this package
    from concurrent.futures import ThreadPoolExecutor

    async def result_of(name: str, awaitable: Awaitable[object]) -> object:
        with _named_errors(f'{kind} {name!r}', arguments):
            return await awaitable

    async def call_all() -> list[object]:
        return await asyncio.gather(*(result_of(*item) for item in awaitables.items()))

    # In a new thread, because the caller's may already run an event loop, as in notebooks.
    with ThreadPoolExecutor(max_workers=1) as thread:
        results = thread.submit(lambda: asyncio.run(call_all())).result()
    return dict(zip(awaitables, results, strict=True))


@contextmanager
def _named_errors(function: str, arguments: Iterable[str] = ()) -> Iterator[None]:
    """Turn an exception into a RewardError that names the function; `sys.exit` counts as one."""
    try:
        yield
    except KeyboardInterrupt as interrupt:
        interrupt.add_note(f'{function} was running')
        raise
    except GeneratorExit:
        raise
    except BaseException as error:  # with SystemExit, which would end the program without an error
        called = f', called with {", ".join(arguments)},' if arguments else ''
        raise RewardError(
            f'{function}{called} raised {type(error).__name__}: {error}'
            f'{place_of(error)}{_hint(error)}'
        ) from error


def extract_answers(
    extract: Callable[[str], str | None], completions: Sequence[str]
) -> list[str | None]:
    """Call an extractor on each completion.

    Raises:
        RewardError: it raises, or returns anything but a text or None.
    """
    name = getattr(extract, '__name__', repr(extract))
    answers: list[str | None] = []
    for text in completions:
        with _named_errors(f'extractor {name!r}'):
            answer = extract(text)
        if answer is not None and not isinstance(answer, str):
            raise RewardError(
                f'extractor {name!r} returned {answer!r:.80}: return a text, or None without answer'
            )
        answers.append(answer)
    return answers


def _hint(error: BaseException) -> str:
    """Return a suggestion where a function seems to have got texts in the place of messages."""
    if isinstance(error, TypeError) and str(error).startswith('string indices must be integers'):
        return ". If it expects messages and got texts, set data.reward_inputs='messages'"
    if isinstance(error, AttributeError) and str(error).startswith("'list' object has no"):
        return ". If it expects texts and got messages, set data.reward_inputs='texts'"
    return ''


def copy_arguments(arguments: Columns, function: RewardFunction) -> dict[str, list[object]]:
    """Copy the arguments for a function, without columns that have the name of an option.

    A function may change its copies, lists and dictionaries in the columns included.
    """
    options = function.keywords if isinstance(function, functools.partial) else {}
    return {
        name: [list(ids) for ids in cast(Sequence[Sequence[int]], column)]
        if name == 'completion_ids'
        else _copy(list(column))
        for name, column in arguments.items()
        if name not in options
    }


def _copy(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _copy(item) for key, item in value.items()}
    return [_copy(item) for item in value] if isinstance(value, list) else value


def parameters(function: RewardFunction) -> Mapping[str, inspect.Parameter]:
    """Return the parameters of a function; none for one without a signature."""
    try:
        return inspect.signature(function).parameters
    except (ValueError, TypeError):  # some functions written in C have no signature
        return {}


def check_arguments(
    functions: Mapping[str, RewardFunction],
    columns: Sequence[str],
    *,
    arguments: Sequence[str] = ARGUMENTS,
    kind: str = 'reward',
) -> None:
    """Check from their signatures that functions can be called with the columns of a data set.

    Args:
        functions: name -> function.
        columns: names of the columns.
        arguments: what is passed in addition to the columns.
        kind: what error messages call a function.

    Raises:
        RewardError: a parameter without default is neither an argument nor a column (suggests the
            nearest), a column is not accepted, or a column has the name of an argument.
    """
    for column in columns:
        if column in (*ARGUMENTS, *SERVICES):
            raise RewardError(f'column {column!r} is the name of a reward argument: rename it')
    for name, function in functions.items():
        provided = (*arguments, *columns, *SERVICES)
        known = parameters(function)
        if not known:
            continue
        for key, parameter in known.items():
            variadic = parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
            if parameter.default is parameter.empty and not variadic and key not in provided:
                raise RewardError(
                    f'{kind} {name!r} needs {key!r}, which is not a column of the data set: it has '
                    f'{", ".join(columns)}{did_you_mean(key, columns, cutoff=0.6)}'
                )
        if not any(p.kind == p.VAR_KEYWORD for p in known.values()):
            passed = dict.fromkeys((*arguments, *columns))
            refused = [key for key in passed if key not in known and not _bound(function, key)]
            if refused:
                raise RewardError(
                    f'{kind} {name!r} does not accept {", ".join(refused)}: add **kwargs to its '
                    'parameters'
                )


def _bound(function: RewardFunction, key: str) -> bool:
    return isinstance(function, functools.partial) and key in function.keywords
