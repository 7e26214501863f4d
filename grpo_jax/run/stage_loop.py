"""The loop over the steps of a stage: sampling, updates, records, evaluations and checkpoints."""

import contextlib
import logging
import signal
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import orbax.checkpoint as ocp
from tqdm import tqdm

from grpo_jax.algorithm.sample import last_block
from grpo_jax.rewards import RewardError
from grpo_jax.run import checkpoint, compiled, hosts, report
from grpo_jax.run.progress import Progress
from grpo_jax.run.rollouts import CollectedBatch, Position
from grpo_jax.run.setup import Setup
from grpo_jax.run.stages import Stage, StageParams
from grpo_jax.types import Rollout, TrainState

log = logging.getLogger('grpo_jax')


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
      log: also gets the metrics of steps and evaluations, (step, metrics).
    """

    def __init__(
        self,
        setup: Setup,
        stage: Stage,
        manager: ocp.CheckpointManager,
        initial: StageParams,
        snapshot: Snapshot,
        log: Callable[[int, Mapping[str, float]], None] | None = None,
    ) -> None:
        self.setup, self.stage, self.manager = setup, stage, manager
        self.initial, self.snapshot, self.log = initial, snapshot, log
        self.start = snapshot.position.step

    def run(self) -> Snapshot:
        """Runs all steps that are left, and the evaluation after the last one.

        An error or an interrupt at any point leaves a checkpoint of the last step that was
        dispatched, if its metrics can still be written.
        """
        stage, start = self.stage, self.start
        with contextlib.ExitStack() as stack:
            records = self._open_records()
            stack.callback(records.close)
            stack.enter_context(hosts.stopping_between_steps())
            stack.callback(self.manager.wait_until_finished)
            bar = stack.enter_context(_progress_bar(stage, start))
            self.compilations = stack.enter_context(compiled.left_out(bar))
            self.progress = Progress(stage, records, bar, int(self.snapshot.state.skipped))
            try:
                while self.snapshot.position.step < stage.steps:
                    self._step(records)
                if stage.heldout:
                    policy = stage.policy(self.snapshot.state, self.initial)
                    records.heldout(stage.steps, stage.heldout(policy, self.initial))
            except BaseException as error:
                self._save_after_failure(error)
                raise
        return self.snapshot

    def _open_records(self) -> report.Records:
        if not hosts.is_first():
            return report.NoRecords()
        return report.Records(self.setup.workdir, self.stage.name, self.start, self.log)

    def _step(self, records: report.Records) -> None:
        """Evaluates if it is due, samples, grades, updates, and saves if it is due."""
        stage, progress, initial = self.stage, self.progress, self.initial
        state, position, sampled = self.snapshot
        # Only SFT grades nothing, for which the processes wait for each other in every step.
        if hosts.stop_requested(behind=2 if stage.ahead else 1):
            raise hosts.in_all_processes(
                hosts.Stopped(f'{stage.name}: stopped after step {position.step} by a signal')
            )
        policy = stage.policy(state, initial)
        if stage.heldout and position.step % stage.eval_every == 0:
            progress.write()
            records.heldout(position.step, stage.heldout(policy, initial))
            progress.restart()
        first = position.step == self.start
        with self._announced('the sampler', first):
            if sampled is None:
                sampled = stage.sample(position, policy, initial)
            if not stage.ahead:  # otherwise the previous step may still be running
                progress.write()
            batch = stage.collect(position, sampled, policy, initial)
        sampled = None
        if stage.ahead and position.step + 1 < stage.steps:
            sampled = stage.sample(batch.position, policy, initial)
        if first:
            self._print_plan()
        with self._announced('the update', first):
            self._update(batch, sampled)
        step = position.step + 1
        if step % self.setup.config.checkpoint.every == 0 or step == stage.steps:
            progress.write()
            self._save()
            progress.restart()

    def _update(self, batch: CollectedBatch, sampled: Iterable[Rollout] | None) -> None:
        """Dispatches the update, which donates the buffers of the old state."""
        if self.stage.follow is not None:
            self._follow_entropy()
            entropy = self.snapshot.position.entropy
            entropy = None if entropy is None else entropy._replace(known=False)
            batch = batch._replace(position=batch.position._replace(entropy=entropy))
        step = self.snapshot.position.step
        # The update donates the old state, so an interrupt must not lose the new one. The first
        # update can be interrupted: it may compile for minutes, and there is nothing to lose yet.
        delay = _delayed_interrupt() if step > self.start else contextlib.nullcontext()
        with delay:
            state, metrics = self.stage.step(self.snapshot.state, self.initial, batch)
            self.progress.add(step, metrics, batch)
            self.snapshot = Snapshot(state, batch.position, sampled)
        self.progress.write(keep=1)

    def _follow_entropy(self) -> None:
        """Waits for the last step's metrics, and changes the position by its entropy."""
        if self.stage.follow is None:
            return
        self.progress.write()
        if self.progress.newest is not None:
            position = self.stage.follow(self.snapshot.position, self.progress.newest['entropy'])
            self.snapshot = self.snapshot._replace(position=position)

    def _announced(self, what: str, first: bool) -> contextlib.AbstractContextManager[None]:
        name = f'{self.stage.name}: compiling {what}'
        return self.compilations.announced(name) if first else contextlib.nullcontext()

    def _print_plan(self) -> None:
        """Prints how updates are computed, with what was chosen automatically."""
        if self.stage.plan is not None:
            plan = self.stage.plan()
            if hosts.is_first():
                tqdm.write(f'{self.stage.name}: {plan}')

    def _save(self) -> None:
        self._follow_entropy()
        state, position, sampled = self.snapshot
        # Samples that are not stale can be drawn again.
        rollout = last_block(sampled) if self.stage.stale and sampled is not None else None
        checkpoint.save(self.manager, position.step, state, rollout, position.to_json())

    def _save_after_failure(self, error: BaseException) -> None:
        """Writes the metrics of finished steps and saves the newest state, if possible.

        Errors here are logged, so that the user sees the error that ended the run. All processes
        save together: where only one of them fails, the newest checkpoint is that of an earlier
        step.
        """
        step = self.snapshot.position.step
        if isinstance(error, RewardError):  # all processes have the same rewards
            hosts.in_all_processes(error)
        if not hosts.is_in_all_processes(error):
            return
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
        except Exception as another:
            log.warning(
                '%s: the state after step %d was not saved: %s: %s',
                self.stage.name, step, type(another).__name__, another,
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
        total=stage.steps, initial=start, desc=stage.name, dynamic_ncols=True, mininterval=1,
        disable=not hosts.is_first(),
    )  # fmt: skip
