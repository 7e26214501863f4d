"""Which checkpoints of a run are intact: the newest one of these is read."""

import logging
import pathlib
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import TypeVar

from etils import epath

from grpo_jax.run import checksums, hosts
from grpo_jax.run.checkpoint import find_checkpoint, steps_of_stages

log = logging.getLogger('grpo_jax')

T = TypeVar('T')

DAMAGED = 'damaged'  # folder of damaged checkpoints in that of the run

# Errors of Orbax about files that it cannot read.
UNREADABLE = (ValueError, OSError, KeyError, TypeError, AttributeError)


def folder_of(workdir: pathlib.Path, stage: str, step: int) -> epath.Path:
    """The folder of a checkpoint."""
    return epath.Path(workdir) / 'checkpoints' / stage / str(step)


def newest_intact(workdir: pathlib.Path, stage: str) -> int | None:
    """The step of the newest intact checkpoint of a stage, to resume from; None without any.

    Newer ones that are damaged are set aside: moved to the folder `damaged` of the run.

    Raises:
      ValueError: all that there are are damaged; none is moved.
    """
    steps, found = steps_of_stages(workdir).get(stage, []), {}
    for step in reversed(steps):
        problem = checksums.damage(folder_of(workdir, stage, step))
        if not problem:
            break
        found[step] = problem
    if found and len(found) == len(steps):
        raise _all_damaged(workdir, [(stage, step) for step in found], next(iter(found.values())))
    for step, problem in found.items():
        set_aside(workdir, stage, step, problem)
    return steps[-1 - len(found)] if steps else None


def set_aside(workdir: pathlib.Path, stage: str, step: int, problem: str) -> None:
    """Moves a damaged checkpoint out of the way, and says so."""
    number, target = 1, workdir / DAMAGED / f'{stage}-{step}'
    while target.exists():
        number += 1
        target = target.with_name(f'{stage}-{step}-{number}')
    target.parent.mkdir(exist_ok=True)
    epath.Path(folder_of(workdir, stage, step)).rename(target)
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
) -> T:
    """Reads a checkpoint, or the newest intact one before it; changes nothing in the folder.

    Args:
      workdir: the run's folder; its run may go on, and remove checkpoints.
      kinds: see `checkpoint.find_checkpoint`.
      name: see there. One with stage and step is read or none.
      read: reads the checkpoint of a stage and a step.
      items: those that it reads.

    Raises:
      ValueError: there is no such checkpoint, or none that is intact.
    """
    damaged = dict[tuple[str, int], str]()
    while True:
        stage, step = hosts.from_first(
            lambda: _first_intact(workdir, kinds, name, items, damaged), 'choosing a checkpoint'
        )
        try:
            return read(stage, step)
        except UNREADABLE as error:
            folder = folder_of(workdir, stage, step)
            if hosts.count() > 1 or (folder.exists() and checksums.has_checksums(folder)):
                raise
            damaged[stage, step] = f'{type(error).__name__}: {error}'


def _first_intact(
    workdir: pathlib.Path,
    kinds: Sequence[str],
    name: str,
    items: Collection[str],
    damaged: dict[tuple[str, int], str],
) -> tuple[str, int]:
    """The checkpoint that a name stands for, or the newest before it whose files are intact.

    Adds those that it passes over to `damaged`.
    """
    while True:
        stage, step = found = find_checkpoint(workdir, kinds, name)
        for stage, step in _before(workdir, kinds, found):
            folder = folder_of(workdir, stage, step)
            if (stage, step) not in damaged:
                problem = checksums.damage(folder, items)
                if not problem:
                    return stage, step
                if not folder.exists():  # the run has just removed it
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
            raise _all_damaged(workdir, [*damaged], damaged[found])


def _before(
    workdir: pathlib.Path, kinds: Sequence[str], found: tuple[str, int]
) -> Iterator[tuple[str, int]]:
    """Yields a checkpoint, and those before it."""
    steps = steps_of_stages(workdir)
    pairs = [(s, step) for s in steps if s.split('-')[0] in kinds for step in steps[s]]
    yield from reversed([pair for pair in pairs if pairs.index(pair) <= pairs.index(found)])


def _all_damaged(
    workdir: pathlib.Path, pairs: Sequence[tuple[str, int]], problem: str
) -> ValueError:
    names = ', '.join(f'{stage}/{step}' for stage, step in pairs)
    return ValueError(
        f'no checkpoint is intact in {workdir / "checkpoints"}: {names} (the newest: {problem}); '
        'restore one of them from a copy, or remove them to begin the stage again'
    )


def verified(workdir: pathlib.Path) -> Iterator[tuple[str, str]]:
    """Yields the name of each checkpoint of a run, and what is wrong with it; empty: nothing.

    Raises:
      ValueError: there is none.
    """
    pairs = [(stage, step) for stage, steps in steps_of_stages(workdir).items() for step in steps]
    if not pairs:
        raise ValueError(f'{workdir} holds no checkpoint: name the folder of a run')
    for stage, step in pairs:
        folder = folder_of(workdir, stage, step)
        problem = checksums.damage(folder)
        if not problem and not checksums.has_checksums(folder):
            problem = 'has no checksums: an earlier version wrote it, or they have been removed'
        yield f'{stage}/{step}', problem
