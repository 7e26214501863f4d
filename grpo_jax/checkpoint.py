"""Saving and restoring training states with orbax, and the claim of a run on its folder."""

import os
import pathlib
import tempfile
from typing import Any

import jax
import orbax.checkpoint as ocp
from jax.sharding import Mesh
from ml_collections import ConfigDict

from grpo_jax import sharding
from grpo_jax.config import differing_keys, to_json


def claim_workdir(workdir: str, config: ConfigDict) -> pathlib.Path:
    """Makes the run's folder, or checks that it belongs to a run of this very config.

    Raises:
      ValueError: the folder cannot be written to, or holds the run of another config.
    """
    path = pathlib.Path(workdir).absolute()
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            pass
    except OSError as error:
        raise ValueError(
            f'workdir {str(path)!r} cannot be written to ({error.strerror}): name another folder'
        ) from error
    saved = path / 'config.json'
    if saved.exists():
        different = differing_keys(config, saved.read_text())
        if different:
            raise ValueError(
                f'workdir {str(path)!r} holds the run of another config: {"; ".join(different)}. '
                'Use another --workdir, or the same config to resume'
            )
    else:
        partial = saved.with_suffix('.partial')
        partial.write_text(to_json(config))
        os.replace(partial, saved)
    return path


def open_manager(path: pathlib.Path, *, keep: int) -> ocp.CheckpointManager:
    """An orbax manager for one stage's folder, where a save that was cut off does not count."""
    options = ocp.CheckpointManagerOptions(max_to_keep=keep)
    return ocp.CheckpointManager(path, options=options)


def save(manager: ocp.CheckpointManager, step: int, state: Any) -> None:
    """Saves the state of after `step` training steps, in the background."""
    manager.save(step, args=ocp.args.StandardSave(state), force=True)


def restore(
    manager: ocp.CheckpointManager, abstract: Any, mesh: Mesh, step: int | None = None
) -> Any:
    """Reads a state (the newest, or that of `step`) straight onto the mesh.

    Args:
      manager: from `open_manager`.
      abstract: ShapeDtypeStructs of the state.
      mesh: where it shall lie, whatever mesh wrote it.
      step: which one.

    Raises:
      ValueError: there is none.
    """
    step = manager.latest_step() if step is None else step
    if step is None or step not in manager.all_steps():
        raise ValueError(
            f'{manager.directory} holds no checkpoint of step {step}; it has {manager.all_steps()}'
        )
    target = jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
        abstract,
        sharding.shardings(abstract, mesh),
    )
    return manager.restore(step, args=ocp.args.StandardRestore(target))
