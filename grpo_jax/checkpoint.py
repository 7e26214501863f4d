"""Saving and restoring training states with orbax, and the claim of a run on its folder."""

import os
import pathlib
import tempfile
from collections.abc import Sequence

import jax
import orbax.checkpoint as ocp
from jax.sharding import Mesh
from ml_collections import ConfigDict

from grpo_jax import sharding
from grpo_jax.config import differing_keys, to_json
from grpo_jax.types import Params, Prompts, Rollout, TrainState, stage_order


def check_workdir(workdir: str, config: ConfigDict) -> pathlib.Path:
    """Makes sure that the folder can be written to and belongs to no other config's run.

    Raises:
      ValueError: it cannot, or it does.
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
    different = differing_keys(config, saved.read_text()) if saved.exists() else []
    if different:
        raise ValueError(
            f'workdir {str(path)!r} holds the run of another config: {"; ".join(different)}. Use '
            'another --workdir, or the same config to resume'
        )
    return path


def claim_workdir(path: pathlib.Path, config: ConfigDict) -> None:
    """Writes the config into the run's folder, once everything in it has been checked."""
    partial = path / 'config.partial'
    partial.write_text(to_json(config))
    os.replace(partial, path / 'config.json')


def open_manager(path: pathlib.Path, *, keep: int) -> ocp.CheckpointManager:
    """An orbax manager for one stage's folder, where a save that was cut off does not count."""
    options = ocp.CheckpointManagerOptions(max_to_keep=keep)
    return ocp.CheckpointManager(path, options=options)


def newest_manager(workdir: pathlib.Path, kinds: Sequence[str]) -> ocp.CheckpointManager:
    """A manager for the last stage of a run that saved anything.

    Args:
      workdir: the run's folder.
      kinds: 'sft', 'grpo' or 'reward'; the stages that are meant.

    Raises:
      ValueError: none did.
    """
    names = [path.name for path in (workdir / 'checkpoints').glob('*')]
    for stage in sorted(names, key=stage_order, reverse=True):
        if stage.partition('-')[0] in kinds:
            manager = open_manager(workdir / 'checkpoints' / stage, keep=1)
            if manager.latest_step():
                return manager
    raise ValueError(f'{workdir} holds no checkpoint: train first, or name another --workdir')


def save(
    manager: ocp.CheckpointManager,
    step: int,
    state: TrainState,
    sampled: Sequence[Rollout] | None = None,
) -> None:
    """Saves the state of after `step` training steps, in the background.

    Parameters are an item of their own, so that they can be read without the optimizer's state.

    Args:
      manager: from `open_manager`.
      step: how many.
      state: it may be donated afterwards.
      sampled: what was sampled for the next step from an older policy, in parts.
    """
    rest = state._replace(params=None)
    items = {
        'params': ocp.args.StandardSave(state.params),
        'rest': ocp.args.StandardSave(rest),
    }
    if sampled is not None:
        parts = {str(i): jax.device_get(part) for i, part in enumerate(sampled)}
        items['sampled'] = ocp.args.StandardSave({
            name: {**part._asdict(), 'prompts': part.prompts._asdict()}
            for name, part in parts.items()
        })  # fmt: skip
    manager.save(step, args=ocp.args.Composite(**items), force=True)


def restore(
    manager: ocp.CheckpointManager, abstract: TrainState, mesh: Mesh, step: int | None = None
) -> TrainState:
    """Reads a state (the newest, or that of `step`) straight onto the mesh.

    Args:
      manager: from `open_manager`.
      abstract: arrays or ShapeDtypeStructs of the state.
      mesh: where it shall lie, whatever mesh wrote it.
      step: which one.

    Raises:
      ValueError: there is none.
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


def restore_samples(manager: ocp.CheckpointManager, mesh: Mesh) -> list[Rollout] | None:
    """What the newest checkpoint holds of the samples of the next step; None without any."""
    step = _existing(manager, None)
    if not (manager.directory / str(step) / 'sampled').exists():
        return None
    parts = manager.restore(step, args=ocp.args.Composite(sampled=ocp.args.StandardRestore()))
    rollouts = [
        Rollout(**{**part, 'prompts': Prompts(**part['prompts'])})
        for _, part in sorted(parts.sampled.items(), key=lambda item: int(item[0]))
    ]
    return [sharding.put_groups(rollout, mesh) for rollout in rollouts]


def _existing(manager: ocp.CheckpointManager, step: int | None) -> int:
    step = manager.latest_step() if step is None else step
    if step is None or step not in manager.all_steps():
        raise ValueError(
            f'{manager.directory} holds no checkpoint of step {step}; it has {manager.all_steps()}'
        )
    return step
