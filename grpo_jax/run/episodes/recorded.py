"""The replies of an environment, kept so that a step that is sampled again gets the same ones.

A tool may answer differently the next time. A run that was killed in the middle of an episode, and
a replay of a step, read the replies of each batch from its file. A reply is used only where the
completion has the same tokens before it, which another policy or seed does not write.
"""

import hashlib
import os
import pathlib
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int

from grpo_jax.run import hosts, json_lines

FOLDER = 'replies'  # in the run's folder


class Reply(NamedTuple):
    """What an environment made of one turn."""

    tokens: list[int]  # that the policy reads next; empty: the episode is over
    outcome: str  # of `environments.OUTCOMES`, or 'no_room': it would leave none to the policy
    detail: str = ''  # what went wrong, in one line
    calls: list[dict[str, Any]] = []  # noqa: RUF012  # tool calls of the turn
    cut: bool = False  # the reply was longer
    seconds: float = 0.0
    reward: float | None = None  # by the environment
    round: int = 0  # of the exchange that gave it, see `exchange.Exchange`


class RecordedReplies:
    """The replies of one batch.

    Args:
      folder: of the run; None: nothing is kept in files, as in evaluations.
      name: of the batch, which names its files.

    Raises:
      ValueError: a file has been edited; names file and line.
    """

    def __init__(self, folder: pathlib.Path | None = None, name: str = '') -> None:
        self._path = folder and folder / FOLDER / f'{name}.{hosts.index()}.jsonl'
        self._known: dict[tuple[int, int, str], Reply] = {}
        self._file: json_lines.Appender | None = None
        if folder is not None:  # of all processes: a run may go on with another number of them
            for path in sorted((folder / FOLDER).glob(f'{name}.*.jsonl')):
                self._known.update(_read(path))

    def find(self, row: int, completion: int, read: Int[np.ndarray, ' n']) -> Reply | None:
        """Returns the reply to a turn, if it is known.

        Args:
          row: of the data set.
          completion: its number in the group.
          read: its tokens up to the end of the turn.
        """
        return self._known.get((row, completion, _digest(read)))

    def add(self, row: int, completion: int, read: Int[np.ndarray, ' n'], reply: Reply) -> None:
        """Keeps a reply, in the file at once; arguments as in `find`.

        Raises:
          OSError: the file cannot be written; names it.
        """
        key = row, completion, _digest(read)
        self._known[key] = reply
        if self._path is None:
            return
        if self._file is None:
            self._path.parent.mkdir(exist_ok=True)
            _cut_torn_line(self._path)
            self._file = json_lines.Appender(self._path)
        fields = dict(zip(('row', 'completion', 'read'), key, strict=True))
        self._file.write(json_lines.line(fields | reply._asdict()))

    def close(self) -> None:
        """Closes the file; what is known stays."""
        if self._file is not None:
            self._file.close()
            self._file = None


def remove_before(folder: pathlib.Path, stage: str, batch: int) -> None:
    """Removes the files of the batches of a stage before this one."""
    for path in (folder / FOLDER).glob(f'{stage}.*.jsonl'):
        number = path.name.split('.')[1]
        if number.isdecimal() and int(number) < batch:
            path.unlink(missing_ok=True)


def _cut_torn_line(path: pathlib.Path) -> None:
    """Removes a last line without an end, which was being written when the process was killed."""
    if path.exists() and not (data := path.read_bytes()).endswith(b'\n'):
        os.truncate(path, data.rfind(b'\n') + 1)


def _read(path: pathlib.Path) -> Iterator[tuple[tuple[int, int, str], Reply]]:
    for line in json_lines.read(path):
        fields: dict[str, Any] = dict(line.row)
        try:
            key = int(fields.pop('row')), int(fields.pop('completion')), str(fields.pop('read'))
            reply = Reply(**fields)
            if not all(isinstance(token, int) for token in reply.tokens):
                raise TypeError('tokens')
        except (KeyError, TypeError, ValueError) as error:
            raise json_lines.unreadable(path, line.number, 'is no reply') from error
        yield key, reply


def _digest(tokens: Int[np.ndarray, ' n']) -> str:
    return hashlib.sha256(np.asarray(tokens, '<i4').tobytes()).hexdigest()[:16]
