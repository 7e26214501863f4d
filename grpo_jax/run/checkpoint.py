"""Saving and restoring training states with Orbax, and which run a folder belongs to."""

import logging
import os
import pathlib
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.sharding import Mesh
from ml_collections import ConfigDict

from grpo_jax import sharding
from grpo_jax.run import buckets, changes, hosts, listing, saved_config
from grpo_jax.run.errors import naming_file
from grpo_jax.run.layout import checkpoints
from grpo_jax.run.listing import find_checkpoint as find_checkpoint
from grpo_jax.run.listing import steps_of_stages as steps_of_stages
from grpo_jax.run.managers import clear_errors as clear_errors
from grpo_jax.run.managers import finish_saves as finish_saves
from grpo_jax.run.managers import open_manager as open_manager
from grpo_jax.run.managers import open_to_read as open_to_read
from grpo_jax.types import Params, Prompts, Rollout, TrainState

log = logging.getLogger('grpo_jax')

# What a run leaves in its folder, except for prepared data and compiled programs.
OF_RUN = (
    'config.json', 'changes.jsonl', 'loggers.json', 'metrics.jsonl', 'completions.jsonl',
    'heldout.jsonl', 'reward.png', 'tensorboard', 'checkpoints', 'replay', 'pretrained',
    'compute.json', 'inputs.json', 'environment.json', 'stopped',
)  # fmt: skip


def check_workdir(
    workdir: str, config: ConfigDict, *, extend: bool = False, override: bool = False
) -> tuple[pathlib.Path, ConfigDict]:
    """Checks that the folder can be written to and holds no run of another config.

    Args:
      workdir: the run's folder.
      config: the config to run with.
      extend: see `changes.check_changes`.
      override: see `changes.check_changes`.

    Returns:
      The folder, and the config to run with: keys that are None have the values of the run in the
      folder, if there is one. A try with another config that left no checkpoint is none, see
      `remove_failed_try`.

    Raises:
      ValueError: the folder, or that of the checkpoints, cannot be written to, or holds the run of
        another config that it cannot be resumed with, or the checkpoints are missing.
    """
    buckets.check_local('workdir', workdir)
    path, folder = pathlib.Path(workdir).absolute(), config.checkpoint.folder
    _check_writable('workdir', path)
    if buckets.in_bucket(folder):
        buckets.check_writable(checkpoints(path, folder))
    elif folder:
        _check_writable('checkpoint.folder', checkpoints(path, folder))
    if not (path / 'config.json').exists():
        listing.check_unused(path, folder)
        return path, config
    saved = saved_config.read(path / 'config.json')
    if holds_failed_try(path, config):
        return path, config
    if saved_config.differences(config, saved):
        done = steps_of_stages(path, folder)
        changes.check_changes(config, saved, path, done, extend=extend, override=override)
    listing.check_found(path, config, saved)
    return path, saved_config.with_saved_choices(config, saved)


