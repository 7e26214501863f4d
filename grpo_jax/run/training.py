"""A training run: its stages one after the other, and the loop over the steps of a stage."""

import contextlib
import logging
import signal
import threading
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import jax
import orbax.checkpoint as ocp
from ml_collections import ConfigDict
from tqdm import tqdm

from grpo_jax.algorithm.checks import shape_of
from grpo_jax.algorithm.sample import last_block
from grpo_jax.engine.compute import choose
from grpo_jax.run import checkpoint, compiled, report
from grpo_jax.run.parameters import initial_params, initial_reward_params, merged
from grpo_jax.run.policy_stages import grpo_stage, sft_stage
from grpo_jax.run.problems import Problems, heldout_problems, training_problems
from grpo_jax.run.progress import Progress
from grpo_jax.run.reward_stage import reward_stage
from grpo_jax.run.rollouts import CollectedBatch, Position
from grpo_jax.run.setup import Setup, keep_description, prepare
from grpo_jax.run.stages import Stage, StageParams
from grpo_jax.types import Rollout, TrainState

log = logging.getLogger('grpo_jax')


def train(config: ConfigDict, workdir: str) -> dict[str, float]:
    """Runs or resumes all stages.

    Args:
      config: from a config file, with every key of `config.defaults()`.
      workdir: the run's folder.

    Returns:
      The metrics of the last held-out evaluation.

    Raises:
      ValueError: the user has to fix the config, the data or the workdir. Raised before training.
      rewards.RewardError: a reward function failed. A checkpoint of the finished steps is saved.
    """
    path, config = checkpoint.check_workdir(workdir, config)
    setup = prepare(config, path)
    heldout = heldout_problems(setup)
    training = training_problems(setup, heldout)
    stages = _make_stages(setup, training, heldout)
    with compiled.kept_in(path / 'cache'), compiled.trimmed(), compiled.counted() as count:
        params = StageParams(initial_params(setup), reward=initial_reward_params(setup))
        checkpoint.claim_workdir(path, config)
        keep_description(setup)
        position = Position()
        for stage in stages:
            if params.adapters is not None:
                policy = merged(setup, params.policy, params.adapters)
                params = params._replace(policy=policy, adapters=None)
            params, position = _run_stage(setup, stage, params, position._replace(step=0))
    print(count)
    return _report(setup)


def _make_stages(setup: Setup, training: Problems, heldout: Problems) -> list[Stage]:
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
    before, after = (row['metrics']['eval/accuracy'] for row in (tests[0], tests[-1]))
    print(report.before_and_after(setup.workdir, steps))
    print(f'curves: {picture}')
    print(f'held-out accuracy: {before:.1%} → {after:.1%}')
    metrics: dict[str, float] = tests[-1]['metrics']
    return metrics


