"""The loop over the steps of a stage: sampling, updates, records, evaluations and checkpoints."""

import contextlib
import functools
import logging
from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple

import jax
import orbax.checkpoint as ocp
from tqdm import tqdm

from grpo_jax.algorithm.sample import last_block
from grpo_jax.rewards import RewardError
from grpo_jax.run import checkpoint, compiled, hosts, report, signals
from grpo_jax.run.episodes.recorded import remove_before
from grpo_jax.run.errors import is_disk_full
from grpo_jax.run.health import Health, UnhealthyError
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
      repeats: whether the records of these steps have been written, with those of later stages.
      best: see `checkpoint.open_manager`.
    """

    def __init__(
        self,
        setup: Setup,
        stage: Stage,
        manager: ocp.CheckpointManager,
        initial: StageParams,
        snapshot: Snapshot,
        log: Callable[[int, Mapping[str, float]], None] | None = None,
        *,
        repeats: bool = False,
        best: str = '',
    ) -> None:
        self.setup, self.stage, self.manager = setup, stage, manager
        self.initial, self.snapshot, self.log = initial, snapshot, log
        self.start, self.repeats, self.best = snapshot.position.step, repeats, best
        self.evaluated, self.evaluation = -1, dict[str, float]()  # the last step, its metrics
        self.ahead: compiled.CompiledAhead | None = None  # the update program
        self.batches = dict[int, int]()  # of checkpoints: the next batch

    def run(self) -> Snapshot:
        """Runs all steps that are left, and the evaluation after the last one.

        An error or an interrupt at any point leaves a checkpoint of the last step that was
        dispatched, if its metrics can still be written.
        """
        stage, start = self.stage, self.start
        with contextlib.ExitStack() as stack:
            self.records = records = self._open_records()
            stack.callback(records.close)
            stack.enter_context(signals.handled())
            stack.callback(checkpoint.finish_saves, self.manager)
            bar = stack.enter_context(_progress_bar(stage, start))
            self.compilations = stack.enter_context(compiled.left_out(bar))
            health = Health(self.setup.config, self.setup.workdir, stage.name, stage.updates, start)
            skipped = int(self.snapshot.state.skipped)
            self.progress = Progress(stage, records, bar, skipped, health)
            try:
                if stage.update is not None and self.snapshot.position.step < stage.steps:
                    self.ahead = compiled.CompiledAhead(functools.partial(stage.update, None))
                    stack.callback(self.ahead.wait)
                while self.snapshot.position.step < stage.steps:
                    self._step(records)
                self._evaluate()
            except BaseException as error:
                self._save_after_failure(error)
                if isinstance(error, hosts.Stopped):
                    error.args = (self._describe_stop(error),)
                raise
        return self.snapshot

    def _open_records(self) -> report.Records:
        if self.repeats or not hosts.is_first():
            return report.NoRecords()
        return report.Records(self.setup.workdir, self.stage.name, self.start, self.log)

    def _step(self, records: report.Records) -> None:
        """Evaluates if it is due, samples, grades, updates, and saves if it is due."""
        stage, progress, initial = self.stage, self.progress, self.initial
        state, position, sampled = self.snapshot
        # Only SFT grades nothing, for which the processes wait for each other in every step.
        signals.check()
        if number := hosts.stop_requested(behind=2 if stage.ahead else 1):
            raise hosts.in_all_processes(hosts.Stopped(number))
        policy = stage.policy(state, initial)
        if position.step % stage.eval_every == 0:
            self._evaluate()
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
        with self._announced('the update', first):
            if first:
                if self.ahead is not None:
                    self.compilations.wait_for(self.ahead)
                self._print_plan()
            self._update(batch, sampled)
        step = position.step + 1
        if step % self.setup.config.checkpoint.every == 0 or step == stage.steps:
            progress.write()
            if 'eval/' in self.best and (step % stage.eval_every == 0 or step == stage.steps):
                self._evaluate()
            self._save()
            progress.restart()

    def _evaluate(self) -> None:
        """Evaluates the policy, if there are held-out problems, unless it has been already."""
        stage, step = self.stage, self.snapshot.position.step
        if stage.heldout is None or self.repeats or self.evaluated == step:
            return
        self.progress.write()
        policy = stage.policy(self.snapshot.state, self.initial)
        found = stage.heldout(policy, self.initial)
        self.records.heldout(step, found)
        self.evaluated, self.evaluation = step, found.metrics
        self.progress.restart()

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
        delay = signals.delayed() if step > self.start else contextlib.nullcontext()
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
        self.records.sync()
        arguments = [self.manager, position.step, state, rollout, position.to_json()]
        if self.best:
            evaluation = self.evaluation if self.evaluated == position.step else {}
            arguments.append((self.progress.last or {}) | evaluation)
        with signals.delayed():
            checkpoint.save(*arguments)
        self._remove_replies()

    def _remove_replies(self) -> None:
        """Removes the environment's replies to batches that no checkpoint leads to any more."""
        if self.setup.environment is None or not hosts.is_first():
            return
        self.batches[self.snapshot.position.step] = self.snapshot.position.next_batch
        oldest = min(self.manager.all_steps())
        if oldest in self.batches:  # it was not saved before the run was resumed
            remove_before(self.setup.workdir, self.stage.name, self.batches[oldest])

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
        full = is_disk_full(error)  # then a save in the background fails too, and no other is tried
        try:
            if not full:
                self._save_newest(error)
            checkpoint.finish_saves(self.manager)
        except Exception as another:
            if not full:
                log.warning(
                    '%s: the state after step %d was not saved: %s: %s',
                    self.stage.name, step, type(another).__name__, another,
                )  # fmt: skip

    def _save_newest(self, error: BaseException) -> None:
        """Writes the metrics of finished steps and saves the state, if it is one to go on from."""
        step = self.snapshot.position.step
        self.progress.write()
        if isinstance(error, UnhealthyError) and error.poisoned:
            return
        if step == self.start or self.manager.latest_step() == step:
            return
        leaves = jax.tree.leaves(self.snapshot.state)
        if any(isinstance(leaf, jax.Array) and leaf.is_deleted() for leaf in leaves):
            log.warning(
                '%s: the state after step %d is lost, because the update that failed had donated '
                'its buffers', self.stage.name, step,
            )  # fmt: skip
            return
        self._save()

    def _describe_stop(self, stopped: hosts.Stopped) -> str:
        """What is saved after a signal, and what to do; waits until it is written."""
        checkpoint.finish_saves(self.manager)
        saved, step = self.manager.latest_step(), self.snapshot.position.step
        text = f'{self.stage.name}: stopped after step {step} by {stopped.name}'
        if not saved:
            return f'{text}; none is saved, and the same command begins the stage again'
        which = 'its state' if saved == step else f'the state after step {saved}'
        folder = self.setup.config.checkpoint.folder or self.setup.workdir
        return f'{text}; {which} is saved in {folder}, and the same command goes on from there'


def _progress_bar(stage: Stage, start: int) -> tqdm:
    return tqdm(
        total=stage.steps, initial=start, desc=stage.name, dynamic_ncols=True, mininterval=1,
        disable=not hosts.is_first(),
    )  # fmt: skip