def _check_writable(name: str, path: os.PathLike[str]) -> None:
    """Makes a folder, and a file in it.

    Raises:
      ValueError: it cannot; names the option `name`.
    """
    try:
        os.makedirs(path, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            pass
    except OSError as error:
        raise ValueError(
            f'{name} {os.fspath(path)!r} cannot be written to ({error.strerror}): name another '
            'folder'
        ) from error


def holds_failed_try(path: pathlib.Path, config: ConfigDict) -> bool:
    """Whether a folder holds what a run of another config left that has no checkpoint."""
    file = path / 'config.json'
    if not file.exists() or any(steps_of_stages(path, config.checkpoint.folder).values()):
        return False
    saved = saved_config.read(file, quiet=True)
    if not saved_config.differences(config, saved):
        return False
    return not any(steps_of_stages(path, saved.checkpoint.folder).values())


def remove_failed_try(path: pathlib.Path, config: ConfigDict) -> None:
    """Removes what a try with another config left, if it has no checkpoint, and says so.

    Call it after all checks of the config.

    Args:
      path: the run's folder.
      config: the config to run with.
    """
    if not holds_failed_try(path, config):
        return
    for name in OF_RUN:
        if (path / name).is_dir():
            shutil.rmtree(path / name)
        else:
            (path / name).unlink(missing_ok=True)
    log.warning(
        'workdir %r held a run of another config without a checkpoint: its records are removed, '
        'and this run starts from the beginning', str(path),
    )  # fmt: skip


def claim_workdir(path: pathlib.Path, config: ConfigDict) -> None:
    """Writes the config into the run's folder; call it after all checks of the config.

    What differs from the config there is recorded, see `changes.record_changes`.
    """
    if (path / 'config.json').exists():
        saved = saved_config.read(path / 'config.json', quiet=True)
        if saved_config.differences(config, saved):
            done = steps_of_stages(path, config.checkpoint.folder)
            changes.record_changes(config, saved, path, done)
    partial = path / 'config.partial'
    with naming_file(path / 'config.json'):
        partial.write_text(saved_config.to_json(config))
    os.replace(partial, path / 'config.json')


def newest_manager(workdir: pathlib.Path, kinds: Sequence[str]) -> ocp.CheckpointManager:
    """A manager for the last stage of a run that has a checkpoint. The caller closes it.

    Args:
      workdir: the run's folder.
      kinds: kinds of stages to consider: 'sft', 'grpo', 'reward'.

    Raises:
      ValueError: no such stage has a checkpoint.
    """
    stage, _ = find_checkpoint(workdir, kinds)
    return open_to_read(checkpoints(workdir) / stage)


def save(
    manager: ocp.CheckpointManager,
    step: int,
    state: TrainState,
    sampled: Rollout | None = None,
    position: Mapping[str, Any] | None = None,
    metrics: Mapping[str, float] | None = None,
) -> None:
    """Saves the state after `step` training steps, in the background.

    Parameters are a separate item, so that they can be read without the optimizer's state.

    Args:
      manager: from `open_manager`.
      step: number of steps.
      state: the training state; its buffers may be donated afterwards.
      sampled: rollout for the next step that was sampled from an older policy.
      position: JSON object with the stage's position in its data, see `rollouts.Position`.
      metrics: of the state, if the manager keeps the best one.

    Raises:
      OSError: see `finish_saves`, for the save before.
      ValueError: see `finish_saves`.
    """
    rest = state._replace(params=None)
    items = {
        'params': ocp.args.StandardSave(state.params),
        'rest': ocp.args.StandardSave(rest),
    }
    if sampled is not None:
        arrays = sampled._asdict() | {'prompts': sampled.prompts._asdict()}
        items['sampled'] = ocp.args.StandardSave(hosts.fetch(arrays))
    if position is not None:
        items['position'] = ocp.args.JsonSave(dict(position))
    finish_saves(manager)  # Orbax would wait too, and raise whatever a thread has raised
    manager.save(step, args=ocp.args.Composite(**items), metrics=metrics, force=True)


def restore(
    manager: ocp.CheckpointManager, abstract: TrainState, mesh: Mesh, step: int | None = None
) -> TrainState:
    """Reads a state onto the mesh, whatever mesh it was saved from.

    Args:
      manager: from `open_manager`.
      abstract: arrays or ShapeDtypeStructs of the state.
      mesh: the devices.
      step: which checkpoint; by default the newest.

    Raises:
      ValueError: there is no such checkpoint.
    """
    step = _existing(manager, step)
    params = ocp.args.StandardRestore(sharding.placed(abstract.params, mesh))
    rest = ocp.args.StandardRestore(sharding.placed(abstract._replace(params=None), mesh))
    items = manager.restore(step, args=ocp.args.Composite(params=params, rest=rest))
    return items.rest._replace(params=items.params)


def restore_params(
    manager: ocp.CheckpointManager, abstract: Params, mesh: Mesh, step: int | None = None
) -> Params:
    """Reads the parameters alone; arguments and errors as in `restore`."""
    items = ocp.args.Composite(params=ocp.args.StandardRestore(sharding.placed(abstract, mesh)))
    return manager.restore(_existing(manager, step), args=items).params


def restore_position(
    manager: ocp.CheckpointManager, step: int | None = None
) -> dict[str, Any] | None:
    """The position that a checkpoint holds, by default the newest; None of an earlier version."""
    step = _existing(manager, step)
    if not (manager.directory / str(step) / 'position').exists():
        return None
    items = manager.restore(step, args=ocp.args.Composite(position=ocp.args.JsonRestore()))
    return items.position


def restore_samples(
    manager: ocp.CheckpointManager, mesh: Mesh, step: int | None = None
) -> Rollout | None:
    """The rollout for the next step that a checkpoint holds, by default the newest; or None."""
    step = _existing(manager, step)
    if not (manager.directory / str(step) / 'sampled').exists():
        return None
    items = manager.restore(step, args=ocp.args.Composite(sampled=ocp.args.StandardRestore()))
    arrays = items.sampled
    if 'tokens' not in arrays:  # an earlier version saved it in parts, '0', '1', ...
        parts = [arrays[name] for name in sorted(arrays, key=int)]
        arrays = jax.tree.map(lambda *leaves: np.concatenate(leaves), *parts)
    prompts = Prompts(**arrays.pop('prompts'))
    return sharding.put_rollout(Rollout(prompts, **arrays), None, mesh)[0]


def _existing(manager: ocp.CheckpointManager, step: int | None) -> int:
    step = manager.latest_step() if step is None else step
    if step is None or step not in manager.all_steps():
        raise ValueError(
            f'{manager.directory} holds no checkpoint of step {step}; it has {manager.all_steps()}'
        )
    return step
