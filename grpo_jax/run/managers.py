"""Orbax managers of checkpoints: which are kept, and how they become complete."""

import contextlib
import logging
import math
import sys
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import orbax.checkpoint as ocp
from etils import epath
from orbax.checkpoint.checkpoint_managers import (
    AnyPreservationPolicy,
    BestN,
    EveryNSteps,
    LatestN,
)

from grpo_jax.run.checksums import temporary_path_class
from grpo_jax.run.errors import is_disk_full, naming_file


def open_manager(
    path: epath.PathLike, *, keep: int, keep_every: int = 0, best: str = ''
) -> ocp.CheckpointManager:
    """An Orbax manager that writes one stage's checkpoints; it removes interrupted saves.

    Args:
      path: folder of the stage, in a bucket if it is one of `gs://`.
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


def open_to_read(path: epath.PathLike) -> ocp.CheckpointManager:
    """An Orbax manager that only reads one stage's checkpoints, also while a run writes them."""
    # Not with `read_only`, of which Orbax warns.
    options = ocp.CheckpointManagerOptions(
        create=False, cleanup_tmp_directories=False, save_root_metadata=False
    )
    return ocp.CheckpointManager(path, options=options)


def finish_saves(manager: ocp.CheckpointManager) -> None:
    """Waits until the checkpoints that are written in the background are complete.

    Raises:
      OSError: one cannot be written.
      JaxRuntimeError: another process has ended.
      ValueError: writing one failed in another way, as where a function of the user's has replaced
        one of the standard library's meanwhile.
    """
    try:
        manager.wait_until_finished()
    except Exception as error:
        if isinstance(error, OSError | jax.errors.JaxRuntimeError) or is_disk_full(error):
            raise
        raise ValueError(
            f'{manager.directory}: a checkpoint was not written ({type(error).__name__}: '
            f'{" ".join(str(error).split())}): the same command goes on from the newest one that '
            'was, if there is one'
        ) from error


@contextlib.contextmanager
def clear_errors(path: epath.PathLike) -> Iterator[None]:
    """Names a file in errors of saves in the block, and leaves out what else is printed of them.

    A save fails in several threads. Orbax logs a traceback of each, and its manager raises the
    error at the next call. TensorStore prints one for each write that ends after that.

    Args:
      path: folder of the stage.
    """
    logger, show = logging.getLogger('absl'), sys.unraisablehook
    logger.addFilter(_is_not_raised_too)
    sys.unraisablehook = lambda args: None if _is_of_failed_save(args) else show(args)
    try:
        with naming_file(path):
            yield
    finally:
        logger.removeFilter(_is_not_raised_too)
        sys.unraisablehook = show


def _is_not_raised_too(record: logging.LogRecord) -> bool:
    return not (record.levelno == logging.ERROR and record.exc_info and 'orbax' in record.pathname)


def _is_of_failed_save(args: Any) -> bool:
    return isinstance(args.exc_value, RuntimeError) and 'Event loop is closed' in str(
        args.exc_value
    )
