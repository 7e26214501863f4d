"""Which checkpoints of a run are intact: the newest one of these is read."""

import logging
import pathlib
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import TypeVar

from etils import epath
from orbax.checkpoint.path import atomicity

from grpo_jax.run import buckets, checksums, hosts
from grpo_jax.run.layout import checkpoints
from grpo_jax.run.listing import find_checkpoint, steps_of_stages

log = logging.getLogger('grpo_jax')

T = TypeVar('T')

DAMAGED = 'damaged'  # folder of damaged checkpoints in that of the run

# Errors of Orbax about files that it cannot read.
UNREADABLE = (ValueError, OSError, KeyError, TypeError, AttributeError)


def folder_of(workdir: pathlib.Path, stage: str, step: int, folder: str = '') -> epath.Path:
    """The folder of a checkpoint; `workdir` and `folder` as in `layout.checkpoints`."""
    return checkpoints(workdir, folder) / stage / str(step)


def newest_intact(workdir: pathlib.Path, stage: str, folder: str = '') -> int | None:
    """The step of the newest intact checkpoint of a stage, to resume from; None without any.

    Newer ones that are damaged are set aside, see `set_aside`.

    Args:
      workdir: the run's folder.
      stage: its name.
      folder: see `layout.checkpoints`.

    Raises:
      ValueError: all that there are are damaged; none is moved.
    """
    steps, found = steps_of_stages(workdir, folder).get(stage, []), {}
    for step in reversed(steps):
        problem = checksums.damage(folder_of(workdir, stage, step, folder))
        if not problem:
            break
        found[step] = problem
    if found and len(found) == len(steps):
        pairs = [(stage, step) for step in found]
        raise _all_damaged(checkpoints(workdir, folder), pairs, next(iter(found.values())))
    for step, problem in found.items():
        set_aside(workdir, stage, step, problem, folder)
    return steps[-1 - len(found)] if steps else None


def set_aside(workdir: pathlib.Path, stage: str, step: int, problem: str, folder: str = '') -> None:
    """Moves a damaged checkpoint out of the way, and says so.

    Args:
      workdir: the run's folder, where it is moved into the folder `damaged`.
      stage: its name.
      step: which checkpoint.
      problem: what is wrong with it.
      folder: see `layout.checkpoints`; if it is given, the checkpoint is moved within it.
    """
    source, base = folder_of(workdir, stage, step, folder), epath.Path(workdir / DAMAGED) / stage
    if folder:  # a folder for them would not exist on an object store until it holds a file
        base = checkpoints(workdir, folder) / f'{DAMAGED}-{stage}'
    number, target = 1, base.with_name(f'{base.name}-{step}')
    while target.exists():
        number += 1
        target = base.with_name(f'{base.name}-{step}-{number}')
    if not folder:
        target.parent.mkdir(exist_ok=True)
    if buckets.in_bucket(source):  # it is moved file by file, and counts as incomplete without this
        (source / atomicity.COMMIT_SUCCESS_FILE).unlink(missing_ok=True)
    source.rename(target)
    log.warning(
        'checkpoint %s/%d is damaged (%s): it is moved to %s, and the one before it is used',
        stage, step, problem, target,
    )  # fmt: skip


def read_newest(
    workdir: pathlib.Path,
    kinds: Sequence[str],
    name: str,
    read: Callable[[str, int], T],
    items: Collection[str],
    folder: str = '',
) -> T:
    """Reads a checkpoint, or the newest intact one before it; changes nothing in the folder.

    Args:
      workdir: the run's folder; its run may go on, and remove checkpoints.
      kinds: see `checkpoint.find_checkpoint`.
      name: see there. One with stage and step is read or none.
      read: reads the checkpoint of a stage and a step.
      items: those that it reads.
      folder: see `layout.checkpoints`.

    Raises:
      ValueError: there is no such checkpoint, or none that is intact.
    """
    damaged = dict[tuple[str, int], str]()
    while True:
        stage, step = hosts.from_first(
            lambda: _first_intact(workdir, kinds, name, items, folder, damaged),
            'choosing a checkpoint',
        )
        try:
            return read(stage, step)
        except UNREADABLE as error:
            path = folder_of(workdir, stage, step, folder)
            if hosts.count() > 1 or (path.exists() and checksums.has_checksums(path)):
                raise
            damaged[stage, step] = f'{type(error).__name__}: {error}'


def _first_intact(
    workdir: pathlib.Path,
    kinds: Sequence[str],
    name: str,
    items: Collection[str],
    folder: str,
    damaged: dict[tuple[str, int], str],
) -> tuple[str, int]:
    """The checkpoint that a name stands for, or the newest before it whose files are intact.

    Adds those that it passes over to `damaged`.
    """
    while True:
        stage, step = found = find_checkpoint(workdir, kinds, name, folder)
        for stage, step in _before(steps_of_stages(workdir, folder), kinds, found):
            path = folder_of(workdir, stage, step, folder)
            if (stage, step) not in damaged:
                problem = checksums.damage(path, items)
                if not problem:
                    return stage, step
                if not path.exists():  # the run has just removed it
                    break
                damaged[stage, step] = problem
            if '/' in name or name.isdigit():
                raise ValueError(
                    f'checkpoint {stage}/{step} of {workdir} is damaged '
                    f'({damaged[stage, step]}): name another one'
                )
            log.warning(
                'checkpoint %s/%d is damaged (%s): the one before it is read',
                stage, step, damaged[stage, step],
            )  # fmt: skip
        else:
            raise _all_damaged(checkpoints(workdir, folder), [*damaged], damaged[found])


def _before(
    steps: Mapping[str, Sequence[int]], kinds: Sequence[str], found: tuple[str, int]
) -> Iterator[tuple[str, int]]:
    """Yields a checkpoint, and those before it."""
    pairs = [(s, step) for s in steps if s.split('-')[0] in kinds for step in steps[s]]
    yield from reversed([pair for pair in pairs if pairs.index(pair) <= pairs.index(found)])


def _all_damaged(folder: epath.Path, pairs: Sequence[tuple[str, int]], problem: str) -> ValueError:
    names = ', '.join(f'{stage}/{step}' for stage, step in pairs)
    return ValueError(
        f'no checkpoint is intact in {folder}: {names} (the newest: {problem}); '
        'restore one of them from a copy, or remove them to begin the stage again'
    )


def verified(workdir: pathlib.Path, folder: str = '') -> Iterator[tuple[str, str]]:
    """Yields the name of each checkpoint of a run, and what is wrong with it; empty: nothing.

    Args:
      workdir: the run's folder.
      folder: see `layout.checkpoints`.

    Raises:
      ValueError: there is none.
    """
    steps = steps_of_stages(workdir, folder)
    pairs = [(stage, step) for stage in steps for step in steps[stage]]
    if not pairs:
        raise ValueError(f'{folder or workdir} holds no checkpoint: name the folder of a run')
    for stage, step in pairs:
        path = folder_of(workdir, stage, step, folder)
        problem = checksums.damage(path)
        if not problem and not checksums.has_checksums(path):
            problem = 'has no checksums: an earlier version wrote it, or they have been removed'
        yield f'{stage}/{step}', problem
