"""Checks before reward functions are called, their arguments, and errors that name them."""

import functools
import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple, TypeAlias, cast

from grpo_jax.plugins import did_you_mean, place_of
from grpo_jax.rewards.deadlines import CannotInterrupt, DeadlineExceeded, call_within
from grpo_jax.rewards.guards import guarded
from grpo_jax.rewards.logs import TrainerState
from grpo_jax.rewards.messages import takes_texts
from grpo_jax.rewards.output import printable

# Called with keyword arguments; its result is checked here, so nothing is assumed about it.
RewardFunction: TypeAlias = Callable[..., object]
Columns: TypeAlias = Mapping[str, Sequence[object]]

# Every function is called with these; its other parameters are columns or options.
ARGUMENTS = ('prompts', 'completions', 'completion_ids')
# What a function gets only if its signature names it.
SERVICES = ('trainer_state', 'log_metric', 'log_extra')

_LONGEST = 1000  # characters of the message of an exception


class RewardError(ValueError):
    """A reward function is wrong or wrongly used; the message names the function and the row."""


class Arguments(NamedTuple):
    """What functions are called with: N rows in each column."""

    texts: Columns
    conversations: Columns | None = None  # for functions that `messages.on_texts` did not make
    trainer_state: TrainerState | None = None

    def of(self, function: RewardFunction, rows: range) -> Columns:
        """Return the columns for a function, of these rows."""
        plain = self.conversations is None or takes_texts(function)
        columns = self.texts if plain else cast(Columns, self.conversations)
        return {name: column[rows.start : rows.stop] for name, column in columns.items()}

    def of_all(self, rows: range) -> Columns:
        """Return the texts of these rows."""
        return {name: column[rows.start : rows.stop] for name, column in self.texts.items()}

    @property
    def size(self) -> int:
        return len(self.texts['prompts'])


@contextmanager
def named_errors(function: str, arguments: Iterable[str] = ()) -> Iterator[None]:
    """Turn an exception into a RewardError that names the function; `sys.exit` counts as one."""
    try:
        yield
    except KeyboardInterrupt as interrupt:
        interrupt.add_note(f'{function} was running')
        raise
    except GeneratorExit:
        raise
    except (DeadlineExceeded, CannotInterrupt) as error:
        raise RewardError(f'{function}: {error}') from error
    except BaseException as error:  # with SystemExit, which would end the program without an error
        called = f', called with {", ".join(arguments)},' if arguments else ''
        raise RewardError(
            f'{function}{called} raised {type(error).__name__}: {_message(error)}'
            f'{place_of(error)}{_hint(error)}'
        ) from error


def _message(error: BaseException) -> str:
    """Return what an exception says, in at most `_LONGEST` printable characters."""
    try:
        text = str(error)
    except Exception as another:
        text = f'(its message cannot be made: {type(another).__name__})'
    return printable(text if len(text) <= _LONGEST else f'{text[:_LONGEST]}…')


def extract_answers(
    extract: Callable[[str], str | None], completions: Sequence[str], *, timeout: float = 0.0
) -> list[str | None]:
    """Call an extractor on each completion.

    Args:
        extract: the extractor.
        completions: N texts.
        timeout: seconds in which it has to answer for all of them; 0: no deadline.

    Raises:
        RewardError: it raises, takes too long, or returns anything but a text or None.
    """
    name = f'extractor {getattr(extract, "__name__", repr(extract))!r}'
    with named_errors(name), guarded(name):
        answers = call_within(timeout, name, lambda: [extract(text) for text in completions])
    for answer in answers:
        if answer is not None and not isinstance(answer, str):
            raise RewardError(
                f'{name} returned {answer!r:.80}: return a text, or None without answer'
            )
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
