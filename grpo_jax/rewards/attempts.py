"""Calls reward functions on a batch, in one call or in parts, with deadlines and retries.

Functions run one after another; then what is awaitable in their results is awaited concurrently.
"""

import dataclasses
import functools
import inspect
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

from grpo_jax.rewards import isolated
from grpo_jax.rewards.call_options import CallOptions, Failures, check_failures
from grpo_jax.rewards.calls import (
    Arguments,
    Columns,
    RewardError,
    RewardFunction,
    copy_arguments,
    named_errors,
    parameters,
)
from grpo_jax.rewards.deadlines import (
    GRACE,
    CannotInterrupt,
    DeadlineExceeded,
    call_in_thread,
    call_within,
    message,
)
from grpo_jax.rewards.guards import guarded
from grpo_jax.rewards.logs import Logs, join_logs

# (name, what the function returned, the arguments) -> one value for each row, or an error for it.
Check = Callable[[str, object, Columns], Sequence[object]]


class Outcome(NamedTuple):
    """The result of a function on N rows."""

    values: list[object]  # as `check` returned them; None where the function failed
    failed: list[bool]
    logs: Logs
    failures: Failures | None


def call_functions(
    functions: Mapping[str, RewardFunction],
    arguments: Arguments,
    check: Check,
    *,
    calls: Mapping[str, CallOptions],
    group_size: int | None = None,
    most_failed: int | None = None,
    kind: str = 'reward',
) -> dict[str, Outcome]:
    """Call each function with its own copies of the lists.

    Args:
        functions: name -> function.
        arguments: of N rows.
        check: checks what a function returned.
        calls: name -> how it is called.
        group_size: the number of rows of a group, which are next to each other; None: all.
        most_failed: the largest number of rows on which a function may fail.
        kind: what error messages call a function.

    Raises:
        RewardError: a function fails whose failures are errors, or one fails on too many rows.
    """
    batch = _Batch(functions, arguments, check, calls, group_size, most_failed, kind)
    waiting: list[_Waiting] = []
    try:
        for name in functions:
            if not batch.options(name).isolated:
                called = map(batch.call, batch.tasks(name))
                waiting += [result for result in called if result is not None]
    except BaseException:
        for _, result in waiting:
            if inspect.iscoroutine(result):
                result.close()  # it will never be awaited
        raise
    batch.await_all(waiting)
    for name in functions:
        if batch.options(name).isolated:
            batch.call_isolated(name)
    return {name: batch.outcome(name) for name in functions}


class _Task(NamedTuple):
    """A call of a function on some rows, and what it logs."""

    name: str
    rows: range
    logs: Logs
    attempt: int = 0


class _Waiting(NamedTuple):
    """A call whose result has to be awaited."""

    task: _Task
    result: Awaitable[object]


async def _awaited(awaitable: Awaitable[object], what: str, arguments: Columns) -> object:
    """Return the result of an awaitable, or the error that it raises."""
    try:
        with named_errors(what, arguments):
            return await awaitable
    except RewardError as error:
        return error


