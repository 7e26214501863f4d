"""The training command: supervised fine-tuning on demonstrations, then GRPO from that checkpoint.

    python -m grpo_jax.train --config=configs/arithmetic.py --workdir=FOLDER [--config.key=value
    ...]

The same command resumes a run that was stopped, however it was stopped: batch k and the random
numbers of step k are functions of the seed and k, so the resumed run makes the same numbers as an
unbroken one.
"""

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import jax
from ml_collections import ConfigDict
from tqdm import tqdm

from grpo_jax import checkpoint, report, setup
from grpo_jax.collect import Collected
from grpo_jax.config import run_command
from grpo_jax.setup import Problems, Setup
from grpo_jax.stages import Models, Stage, grpo_stage, reward_stage, sft_stage
from grpo_jax.types import TrainState

log = logging.getLogger('grpo_jax')


def train(config: ConfigDict, workdir: str) -> dict[str, float]:
    """Runs or resumes all stages.

    Args:
      config: from a config file; every key of `config.defaults()`.
      workdir: the run's folder.

    Returns:
      The metrics of the last held-out evaluation.

    Raises:
      ValueError: anything about config, data or workdir that the user can mend, before training.
      rewards.RewardError: a reward function failed; what was computed until then is kept.
    """
    made = setup.prepare(config, checkpoint.check_workdir(workdir, config))
    heldout = setup.heldout_problems(made)
    training = setup.training_problems(made, heldout)
    stages = _stages(made, training, heldout)
    carried = Models(setup.initial_params(made), reward=setup.initial_reward_params(made))
    checkpoint.claim_workdir(made.workdir, config)
    setup.keep_description(made)
    for stage in stages:
        if carried.adapters is not None:
            policy = setup.merged(made, carried.policy, carried.adapters)
            carried = carried._replace(policy=policy, adapters=None)
        carried = _run_stage(made, stage, carried)
    picture = report.plot(made.workdir, config.grpo.steps)
    tests = report.read_policy(made.workdir / 'heldout.jsonl', config.grpo.steps)
    before, after = (row['metrics']['eval/accuracy'] for row in (tests[0], tests[-1]))
    print(report.before_and_after(made.workdir, config.grpo.steps))
    print(f'curves: {picture}')
    print(f'held-out accuracy: {before:.1%} → {after:.1%}')
    return tests[-1]['metrics']


def _stages(made: Setup, training: Problems, heldout: Problems) -> list[Stage]:
    """SFT, then for each iteration the reward model and the policy; those that have steps."""
    config, stages = made.config, []
    if config.sft.steps:
        stages.append(sft_stage(made, training, None if config.grpo.steps else heldout))
    for iteration in range(1, config.grpo.iterations + 1) if config.grpo.steps else ():
        if config.reward_model.steps:
            stages.append(reward_stage(made, training, iteration))
        stages.append(grpo_stage(made, training, heldout, iteration))
    return stages


def _run_stage(made: Setup, stage: Stage, carried: Models) -> Models:
    """Trains from what the stages before left, or from this stage's newest checkpoint, to its end.

    Args:
      made: the run.
      stage: what to do.
      carried: parameters, of which the policy's memory may be taken over.

    Returns:
      The parameters for the next stage.
    """
    folder = made.workdir / 'checkpoints' / stage.name
    manager = checkpoint.open_manager(folder, keep=made.config.checkpoint.keep)
    state = stage.start(carried)
    start = manager.latest_step() or 0
    if start:
        state = checkpoint.restore(manager, state, made.mesh)
        print(f'{stage.name}: resumed at step {start} of {stage.steps}')
    asked = stage.heldout is None or report.has_heldout(made.workdir, stage.name, stage.steps)
    if start < stage.steps or not asked:
        state = _steps(made, stage, manager, start, state, carried)
    manager.close()
    return stage.finish(carried, state)


def _steps(
    made: Setup, stage: Stage, manager: Any, start: int, state: TrainState, began: Models
) -> TrainState:
    """The stage's steps from `start` on, with their records, evaluations and checkpoints."""
    every = made.config.checkpoint.every
    records = report.Records(made.workdir, stage.name, start)
    with _closing(manager, records), _bar(stage, start) as bar:
        for k in range(start, stage.steps):
            with _saving_on_failure(manager, k, state):
                if stage.heldout and k % stage.eval_every == 0:
                    records.heldout(k, stage.heldout(stage.policy(state, began)))
                started = time.perf_counter()
                collected = stage.collect(k, stage.policy(state, began), began)
            state, metrics = _update(stage, state, began, collected, started)
            records.metrics(k, metrics)
            records.completions(k, collected.completions)
            _show(bar, metrics)
            if (k + 1) % every == 0 or k + 1 == stage.steps:
                checkpoint.save(manager, k + 1, state)
        if stage.heldout:
            records.heldout(stage.steps, stage.heldout(stage.policy(state, began)))
    return state


def _update(stage: Stage, state, began: Models, collected: Collected, started: float):
    """One call of the update program, and its metrics on the host."""
    called = time.perf_counter()
    skipped = int(state.skipped)
    state, device = stage.step(state, began, collected)
    metrics = {name: float(value) for name, value in jax.device_get(device).items()}
    now = time.perf_counter()
    if stage.schedule:
        updates = int(state.step) * stage.updates - int(state.skipped)
        metrics['learning_rate'] = float(stage.schedule(max(updates - 1, 0)))
    metrics |= collected.metrics | {
        'timing/update': now - called,
        'step_time': now - started,
        'perf/tokens_per_second': metrics['num_tokens'] / (now - started),
    }
    if metrics['skipped_updates'] > skipped:
        log.warning(
            '%s step %d: the gradient was not finite, so its update was left out (%d so far)',
            stage.name, int(state.step) - 1, int(metrics['skipped_updates']),
        )  # fmt: skip
    return state, metrics


@contextmanager
def _saving_on_failure(manager: Any, k: int, state: TrainState) -> Iterator[None]:
    """Saves the state of before step k when a reward, an interrupt or the like ends the run."""
    try:
        yield
    except BaseException:
        if k and manager.latest_step() != k:
            checkpoint.save(manager, k, state)
        raise


@contextmanager
def _closing(manager: Any, records: report.Records) -> Iterator[None]:
    """Finishes saves and files also when a step fails, so nothing computed is lost."""
    try:
        yield
    finally:
        manager.wait_until_finished()
        records.close()


def _bar(stage: Stage, start: int) -> tqdm:
    return tqdm(
        total=stage.steps, initial=start, desc=stage.name, dynamic_ncols=True, mininterval=1
    )


def _show(bar: tqdm, metrics: dict[str, float]) -> None:
    shown = {
        'reward': 'reward', 'accuracy': 'accuracy', 'kl': 'KL', 'loss': 'loss',
        'perf/tokens_per_second': 'tok/s',
    }  # fmt: skip
    if 'reward' in metrics:
        del shown['loss']
    bar.set_postfix(
        {short: f'{metrics[k]:.3g}' for k, short in shown.items() if k in metrics}, refresh=False
    )
    bar.update()


def run() -> None:
    """The console entry point."""
    logging.basicConfig(format='%(levelname)s %(message)s')
    run_command(train)


if __name__ == '__main__':
    run()
