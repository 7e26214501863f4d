"""Which checkpoints a run has, and whether they are where its config says."""

import pathlib
from collections.abc import Mapping, Sequence

import orbax.checkpoint as ocp
from ml_collections import ConfigDict

from grpo_jax.run import json_lines
from grpo_jax.run.layout import checkpoints, is_stage, stage_order

Steps = Mapping[str, Sequence[int]]


def steps_of_stages(workdir: pathlib.Path, folder: str = '') -> dict[str, list[int]]:
    """The steps of all checkpoints of a run, by stage; the stages are in their order.

    Args:
      workdir: the run's folder.
      folder: see `layout.checkpoints`.

    Raises:
      ValueError: the folder is in a bucket that cannot be read.
    """
    found = checkpoints(workdir, folder)
    stages = [path for path in found.iterdir() if is_stage(path.name)] if found.is_dir() else []
    return {
        path.name: sorted(ocp.utils.checkpoint_steps(path))
        for path in sorted(stages, key=lambda path: stage_order(path.name))
        if path.is_dir()
    }


def find_checkpoint(
    workdir: pathlib.Path, kinds: Sequence[str], name: str = '', folder: str = ''
) -> tuple[str, int]:
    """The stage and step of a checkpoint.

    Args:
      workdir: the run's folder.
      kinds: kinds of stages to consider: 'sft', 'grpo', 'reward'.
      name: 'STAGE/STEP', a stage, whose newest one is taken, or a step, of the last stage that has
        it; empty: the newest one of the last stage.
      folder: see `layout.checkpoints`.

    Raises:
      ValueError: there is none, or none of this name.
    """
    steps = steps_of_stages(workdir, folder)
    pairs = [(s, step) for s in steps if s.split('-')[0] in kinds for step in steps[s]]
    where = f'{folder}, the checkpoint.folder of {workdir},' if folder else f'{workdir}'
    if not pairs:
        raise ValueError(f'{where} holds no checkpoint: train first, or name another --workdir')
    stage, _, step = name.partition('/')
    if stage.isdigit() and not step:
        stage, step = '', stage
    for found in reversed(pairs):
        if stage in ('', found[0]) and step in ('', str(found[1])):
            return found
    known = ', '.join(f'{stage}/{step}' for stage, step in pairs)
    raise ValueError(f'{where} holds no checkpoint {name!r}: it has {known}')


def check_unused(workdir: pathlib.Path, folder: str) -> None:
    """Checks that a run that begins in a folder without a config finds no checkpoints of another.

    Args:
      workdir: the run's folder, which has no config.
      folder: see `layout.checkpoints`.

    Raises:
      ValueError: there are some.
    """
    newest = _newest(steps_of_stages(workdir, folder)) if folder else None
    if newest is not None:
        raise ValueError(
            f'checkpoint.folder={folder!r} holds the checkpoints of another run, such as '
            f'{_name(newest)}, and workdir {str(workdir)!r} none of its records: name another '
            "folder, or the workdir of that run; if that is lost, its saved 'config.json' in this "
            'one is enough to go on'
        )


def check_found(workdir: pathlib.Path, config: ConfigDict, saved: ConfigDict) -> None:
    """Checks that a run that is resumed does not begin anew because its checkpoints are elsewhere.

    Args:
      workdir: the run's folder.
      config: the config to resume with.
      saved: that of the run.

    Raises:
      ValueError: they are in the folder that the run had before, or nowhere.
    """
    folders = config.checkpoint.folder, saved.checkpoint.folder
    here, there = (str(checkpoints(workdir, folder)) for folder in folders)
    newest = _newest(steps_of_stages(workdir, folders[0]))
    if here == there:
        if folders[0] and newest is None and _has_saved(workdir, saved.checkpoint.every):
            raise ValueError(
                f'workdir {str(workdir)!r} has records of steps that were saved, but '
                f'checkpoint.folder={here!r} holds no checkpoint: restore them there or mount it, '
                'or name another --workdir to begin anew'
            )
        return
    try:
        before = _newest(steps_of_stages(workdir, folders[1]))
    except ValueError:  # a bucket that is gone
        return
    if before is not None and (newest is None or _order(newest) < _order(before)):
        raise ValueError(
            f'the newest checkpoint of the run, {_name(before)}, is in {there!r} and not in '
            f'checkpoint.folder={here!r}: copy the checkpoints there, or keep the folder'
        )


def _has_saved(workdir: pathlib.Path, every: int) -> bool:
    """Whether a checkpoint was complete before the steps in `metrics.jsonl`.

    The second save of a stage waits for the first, and the next stage for the last.
    """
    path = workdir / 'metrics.jsonl'
    lines = json_lines.read(path) if path.exists() else ()
    done = {line.row['stage']: line.row['step'] for line in lines}
    return len(done) > 1 or any(step >= 2 * every for step in done.values())


def _newest(steps: Steps) -> tuple[str, int] | None:
    """The stage and the step of the last checkpoint, if there is one."""
    return max(((s, step) for s in steps for step in steps[s]), key=_order, default=None)


def _order(found: tuple[str, int]) -> tuple[tuple[int, int], int]:
    return stage_order(found[0]), found[1]


def _name(found: tuple[str, int]) -> str:
    return f'{found[0]}/{found[1]}'