@dataclasses.dataclass
class _Batch:
    """Calls of functions on one batch, and their results so far; see `call_functions`."""

    functions: Mapping[str, RewardFunction]
    arguments: Arguments
    check: Check
    calls: Mapping[str, CallOptions]
    group_size: int | None
    most_failed: int | None
    kind: str

    def __post_init__(self) -> None:
        rows, names = self.arguments.size, list(self.functions)
        self._values: dict[str, list[object]] = {name: [None] * rows for name in names}
        self._errors: dict[str, dict[int, RewardError]] = {name: {} for name in names}
        self._logs: dict[str, list[tuple[range, Logs]]] = {name: [] for name in names}

    def options(self, name: str) -> CallOptions:
        return self.calls.get(name) or CallOptions()

    def tasks(self, name: str) -> list[_Task]:
        """Return the calls of a function that cover all rows."""
        return [_Task(name, rows, Logs({}, {})) for rows in self._parts(self.options(name))]

    def outcome(self, name: str) -> Outcome:
        errors, logs = self._errors[name], sorted(self._logs[name], key=lambda part: part[0].start)
        failures = Failures(len(errors), str(errors[min(errors)])) if errors else None
        failed = [row in errors for row in range(self.arguments.size)]
        joined = join_logs([(part, len(rows)) for rows, part in logs])
        return Outcome(self._values[name], failed, joined, failures)

    def call(self, task: _Task) -> _Waiting | None:
        """Call a function until it succeeds or has failed; return what has to be awaited."""
        current: _Task | None = task
        while current is not None:
            try:
                returned = self._call_once(current)
            except RewardError as error:
                current = self._fail(current, error)
                continue
            if inspect.isawaitable(returned):
                return _Waiting(current, returned)
            current = self._accept(current, returned)
        return None

    def await_all(self, waiting: Sequence[_Waiting]) -> None:
        """Await the results of functions concurrently, and call those again that have failed."""
        while waiting:
            results = self._await_once(waiting)
            again = []
            for (task, _), result in zip(waiting, results, strict=True):
                if isinstance(result, RewardError):
                    following = self._fail(task, result)
                else:
                    following = self._accept(task, result)
                called = None if following is None else self.call(following)
                if called is not None:
                    again.append(called)
            waiting = again

    def _await_once(self, waiting: Sequence[_Waiting]) -> list[object]:
        """Return the results, and the errors of those that do not end the batch."""
        import asyncio  # only here: it would add a quarter to the time to import this package

        results: dict[int, object] = {}

        async def settle(number: int, task: _Task, awaitable: Awaitable[object]) -> None:
            seconds, named = self.options(task.name).timeout, self._named(task)
            future = asyncio.ensure_future(_awaited(awaitable, named, self.arguments.texts))
            await asyncio.wait([future], timeout=seconds or None)
            late = not future.done() and future.cancel()
            result = RewardError(f'{named}: {message(seconds)}') if late else future.result()
            if isinstance(result, RewardError) and self._is_final(task):
                raise result
            results[number] = result

        async def settle_all() -> None:
            await asyncio.gather(*(settle(i, *item) for i, item in enumerate(waiting)))

        what = ', '.join(dict.fromkeys(self._named(task) for task, _ in waiting))
        timeouts = [self.options(task.name).timeout for task, _ in waiting]
        seconds = max(timeouts) + GRACE if all(timeouts) else 0.0
        # In a new thread, because the caller's may already run an event loop, as in notebooks.
        try:
            with guarded(what):
                call_in_thread(seconds, what, lambda: asyncio.run(settle_all()))
        except DeadlineExceeded as error:  # one that cannot be cancelled
            late = RewardError(f'{what}: {error}')
            return [results.get(number, late) for number in range(len(waiting))]
        except CannotInterrupt as error:
            raise RewardError(str(error)) from error
        return [results[number] for number in range(len(waiting))]

    def call_isolated(self, name: str) -> None:
        """Call a function in worker processes, on all parts at a time."""
        function, options = self.functions[name], self.options(name)
        pending = self.tasks(name)
        while pending:
            columns = [self.arguments.of(function, task.rows) for task in pending]
            copies = [copy_arguments(part, function) for part in columns]
            requests = [isolated.Request(part, self.arguments.trainer_state) for part in copies]
            with named_errors(self._named(pending[0])):
                results = isolated.call(function, options, requests)
            again = []
            for task, result in zip(pending, results, strict=True):
                if isinstance(result, str):
                    following = self._fail(task, RewardError(f'{self._named(task)}: {result}'))
                else:
                    following = self._accept(task._replace(logs=result.logs), result.returned)
                if following is not None:
                    again.append(following)
            pending = again

    def _parts(self, options: CallOptions) -> Iterator[range]:
        """Yield the rows of the calls of a function."""
        count, size = self.arguments.size, None
        if options.divided:
            size = 1 if options.per == 'completion' else self.group_size
        size = max(size or count, 1)
        for start in range(0, max(count, 1), size):
            yield range(start, min(start + size, count))

    def _named(self, task: _Task) -> str:
        return f'{self.kind} {task.name!r}'

    def _call_once(self, task: _Task) -> object:
        function = self.functions[task.name]
        arguments = self.arguments.of(function, task.rows)
        services = {
            'trainer_state': self.arguments.trainer_state,
            'log_metric': task.logs.log_metric,
            'log_extra': functools.partial(task.logs.log_extra, len(task.rows)),
        }
        known = parameters(function)
        named = {key: service for key, service in services.items() if key in known}
        copied = copy_arguments(arguments, function)
        what = self._named(task)
        with named_errors(what, arguments), guarded(what):
            return call_within(
                self.options(task.name).timeout, what, lambda: function(**copied, **named)
            )

    def _accept(self, task: _Task, returned: object) -> _Task | None:
        """Take the result of a call; return the next attempt if it is none."""
        try:
            values = self.check(task.name, returned, self.arguments.of_all(task.rows))
        except RewardError as error:
            return self._fail(task, error)
        errors = {row: value for row, value in enumerate(values) if isinstance(value, RewardError)}
        if errors and (task.attempt < self.options(task.name).retries or self._is_final(task)):
            return self._fail(task, errors[min(errors)])
        for row, value in enumerate(values):
            if row in errors:
                self._lose(task.name, task.rows[row], errors[row])
            else:
                self._values[task.name][task.rows[row]] = value
        self._logs[task.name].append((task.rows, task.logs))
        return None

    def _fail(self, task: _Task, error: RewardError) -> _Task | None:
        """Return the next attempt of a call that failed; None if there is none.

        Raises:
            RewardError: the error, or too many rows have failed.
        """
        if self._is_final(task):
            raise error
        if task.attempt < self.options(task.name).retries:
            return _Task(task.name, task.rows, Logs({}, {}), task.attempt + 1)
        for row in task.rows:
            self._lose(task.name, row, error)
        self._logs[task.name].append((task.rows, Logs({}, {})))
        return None

    def _is_final(self, task: _Task) -> bool:
        """Whether a failure of this call ends the batch."""
        options = self.options(task.name)
        return options.on_error == 'stop' and task.attempt >= options.retries

    def _lose(self, name: str, row: int, error: RewardError) -> None:
        errors = self._errors[name]
        errors[row] = error
        if self.most_failed is not None:
            failures = Failures(len(errors), str(errors[min(errors)]))
            check_failures({name: failures}, self.most_failed, kind=self.kind)
