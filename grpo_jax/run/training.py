"""A training run: its stages one after the other."""

import contextlib
import functools
import json
import os
import pathlib
from collections.abc import Callable, Mapping
from typing import cast

import orbax.checkpoint as ocp
from ml_collections import ConfigDict

from grpo_jax.run import (
    buckets,
    checkpoint,
    compiled,
    hosts,
    loggers,
    report,
    saved_config,
    signals,
)
from grpo_jax.run.checksums import has_checksums
from grpo_jax.run.config import module_folders
from grpo_jax.run.environment import keep_environment
from grpo_jax.run.inputs import Inputs, check_inputs, keep_inputs
from grpo_jax.run.intact import UNREADABLE, folder_of, newest_intact, set_aside
from grpo_jax.run.layout import checkpoints, stage_order
from grpo_jax.run.lock import held
from grpo_jax.run.loggers import Loggers
from grpo_jax.run.parameters import (
    initial_params,
    initial_reward_params,
    merged,
    random_params,
)
from grpo_jax.run.paths import make_absolute
from grpo_jax.run.plan.listed import warned_of_others
from grpo_jax.run.preparation import prepare_run
from grpo_jax.run.process_folder import check_shared, own_folder
from grpo_jax.run.rollouts import Position
from grpo_jax.run.setup import Setup, keep_description
from grpo_jax.run.stage_loop import Snapshot, StageLoop
from grpo_jax.run.stages import Stage, StageParams
from grpo_jax.types import TrainState

Log = Callable[[int, Mapping[str, float]], None]


def train(
    config: ConfigDict, workdir: str, *, extend: bool = False, override: bool = False
) -> dict[str, float]:
    """Runs or resumes all stages.

    Args:
      config: from a config file, with every key of `config.defaults()`.
      workdir: the run's folder.
      extend: continue the run in the folder for more steps.
      override: continue it with other steps, learning rates, or keys of eval, log, checkpoint and
        health, and with other data, another tokenizer or other code of rewards.

    Returns:
      The metrics of the last held-out evaluation; empty without one.

    Raises:
      ConfigError: all that the user has to fix in the config, the data and the workdir. Raised
        before training.
      lock.LockedError: another process trains in the workdir.
      hosts.Stopped: SIGINT, SIGTERM or SIGHUP was received. A checkpoint of the finished steps is
        saved.
      rewards.RewardError: a reward function failed. A checkpoint of the finished steps is saved.
    """
    buckets.check_local('workdir', workdir)
    if not config.module_folders:  # not from a config file
        config = config.copy_and_resolve_references()
        config.module_folders = module_folders(os.getcwd())
        make_absolute(config, os.getcwd(), ['checkpoint.folder'])
    shared = json.loads(saved_config.to_json(config)) | {'module_folders': None}  # may be elsewhere
    hosts.same(shared, 'the config')
    with contextlib.ExitStack() as stack:
        lock = held(pathlib.Path(workdir).absolute())
        hosts.from_first(lambda: stack.enter_context(lock), 'locking the workdir')
        stack.enter_context(signals.handled())
        return _train(config, workdir, extend=extend, override=override)


def _train(config: ConfigDict, workdir: str, *, extend: bool, override: bool) -> dict[str, float]:
    """`train` in a folder that this run has locked."""
    workdir = own_folder(config, workdir)
    with hosts.together('checking the config'), contextlib.ExitStack() as compilations:

        def compile_initial(setup: Setup) -> None:
            ahead = compiled.CompiledAhead(functools.partial(random_params, setup))
            compilations.callback(ahead.wait)

        setup, stages = prepare_run(
            config, workdir, extend=extend, override=override, meanwhile=compile_initial
        )
        path, inputs = setup.workdir, cast(Inputs, setup.inputs)
        folder = setup.config.checkpoint.folder
        if hosts.is_first() and any(checkpoint.steps_of_stages(path, folder).values()):
            check_inputs(inputs, path, override=override)
    hosts.same(dict(inputs.digests), 'the data, the tokenizer or the code of rewards')
    check_shared(setup.config, path)
    hosts.from_first(lambda: checkpoint.remove_failed_try(path, setup.config), 'cleaning up')
    if setup.config.start and not any(checkpoint.steps_of_stages(path, folder).values()):
        hosts.say(f'begins from {setup.config.start}')
    if setup.sampling_mesh != setup.mesh:
        devices = setup.sampling_mesh.shape['tensor']
        hosts.say(f'sampling: mesh.sampling_tensor={devices} devices share a copy of the weights')
    with (
        compiled.kept_in(path / 'cache'),
        compiled.trimmed(),
        compiled.counted() as count,
        warned_of_others(path),
        loggers.opened(setup.config, path) as everywhere,
    ):
        params = StageParams(initial_params(setup), reward=initial_reward_params(setup))
        hosts.from_first(lambda: _claim(setup), 'writing the config')
        position, offset = Position(), 0
        for stage in stages:
            params, position = at_start(setup, params, position)
            log = _log_of_stage(everywhere, stage, offset)
            params, position = _run_stage(setup, stage, params, position, log)
            offset += stage.steps
    hosts.say(str(count))
    return hosts.from_first(lambda: _report(setup), 'the report')


def at_start(setup: Setup, params: StageParams, position: Position) -> tuple[StageParams, Position]:
    """The parameters and the position that a stage starts with, from those the last one left."""
    if params.adapters is not None:
        policy = merged(setup, params.policy, params.adapters)
        params = params._replace(policy=policy, adapters=None)
    return params, position._replace(step=0, tokens=0)


