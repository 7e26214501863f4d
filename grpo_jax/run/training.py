"""A training run: its stages one after the other."""

import json
import os
from collections.abc import Callable, Mapping

import orbax.checkpoint as ocp
from ml_collections import ConfigDict

from grpo_jax.run import checkpoint, compiled, hosts, loggers, report, saved_config
from grpo_jax.run.config import module_folders
from grpo_jax.run.loggers import Loggers
from grpo_jax.run.parameters import initial_params, initial_reward_params, merged
from grpo_jax.run.preparation import prepare_run
from grpo_jax.run.rollouts import Position
from grpo_jax.run.setup import Setup, keep_description
from grpo_jax.run.stage_loop import Snapshot, StageLoop
from grpo_jax.run.stages import Stage, StageParams

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
      ConfigError: all that the user has to fix in the config, the data and the workdir. Raised
        before training.
      rewards.RewardError: a reward function failed. A checkpoint of the finished steps is saved.
    """
    if not config.module_folders:  # not from a config file
        config = config.copy_and_resolve_references()
        config.module_folders = module_folders(os.getcwd())
    shared = json.loads(saved_config.to_json(config)) | {'module_folders': None}  # may be elsewhere
    hosts.same(shared, 'the config')
    with hosts.together('checking the config'):
        setup, stages = prepare_run(config, workdir, extend=extend, override=override)
    path = setup.workdir
    hosts.check_shared(path)
    hosts.from_first(lambda: checkpoint.remove_failed_try(path, setup.config), 'cleaning up')
    if setup.config.start and not any(checkpoint.steps_of_stages(path).values()):
        hosts.say(f'begins from {setup.config.start}')
    with (
        compiled.kept_in(path / 'cache'),
        compiled.trimmed(),
        compiled.counted() as count,
        loggers.opened(setup.config, path) as everywhere,
    ):
        params = StageParams(initial_params(setup), reward=initial_reward_params(setup))
        hosts.from_first(lambda: _claim(setup), 'writing the config')
        position, offset = Position(), 0
        for stage in stages:
            if params.adapters is not None:
                policy = merged(setup, params.policy, params.adapters)
                params = params._replace(policy=policy, adapters=None)
            log = _log_of_stage(everywhere, stage, offset)
            position = position._replace(step=0, tokens=0)
            params, position = _run_stage(setup, stage, params, position, log)
            offset += stage.steps
    hosts.say(str(count))
    return hosts.from_first(lambda: _report(setup), 'the report')


def _claim(setup: Setup) -> None:
    checkpoint.claim_workdir(setup.workdir, setup.config)
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
    folder = setup.workdir / 'checkpoints' / stage.name
    with checkpoint.open_manager(folder, keep=setup.config.checkpoint.keep) as manager:
        snapshot = Snapshot(stage.start(initial), position)
        start = manager.latest_step() or 0
        if start:
            state = checkpoint.restore(manager, snapshot.state, setup.mesh)
            position = _restore_position(setup, stage, manager)
            rollout = checkpoint.restore_samples(manager, setup.mesh)
            snapshot = Snapshot(state, position, None if rollout is None else [rollout])
            hosts.say(f'{stage.name}: resumed at step {start} of {stage.steps}')
        evaluated = stage.heldout is None or hosts.from_first(
            lambda: report.has_heldout(setup.workdir, stage.name, stage.steps), 'the evaluations'
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