def _run_stage(
    setup: Setup, stage: Stage, initial: StageParams, position: Position
) -> tuple[StageParams, Position]:
    """Runs a stage to its end, from its start or its newest checkpoint.

    Args:
      setup: the run.
      stage: the stage.
      initial: the parameters from earlier stages; the policy's buffers may be donated.
      position: where the stage starts.

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
            snapshot = StageLoop(setup, stage, manager, initial, snapshot).run()
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


class Snapshot(NamedTuple):
    """All that a stage needs to continue from a step; this is what a checkpoint holds."""

    state: TrainState
    position: Position
    sampled: Iterable[Rollout] | None = None  # for the next step, if it has been sampled already


class StageLoop:
    """The steps of a stage, with their records, evaluations and checkpoints.

    Programs are dispatched without waiting for their results: the host waits where it needs one,
    for completions to grade and, a step late, for metrics to write.

    Args:
      setup: the run.
      stage: the stage.
      manager: of its checkpoints.
      initial: the parameters that the stage started with.
      snapshot: where to start.
    """

    def __init__(
        self,
        setup: Setup,
        stage: Stage,
        manager: ocp.CheckpointManager,
        initial: StageParams,
        snapshot: Snapshot,
    ) -> None:
        self.setup, self.stage, self.manager = setup, stage, manager
        self.initial, self.snapshot = initial, snapshot
        self.start = snapshot.position.step

    def run(self) -> Snapshot:
        """Runs all steps that are left, and the evaluation after the last one.

        An error or an interrupt at any point leaves a checkpoint of the last step that was
        dispatched, if its metrics can still be written.
        """
        stage, start = self.stage, self.start
        with contextlib.ExitStack() as stack:
            records = report.Records(self.setup.workdir, stage.name, start)
            stack.callback(records.close)
            stack.callback(self.manager.wait_until_finished)
            bar = stack.enter_context(_progress_bar(stage, start))
            self.progress = Progress(stage, records, bar, int(self.snapshot.state.skipped))
            try:
                while self.snapshot.position.step < stage.steps:
                    self._step(records)
                if stage.heldout:
                    policy = stage.policy(self.snapshot.state, self.initial)
                    records.heldout(stage.steps, stage.heldout(policy))
            except BaseException:
                self._save_after_failure()
                raise
        return self.snapshot

    def _step(self, records: report.Records) -> None:
        """Evaluates if it is due, samples, grades, updates, and saves if it is due."""
        stage, progress, initial = self.stage, self.progress, self.initial
        state, position, sampled = self.snapshot
        policy = stage.policy(state, initial)
        if stage.heldout and position.step % stage.eval_every == 0:
            progress.write()
            records.heldout(position.step, stage.heldout(policy))
            progress.restart()
        if sampled is None:
            sampled = stage.sample(position, policy, initial)
        if not stage.ahead:  # otherwise the previous step may still be running
            progress.write()
        batch = stage.collect(position, sampled, policy, initial)
        sampled = None
        if stage.ahead and position.step + 1 < stage.steps:
            sampled = stage.sample(batch.position, policy, initial)
        if position.step == self.start:
            self._print_plan(batch)
        self._update(batch, sampled)
        step = position.step + 1
        if step % self.setup.config.checkpoint.every == 0 or step == stage.steps:
            progress.write()
            self._save()
            progress.restart()

    def _update(self, batch: CollectedBatch, sampled: Iterable[Rollout] | None) -> None:
        """Dispatches the update, which donates the buffers of the old state."""
        step = self.snapshot.position.step
        # The update donates the old state, so an interrupt must not lose the new one. The first
        # update can be interrupted: it may compile for minutes, and there is nothing to lose yet.
        delay = _delayed_interrupt() if step > self.start else contextlib.nullcontext()
        with delay:
            state, metrics = self.stage.step(self.snapshot.state, self.initial, batch)
            self.progress.add(step, metrics, batch)
            self.snapshot = Snapshot(state, batch.position, sampled)
        self.progress.write(keep=1)

    def _print_plan(self, batch: CollectedBatch) -> None:
        """Prints how updates are computed, with what was chosen automatically."""
        if self.stage.compute is not None:
            setup = self.setup
            shape = shape_of(batch.rollout)
            plan = choose(self.stage.compute, setup.model.config, shape, setup.mesh)
            tqdm.write(f'{self.stage.name}: {plan}')

    def _save(self) -> None:
        state, position, sampled = self.snapshot
        # Samples that are not stale can be drawn again.
        rollout = last_block(sampled) if self.stage.stale and sampled is not None else None
        checkpoint.save(self.manager, position.step, state, rollout, position.to_json())

    def _save_after_failure(self) -> None:
        """Writes the metrics of finished steps and saves the newest state, if possible.

        Errors here are logged, so that the user sees the error that ended the run.
        """
        step = self.snapshot.position.step
        try:
            self.progress.write()
            if step == self.start or self.manager.latest_step() == step:
                return
            leaves = jax.tree.leaves(self.snapshot.state)
            if any(isinstance(leaf, jax.Array) and leaf.is_deleted() for leaf in leaves):
                log.warning(
                    '%s: the state after step %d is lost, because the update that failed had '
                    'donated its buffers', self.stage.name, step,
                )  # fmt: skip
                return
            self._save()
        except Exception as error:
            log.warning(
                '%s: the state after step %d was not saved: %s: %s',
                self.stage.name, step, type(error).__name__, error,
            )  # fmt: skip


@contextlib.contextmanager
def _delayed_interrupt() -> Iterator[None]:
    """Delays a KeyboardInterrupt until the block has ended."""
    handler = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or not callable(handler):
        yield
        return
    received: list[Any] = []
    signal.signal(signal.SIGINT, lambda *arguments: received.append(arguments))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, handler)
        if received:
            handler(*received[0])


def _progress_bar(stage: Stage, start: int) -> tqdm:
    return tqdm(
        total=stage.steps, initial=start, desc=stage.name, dynamic_ncols=True, mininterval=1
    )
