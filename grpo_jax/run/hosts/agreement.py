"""What processes tell each other in short texts: errors, decisions and signals."""

import contextlib
import itertools
import json
import os
import signal
import time
import traceback
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import jax

from grpo_jax.run.errors import ConfigError, is_disk_full, naming_file, problems_of
from grpo_jax.run.hosts.state import WAIT, ProcessesError, client, count, index, is_first, late

T = TypeVar('T')

_rounds = itertools.count()
_boundaries = itertools.count()
_stop: list[int] = []  # signals
_STOP = 'grpo_jax/stop'


class Stopped(KeyboardInterrupt):
    """A signal stops the run.

    Attributes:
      number: of the signal.
    """

    def __init__(self, number: int) -> None:
        self.number, self.name = number, signal.Signals(number).name
        super().__init__(f'stopped by {self.name}; the same command goes on from what is saved')


def exchange(text: str, what: str) -> list[str]:
    """Returns the texts of all processes, by their number; waits for them.

    Args:
      text: of this process, a short one.
      what: what the processes come to, for the error message.

    Raises:
      ProcessesError: one of them did not come within `WAIT` seconds.
    """
    if count() == 1:
        return [text]
    service, number = client(), next(_rounds)

    def key(number: int, process: int) -> str:
        return f'grpo_jax/{number}/{process}'

    service.key_value_set_bytes(key(number, index()), b'=' + text.encode('utf-8', 'surrogatepass'))
    deadline, texts = time.monotonic() + WAIT, []
    for process in range(count()):
        left = max(deadline - time.monotonic(), 0.001)
        try:
            found = service.blocking_key_value_get_bytes(key(number, process), int(1000 * left))
        except jax.errors.JaxRuntimeError as error:
            raise ProcessesError(late([process], what)) from error
        texts.append(found[1:].decode('utf-8', 'surrogatepass'))
    if number > 1:  # read by all, since all have written the texts after it
        service.key_value_delete(key(number - 2, index()))
    return texts


def same(value: Any, what: str) -> None:
    """Checks that all processes have the same value.

    Args:
      value: JSON.
      what: its name.

    Raises:
      ProcessesError: they have not; names the first that differs.
    """
    texts = exchange(json.dumps(value, sort_keys=True), what)
    for process, text in enumerate(texts):
        if text != texts[0]:
            ours, theirs = (
                _shortened(t, _first_difference(texts[0], text)) for t in (texts[0], text)
            )
            raise in_all_processes(ProcessesError(
                f'{what} of process {process} differs from that of process 0: {theirs} there, '
                f'{ours} here; start the same command in all processes'
            ))  # fmt: skip


@contextlib.contextmanager
def together(what: str, kind: type[ValueError] = ConfigError) -> Iterator[None]:
    """Raises an error of the block in all processes, if there is one in any of them.

    The block must not wait for other processes.

    Args:
      what: what the block does.
      kind: class of the error, made from its message (`ConfigError`: a list of messages).
    """
    if count() == 1:
        yield
        return
    own: Exception | None = None
    try:
        yield
    except Exception as error:
        own = error
    raise_in_all(own, what, kind)


def raise_in_all(own: Exception | None, what: str, kind: type[ValueError] = ConfigError) -> None:
    """Raises the errors of all processes in all of them; nothing if there is none.

    Args:
      own: the error of this process.
      what: what it happened in.
      kind: see `together`.
    """
    texts = exchange(json.dumps(None if own is None else _messages(own, kind)), what)
    found = {i: messages for i, text in enumerate(texts) if (messages := json.loads(text))}
    if not found:
        return
    everywhere = len(found) == len(texts) and len({str(m) for m in found.values()}) == 1
    if everywhere and own is not None:
        raise in_all_processes(own)
    named = [f'process {i}: {message}' for i, messages in found.items() for message in messages]
    error: Any = ConfigError(named) if kind is ConfigError else kind('; '.join(named))
    raise in_all_processes(error) from own


