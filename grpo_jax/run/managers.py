"""Orbax managers of checkpoints: which are kept, and how they become complete."""

import math
import pathlib
from collections.abc import Mapping
from typing import Any

import orbax.checkpoint as ocp
from orbax.checkpoint.checkpoint_managers import (
    AnyPreservationPolicy,
    BestN,
    EveryNSteps,
    LatestN,
)

from grpo_jax.run.checksums import temporary_path_class


def open_manager(
    path: pathlib.Path, *, keep: int, keep_every: int = 0, best: str = ''
) -> ocp.CheckpointManager:
    """An Orbax manager that writes one stage's checkpoints; it removes interrupted saves.

    Args:
      path: folder of the stage.
      keep: how many of the newest checkpoints are kept.
      keep_every: a number of steps of whose multiples all are kept; 0: none.
      best: a metric of which the checkpoint with the largest value is kept, or with a '-' before
        its name the smallest; empty: none.
    """
    sign = -1.0 if best.startswith('-') else 1.0

    def quality(metrics: Mapping[str, float]) -> float:
        return sign * metrics.get(best.removeprefix('-'), -sign * math.inf)

    policies: list[Any] = [LatestN(keep)]
    if keep_every:
        policies.append(EveryNSteps(keep_every))
    if best:
        policies.append(BestN(get_metric_fn=quality, n=1, keep_checkpoints_without_metrics=False))
    options = ocp.CheckpointManagerOptions(
        best_fn=quality if best else None,
        preservation_policy=AnyPreservationPolicy(policies),
        cleanup_tmp_directories=True,
        temporary_path_class=temporary_path_class(path),
    )
    return ocp.CheckpointManager(path, options=options)


def open_to_read(path: pathlib.Path) -> ocp.CheckpointManager:
    """An Orbax manager that only reads one stage's checkpoints, also while a run writes them."""
    # Not with `read_only`, of which Orbax warns.
    options = ocp.CheckpointManagerOptions(
        create=False, cleanup_tmp_directories=False, save_root_metadata=False
    )
    return ocp.CheckpointManager(path, options=options)
