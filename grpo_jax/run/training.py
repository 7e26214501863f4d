"""A training run: its stages one after the other."""

import os
import pathlib
from collections.abc import Callable, Mapping

import orbax.checkpoint as ocp
from ml_collections import ConfigDict

from grpo_jax import plugins
from grpo_jax.run import checkpoint, compiled, loggers, report
from grpo_jax.run.config import module_folders
from grpo_jax.run.config_problems import find_problems
from grpo_jax.run.errors import ConfigError, caught
from grpo_jax.run.loggers import Loggers
from grpo_jax.run.parameters import check_start, initial_params, initial_reward_params, merged
from grpo_jax.run.policy_stages import grpo_stage, sft_stage
from grpo_jax.run.problems import Problems, check_data, heldout_problems, training_problems
from grpo_jax.run.reward_stage import reward_stage
from grpo_jax.run.rollouts import Position
from grpo_jax.run.setup import Setup, keep_description, prepare
from grpo_jax.run.stage_loop import Snapshot, StageLoop
from grpo_jax.run.stages import Stage, StageParams
from grpo_jax.run.start import with_start

Log = Callable[[int, Mapping[str, float]], None]


def train(
    config: ConfigDict, workdir: str, *, extend: bool = False, override: bool = False
) -> dict[str, float]:
    """Runs or resumes all stages.

    Args:
      config: from a config file, with every key of `config.defaults()`.
      workdir: the run's folder.
      extend: continue the run in the folder for more steps.
      override: continue it with other steps, learning rates, or keys of eval, log and checkpoint.

    Returns:
      The metrics of the last held-out evaluation; empty without one.

    Raises:
      ConfigError: all that the user has to fix in the config and the data. Raised before training.
      ValueError: the workdir cannot be used.
      rewards.RewardError: a reward function failed. A checkpoint of the finished steps is saved.
    """
    if not config.module_folders:  # not from a config file
        config = config.copy_and_resolve_references()
        config.module_folders = module_folders(os.getcwd())
    config = with_start(config, workdir)
    path, config = checkpoint.check_workdir(workdir, config, extend=extend, override=override)
    plugins.set_folders(config.module_folders)
    problems, repaired = find_problems(config)
    with caught(problems):
        setup, stages = _make(repaired, path)
    if problems:
        with caught(problems):  # the data set too, where something else was wrong before it
            check_data(repaired, path)
        raise ConfigError(problems)
    checkpoint.remove_failed_try(path, setup.config)
    if setup.config.start and not any(checkpoint.steps_of_stages(path).values()):
        print(f'begins from {setup.config.start}')
    with (
        compiled.kept_in(path / 'cache'),
        compiled.trimmed(),
        compiled.counted() as count,
        loggers.opened(setup.config, path) as everywhere,
    ):
        params = StageParams(initial_params(setup), reward=initial_reward_params(setup))
        checkpoint.claim_workdir(path, setup.config)
        keep_description(setup)
        position, offset = Position(), 0
        for stage in stages:
            if params.adapters is not None:
                policy = merged(setup, params.policy, params.adapters)
                params = params._replace(policy=policy, adapters=None)
            log = _log_of_stage(everywhere, stage, offset)
            position = position._replace(step=0, tokens=0)
            params, position = _run_stage(setup, stage, params, position, log)
            offset += stage.steps
    print(count)
    return _report(setup)


def _log_of_stage(everywhere: Loggers, stage: Stage, offset: int) -> Log:
    """A function that logs the metrics of a stage; `offset` is the number of earlier steps."""
    prefix = '' if stage.name.startswith('grpo') else f'{stage.name}/'

    def log(step: int, metrics: Mapping[str, float]) -> None:
        everywhere.log(offset + step, {prefix + name: x for name, x in metrics.items()})

    return log


def _make(config: ConfigDict, workdir: pathlib.Path) -> tuple[Setup, list[Stage]]:
    """Makes the stages, with the problems of the data set tokenized."""
    setup = prepare(config, workdir)
    check_start(setup)
    heldout = heldout_problems(setup)
    return setup, _make_stages(setup, training_problems(setup, heldout), heldout)


def _make_stages(setup: Setup, training: Problems, heldout: Problems | None) -> list[Stage]:
    """Makes the stages that have steps: SFT, then reward model and policy for each iteration."""
    config, stages = setup.config, []
    if config.sft.steps:
        stages.append(sft_stage(setup, training, None if config.grpo.steps else heldout))
    for iteration in range(1, config.grpo.iterations + 1) if config.grpo.steps else ():
        if config.reward_model.steps:
            stages.append(reward_stage(setup, training, iteration))
        stages.append(grpo_stage(setup, training, heldout, iteration))
    return stages


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
    folder = setup.workdir / 'checkpoints' / stage.name
    with checkpoint.open_manager(folder, keep=setup.config.checkpoint.keep) as manager:
        snapshot = Snapshot(stage.start(initial), position)
        start = manager.latest_step() or 0
        if start:
            state = checkpoint.restore(manager, snapshot.state, setup.mesh)
            position = _restore_position(setup, stage, manager)
            rollout = checkpoint.restore_samples(manager, setup.mesh)
            snapshot = Snapshot(state, position, None if rollout is None else [rollout])
            print(f'{stage.name}: resumed at step {start} of {stage.steps}')
        evaluated = stage.heldout is None or report.has_heldout(
            setup.workdir, stage.name, stage.steps
        )
        if start < stage.steps or not evaluated:
            snapshot = StageLoop(setup, stage, manager, initial, snapshot, log).run()
    return stage.finish(initial, snapshot.state), snapshot.position


def _restore_position(setup: Setup, stage: Stage, manager: ocp.CheckpointManager) -> Position:
    """The position of the newest checkpoint."""
    saved = checkpoint.restore_position(manager)
    if saved is not None:
        return Position.from_json(saved)
    # An earlier version saved no position, and used 1 + refill batches in each step.
    kind, _, iteration = stage.name.partition('-')
    c, step = setup.config.grpo, manager.latest_step() or 0
    steps = (int(iteration or 1) - 1) * c.steps + (step if kind == 'grpo' else 0)
    return Position(step, steps * (1 + c.refill))