def _messages(error: Exception, kind: type[Exception]) -> list[str]:
    if isinstance(error, kind | ValueError | OSError) or is_disk_full(error):
        return [' '.join(text.split()) for text in problems_of(error)]
    traceback.print_exception(error)  # the others get its message alone
    return [f'{type(error).__name__}: {error}']


def in_all_processes(error: BaseException) -> BaseException:
    """Marks an error that is raised in all processes at the same place, which can end together."""
    error.grpo_jax_in_all = True  # type: ignore[attr-defined]
    return error


def is_in_all_processes(error: BaseException) -> bool:
    """Whether an error is raised in all processes at the same place."""
    return count() == 1 or getattr(error, 'grpo_jax_in_all', False)


def from_first(function: Callable[[], T], what: str) -> T:
    """Calls a function in the first process, and returns its result in all.

    Args:
      function: returns JSON types.
      what: what it does.

    Raises:
      ConfigError: it raised an error, which is raised in all processes.
    """
    if count() == 1:
        return function()
    result: Any = None
    with together(what):
        if is_first():
            result = function()
    return json.loads(exchange(json.dumps(result), what)[0])


def is_seen(folder: Any) -> bool:
    """Whether this process sees what process 0 writes into a folder; all of them call it."""
    if count() == 1:
        return True
    path = folder / 'processes.txt'
    text = from_first(lambda: _written(path), f'writing {path}')
    with together(f'reading {path}'):
        seen = path.read_text() if path.exists() else ''
    if is_first():
        path.unlink()
    return bool(seen == text)


def check_shared(folder: Any, name: str = 'workdir') -> None:
    """Checks that all processes see the same folder.

    Args:
      folder: a path.
      name: of the option, for the error.

    Raises:
      ConfigError: one of them does not see what process 0 wrote.
    """
    seen = is_seen(folder)
    with together(f'reading {folder}'):
        if not seen:
            raise ConfigError([
                f'{name} {str(folder)!r} is another folder than that of process 0: name a folder '
                "that all hosts share, or for checkpoints a bucket, checkpoint.folder='gs://…'"
            ])  # fmt: skip


def _written(path: Any) -> str:
    text = os.urandom(8).hex()
    with naming_file(path):
        path.write_text(text)
    return text


def request_stop(number: int) -> None:
    """Asks for all processes to stop, see `stop_requested`; may be called by a signal handler."""
    _stop.append(number)


def stop_requested(*, behind: int) -> int:
    """The signal by which all processes stop here, or 0.

    Call it between two steps, equally often in all of them.

    The first process chooses the boundary, one that no process can have passed by then, so that
    nothing waits for the others.

    Args:
      behind: how many steps the first process can be behind another one at most.
    """
    if count() == 1:
        return 0
    boundary, service = next(_boundaries), client()
    if _stop:
        service.key_value_set(f'{_STOP}/wanted', str(_stop[0]), allow_overwrite=True)
    chosen = _value_of(f'{_STOP}/boundary')
    if is_first() and not chosen and (wanted := _value_of(f'{_STOP}/wanted')):
        chosen = f'{boundary + behind} {wanted}'
        service.key_value_set(f'{_STOP}/boundary', chosen)
    here, _, number = chosen.partition(' ')
    return int(number) if here == str(boundary) else 0


def _value_of(key: str) -> str:
    """The value that a process has set; empty if none has."""
    try:
        value: str = client().key_value_try_get(key)
    except jax.errors.JaxRuntimeError:  # not found
        return ''
    return value


def _first_difference(a: str, b: str) -> int:
    pairs = enumerate(zip(a, b, strict=False))
    return next((i for i, (x, y) in pairs if x != y), min(len(a), len(b)))


def _shortened(text: str, position: int) -> str:
    start = max(text.rfind(', ', 0, position) + 1, position - 60, 0)
    return f'…{text[start : position + 40].strip()}…'
