"""The training command: supervised fine-tuning on demonstrations, then GRPO from that checkpoint.

    python -m grpo_jax.train --config=configs/arithmetic.py --workdir=FOLDER [--config.key=value
    ...]

The same command resumes a run that was stopped, however it was stopped: batch k and the random
numbers of step k are functions of the seed and k, so the resumed run makes the same numbers as an
unbroken one.
"""

import logging
from collections.abc import Iterable, Iterator
from contextlib import closing, contextmanager
from typing import Any

from ml_collections import ConfigDict
from tqdm import tqdm

from grpo_jax import checkpoint, compiled, report, setup
from grpo_jax.arguments import run_command
from grpo_jax.progress import Progress
from grpo_jax.setup import Problems, Setup
from grpo_jax.stages import Models, Stage, grpo_stage, reward_stage, sft_stage
from grpo_jax.types import Rollout, TrainState


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
    cache = made.workdir / 'cache'
    with compiled.kept_in(cache), compiled.trimmed(), compiled.counted() as count:
        carried = Models(setup.initial_params(made), reward=setup.initial_reward_params(made))
        checkpoint.claim_workdir(made.workdir, config)
        setup.keep_description(made)
        for stage in stages:
            if carried.adapters is not None:
                policy = setup.merged(made, carried.policy, carried.adapters)
                carried = carried._replace(policy=policy, adapters=None)
            carried = _run_stage(made, stage, carried)
    print(count)
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
    state, sampled = stage.start(carried), None
    start = manager.latest_step() or 0
    if start:
        state = checkpoint.restore(manager, state, made.mesh)
        sampled = checkpoint.restore_samples(manager, made.mesh)
        print(f'{stage.name}: resumed at step {start} of {stage.steps}')
    asked = stage.heldout is None or report.has_heldout(made.workdir, stage.name, stage.steps)
    if start < stage.steps or not asked:
        state = _steps(made, stage, manager, start, state, sampled, carried)
    manager.close()
    return stage.finish(carried, state)


def _steps(
    made: Setup,
    stage: Stage,
    manager: Any,
    start: int,
    state: TrainState,
    sampled: Iterable[Any] | None,
    began: Models,
) -> TrainState:
    """The stage's steps from `start` on, with their records, evaluations and checkpoints.

    Programs are dispatched without waiting for their results: the host waits where it needs one,
    for completions to reward and, a step late, for metrics to write.
    """
    every = made.config.checkpoint.every
    records = report.Records(made.workdir, stage.name, start)
    with _closing(manager, records), _bar(stage, start) as bar:
        progress = Progress(stage, records, bar, int(state.skipped))
        with closing(progress):
            for k in range(start, stage.steps):
                policy = stage.policy(state, began)
                with _saving_on_failure(manager, k, state, _held(stage, sampled), progress):
                    if stage.heldout and k % stage.eval_every == 0:
                        progress.write()
                        records.heldout(k, stage.heldout(policy))
                        progress.restart()
                    if sampled is None:
                        sampled = stage.sample(k, policy, began)
                    if not stage.ahead:  # else the step before may still run
                        progress.write()
                    collected = stage.collect(k, sampled, policy, began)
                    more = stage.ahead and k + 1 < stage.steps
                    sampled = stage.sample(k + 1, policy, began) if more else None
                state, metrics = stage.step(state, began, collected)
                progress.add(k, metrics, collected)
                if (k + 1) % every == 0 or k + 1 == stage.steps:
                    progress.write()
                    checkpoint.save(manager, k + 1, state, _held(stage, sampled))
                    progress.restart()
        if stage.heldout:
            records.heldout(stage.steps, stage.heldout(stage.policy(state, began)))
    return state


def _held(stage: Stage, sampled: Iterable[Any] | None) -> list[Rollout] | None:
    """What a checkpoint has to hold of the samples of the next step."""
    return list(sampled) if stage.stale and sampled is not None else None


@contextmanager
def _saving_on_failure(
    manager: Any, k: int, state: TrainState, sampled: list[Rollout] | None, progress: Progress
) -> Iterator[None]:
    """Saves the state of before step k when a reward, an interrupt or the like ends the run."""
    try:
        yield
    except BaseException:
        progress.write()
        if k and manager.latest_step() != k and not progress.torn:
            checkpoint.save(manager, k, state, sampled)
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


def run() -> None:
    """The console entry point."""
    logging.basicConfig(format='%(levelname)s %(message)s')
    run_command(train)


if __name__ == '__main__':
    run()