def _claim(setup: Setup) -> None:
    path = setup.workdir
    steps = checkpoint.steps_of_stages(path, setup.config.checkpoint.folder)
    checkpoint.claim_workdir(path, setup.config)
    keep_inputs(cast(Inputs, setup.inputs), path, steps)
    keep_environment(setup.mesh, path, steps)
    keep_description(setup)


def _log_of_stage(everywhere: Loggers, stage: Stage, offset: int) -> Log:
    """A function that logs the metrics of a stage; `offset` is the number of earlier steps."""
    prefix = '' if stage.name.startswith('grpo') else f'{stage.name}/'

    def log(step: int, metrics: Mapping[str, float]) -> None:
        everywhere.log(offset + step, {prefix + name: x for name, x in metrics.items()})

    return log


def _report(setup: Setup) -> dict[str, float]:
    """Prints the result of the run; returns the metrics of the last evaluation."""
    steps = setup.config.grpo.steps
    picture = report.plot(setup.workdir, steps)
    tests = report.read_policy(setup.workdir / 'heldout.jsonl', steps)
    if not tests:
        print(f'curves: {picture}')
        return {}
    print(report.before_and_after(setup.workdir, steps))
    print(f'curves: {picture}')
    first, last = (row['metrics'] for row in (tests[0], tests[-1]))
    name, form = ('accuracy', '.1%') if 'eval/accuracy' in last else ('reward', '.4g')
    before, after = (format(metrics[f'eval/{name}'], form) for metrics in (first, last))
    print(f'held-out {name}: {before} → {after}')
    metrics: dict[str, float] = last
    return metrics


def _run_stage(
    setup: Setup, stage: Stage, initial: StageParams, position: Position, log: Log
) -> tuple[StageParams, Position]:
    """Runs a stage to its end, from its start or its newest checkpoint.

    Args:
      setup: the run.
      stage: the stage.
      initial: the parameters from earlier stages; the policy's buffers may be donated.
      position: where the stage starts.
      log: gets the metrics of steps and evaluations.

    Returns:
      The parameters and the position for the next stage.
    """
    keeping = setup.config.checkpoint
    folder = checkpoints(setup.workdir, keeping.folder) / stage.name
    snapshot = _newest(setup, stage, Snapshot(stage.start(initial), position))
    repeats = _has_later_stage(setup, stage)
    evaluated = (
        stage.heldout is None
        or repeats
        or hosts.from_first(
            lambda: report.has_heldout(setup.workdir, stage.name, stage.steps), 'the evaluations'
        )
    )
    if snapshot.position.step < stage.steps or not evaluated:
        best = keeping.best
        with (
            checkpoint.clear_errors(folder),
            checkpoint.open_manager(
                folder, keep=keeping.keep, keep_every=keeping.keep_every, best=best
            ) as manager,
        ):
            snapshot = StageLoop(
                setup, stage, manager, initial, snapshot, log, repeats=repeats, best=best
            ).run()
    return stage.finish(initial, snapshot.state), snapshot.position


def _has_later_stage(setup: Setup, stage: Stage) -> bool:
    """Whether a later stage has begun: then only parameters that were lost are computed again."""
    steps = checkpoint.steps_of_stages(setup.workdir, setup.config.checkpoint.folder)
    later = [name for name in steps if stage_order(name) > stage_order(stage.name)]
    return any(steps[name] for name in later)


def _newest(setup: Setup, stage: Stage, initial: Snapshot) -> Snapshot:
    """The newest intact checkpoint of a stage; without any, its start."""
    path, folder = setup.workdir, setup.config.checkpoint.folder
    while True:
        step = hosts.from_first(
            lambda: newest_intact(path, stage.name, folder), 'choosing a checkpoint'
        )
        if step is None:
            return initial
        try:
            with checkpoint.open_to_read(checkpoints(path, folder) / stage.name) as manager:
                snapshot = restored(setup, stage, manager, initial.state, step)
        except UNREADABLE as error:
            last = len(checkpoint.steps_of_stages(path, folder)[stage.name]) == 1
            checked = has_checksums(folder_of(path, stage.name, step, folder))
            if hosts.count() > 1 or checked or last:
                raise
            problem = f'{type(error).__name__}: {error}'
            set_aside(path, stage.name, step, problem, folder)
            continue
        hosts.say(f'{stage.name}: resumed at step {step} of {stage.steps}')
        return snapshot


def restored(
    setup: Setup, stage: Stage, manager: ocp.CheckpointManager, abstract: TrainState, step: int
) -> Snapshot:
    """The snapshot that a checkpoint of a stage holds.

    Args:
      setup: the run.
      stage: the stage.
      manager: of its checkpoints.
      abstract: arrays or ShapeDtypeStructs of the state.
      step: which checkpoint.
    """
    state = checkpoint.restore(manager, abstract, setup.mesh, step)
    position = _restore_position(setup, stage, manager, step)
    rollout = checkpoint.restore_samples(manager, setup.mesh, step)
    return Snapshot(state, position, None if rollout is None else [rollout])


def _restore_position(
    setup: Setup, stage: Stage, manager: ocp.CheckpointManager, step: int
) -> Position:
    saved = checkpoint.restore_position(manager, step)
    if saved is not None:
        return Position.from_json(saved)
    # An earlier version saved no position, and used 1 + refill batches in each step.
    kind, _, iteration = stage.name.partition('-')
    c = setup.config.grpo
    steps = (int(iteration or 1) - 1) * c.steps + (step if kind == 'grpo' else 0)
    return Position(step, steps * (1 + c.refill))
