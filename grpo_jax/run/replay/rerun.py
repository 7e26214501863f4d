"""Runs the steps from a checkpoint to a step again, by the loop that ran them first."""

import contextlib
import dataclasses
import math
import pathlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple, cast

from etils import epath
from ml_collections import ConfigDict

from grpo_jax.algorithm.explanation import TokenTerms
from grpo_jax.run import checkpoint, checksums, compiled, hosts, report, training
from grpo_jax.run.errors import ConfigError
from grpo_jax.run.graded_texts import without_records
from grpo_jax.run.inputs import Inputs, check_inputs
from grpo_jax.run.layout import checkpoints
from grpo_jax.run.parameters import initial_params, initial_reward_params
from grpo_jax.run.preparation import prepare_run
from grpo_jax.run.replay.folder import mirrored
from grpo_jax.run.replay.origin import Origin
from grpo_jax.run.rollouts import CollectedBatch, Position
from grpo_jax.run.setup import Setup
from grpo_jax.run.stage_loop import Snapshot, StageLoop
from grpo_jax.run.stages import Stage, StageParams
from grpo_jax.types import Rollout, TrainState

_ALL = 2**31 - 1


class Replayed(NamedTuple):
    """A step that was run again."""

    setup: Setup
    stage: str
    step: int
    origin: Origin
    changed: tuple[str, ...]  # data, tokenizer and code that are not those of the run, in words
    rollout: Rollout  # on the host, as the update got it
    rewards: Any  # on the host, see `types.Rewards`
    completions: list[dict[str, Any]]  # records of all that were sampled
    metrics: dict[str, float | None]
    terms: TokenTerms | None  # on the host; None: the stage trains no policy
    state: TrainState  # after the step, on the devices


@contextlib.contextmanager
def replayed(
    origin: Origin,
    workdir: pathlib.Path,
    step: int,
    *,
    update: int = 0,
    prompt: int = 0,
    completion: int = 0,
) -> Iterator[Replayed]:
    """Runs the steps of a stage from a checkpoint to `step` again; writes nothing into the run.

    Args:
      origin: where to begin.
      workdir: the run's folder.
      step: number of the step.
      update: the inner update whose terms are computed.
      prompt: number of a prompt, which the batch has to have.
      completion: number of a completion, which the prompts have to have.

    Raises:
      ConfigError: what the run needs has changed or is missing.
      rewards.RewardError: a reward function failed.
    """
    with mirrored(workdir) as folder, compiled.kept_in(folder / 'cache'), compiled.trimmed():
        with hosts.together('checking the config'):
            setup, stages = prepare_run(_quiet(origin.config), str(folder))
        changed = _changed_inputs(setup, workdir)
        saved = checkpoints(workdir, origin.config.checkpoint.folder)
        stage, initial, position = _stage_start(setup, stages, saved, origin.stage)
        _check_numbers(stage, update=update, prompt=prompt, completion=completion)
        recorder = _Recorder(stage, step, update)
        snapshot = _snapshot(setup, stage, saved, initial, position, origin.start)
        short = dataclasses.replace(
            stage, steps=step + 1, heldout=None, plan=None, step=recorder.update
        )
        with checkpoint.open_manager(checkpoints(folder), keep=1) as manager:
            loop = _Loop(setup, short, manager, initial, snapshot)
            loop.records = recorder
            state = loop.run().state
        yield Replayed(
            setup, stage.name, step, origin, changed, *recorder.batch, recorder.rows,
            recorder.values, recorder.terms, state,
        )  # fmt: skip


def _quiet(config: ConfigDict) -> ConfigDict:
    """The config with all completions recorded, without services, and never stopped by `health`.

    Its checkpoints are not those of the run.
    """
    config = config.copy_and_resolve_references()
    config.checkpoint.folder = ''
    config.log.update(completions=_ALL, to=())
    config.health.update(skipped_updates=0, grad_norm=0.0)
    return config


def _changed_inputs(setup: Setup, workdir: pathlib.Path) -> tuple[str, ...]:
    """Data, tokenizer and code that are not those of the run, in words."""
    try:
        check_inputs(cast(Inputs, setup.inputs), workdir, override=False)
    except ConfigError as error:
        return tuple(text.partition(': restore')[0] for text in error.problems)
    return ()


def _stage_start(
    setup: Setup, stages: list[Stage], saved: epath.Path, name: str
) -> tuple[Stage, StageParams, Position]:
    """The stage, and the parameters and the position that it began with."""
    if name not in [stage.name for stage in stages]:
        known = ', '.join(stage.name for stage in stages)
        raise ValueError(f'--stage={name}: the run has no such stage; it has {known}')
    params = StageParams(initial_params(setup), reward=initial_reward_params(setup))
    position = Position()
    for stage in stages:
        params, position = training.at_start(setup, params, position)
        if stage.name == name:
            break
        state, position, _ = _snapshot(setup, stage, saved, params, position, stage.steps)
        params = stage.finish(params, state)
    return stage, params, position


def _snapshot(
    setup: Setup,
    stage: Stage,
    saved: epath.Path,
    initial: StageParams,
    position: Position,
    step: int,
) -> Snapshot:
    """The snapshot of a stage after `step` steps: its start, or that of a saved checkpoint."""
    fresh = Snapshot(stage.start(initial), position)
    if not step:
        return fresh
    folder = saved / stage.name
    if problem := checksums.damage(folder / str(step)):
        raise ValueError(f'checkpoint {stage.name}/{step} cannot be read: {problem}')
    with checkpoint.open_to_read(folder) as manager:
        return training.restored(setup, stage, manager, fresh.state, step)


def _check_numbers(stage: Stage, **numbers: int) -> None:
    """Raises ValueError for an inner update, prompt or completion that its steps do not have."""
    groups, size, *_ = stage.shape
    pairs = stage.algorithm is not None and stage.algorithm.pairwise
    counts = {'update': stage.updates, 'prompt': groups, 'completion': 2 if pairs else size}
    for name, number in numbers.items():
        if number >= counts[name]:
            raise ValueError(
                f'--{name}={number}: the steps of {stage.name} have {counts[name]}, numbered from 0'
            )


class _Recorder(report.NoRecords):
    """Keeps the records of one step, its batch, and the terms of its update."""

    def __init__(self, stage: Stage, step: int, update: int) -> None:
        self.of, self.step, self.inner_update = stage, step, update
        self.batch: tuple[Rollout, Any]
        self.terms: TokenTerms | None = None
        self.values: dict[str, float | None] = {}
        self.rows: list[dict[str, Any]] = []

    def update(
        self, state: TrainState, initial: StageParams, batch: CollectedBatch
    ) -> tuple[TrainState, Any]:
        """The training step, before which the terms of the recorded step are computed."""
        if batch.position.step == self.step + 1:
            self.batch = hosts.fetch((without_records(batch.rollout), batch.rewards))
            if self.of.explain is not None:
                terms = self.of.explain(state, initial, batch, self.inner_update)
                self.terms = hosts.fetch(terms)
        return self.of.step(state, initial, batch)

    def metrics(self, step: int, values: Mapping[str, float]) -> None:
        if step == self.step:
            self.values = {k: v if math.isfinite(v) else None for k, v in values.items()}

    def completions(self, step: int, rows: Iterable[Mapping[str, Any]]) -> None:
        if step == self.step:
            self.rows = [dict(row) for row in rows]


class _Loop(StageLoop):
    """The loop of a stage, which saves no checkpoints."""

    records: _Recorder

    def _open_records(self) -> report.Records:
        return self.records

    def _save(self) -> None:
        pass
