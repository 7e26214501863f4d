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

from grpo_jax import checkpoint, models, report, setup, sharding, update
from grpo_jax.config import run_command
from grpo_jax.setup import Setup
from grpo_jax.stages import Collected, Stage, grpo_stage, sft_stage
from grpo_jax.types import Params, TrainState

log = logging.getLogger('grpo_jax')


def train(config: ConfigDict, workdir: str) -> dict[str, float]:
    """Runs or resumes both stages.

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
    sft = sft_stage(made, training) if config.sft.steps else None
    grpo = grpo_stage(made, training, heldout)
    params = setup.initial_params(made)
    checkpoint.claim_workdir(made.workdir, config)
    setup.keep_description(made)
    if sft:
        trained = _run_stage(made, sft, params)
        lora = made.model.config.lora.rank
        params = setup.merged(made, params, trained) if lora else trained
    _run_stage(made, grpo, params)
    picture = report.plot(made.workdir)
    tests = report.read(made.workdir / 'heldout.jsonl', 'grpo')
    before, after = (row['metrics']['eval/accuracy'] for row in (tests[0], tests[-1]))
    print(report.before_and_after(made.workdir))
    print(f'curves: {picture}')
    print(f'held-out accuracy: {before:.1%} → {after:.1%}')
    return tests[-1]['metrics']


def _run_stage(made: Setup, stage: Stage, params: Params) -> Params:
    """Trains from `params`, or from this stage's newest checkpoint, to the stage's last step.

    Args:
      made: the run.
      stage: what to do.
      params: without adapters; where there are none, their memory may be taken over.

    Returns:
      What was trained: all parameters, or the adapters.
    """
    save, lora = made.config.checkpoint, made.model.config.lora.rank
    reference = stage.algorithm.kl != 'none'
    manager = checkpoint.open_manager(made.workdir / 'checkpoints' / stage.name, keep=save.keep)
    trained = setup.initial_adapters(made) if lora else params
    frozen = params if lora or reference else None
    state = update.init_state(
        made.model, stage.optimizer, trained, made.mesh, donate=bool(lora) or frozen is None
    )
    start = manager.latest_step() or 0
    if start:
        state = checkpoint.restore(manager, state, made.mesh)
        print(f'{stage.name}: resumed at step {start} of {stage.steps}')
    if start < stage.steps or stage.heldout:
        state = _steps(made, stage, manager, start, state, frozen)
    manager.close()
    return state.params


def _steps(
    made: Setup, stage: Stage, manager: Any, start: int, state: TrainState, frozen: Params | None
) -> TrainState:
    """The stage's steps from `start` on, with their records, evaluations and checkpoints."""
    every = made.config.checkpoint.every
    step = update.make_step(made.model, stage.optimizer, stage.algorithm, made.mesh)
    records = report.Records(made.workdir, stage.name, start)

    def policy(state: TrainState) -> Params:
        return models.join(frozen, state.params) if made.model.config.lora.rank else state.params

    with _closing(manager, records), _bar(stage, start) as bar:
        for k in range(start, stage.steps):
            with _saving_on_failure(manager, k, state):
                if stage.heldout and k % stage.eval_every == 0:
                    records.heldout(k, stage.heldout(policy(state)))
                began = time.perf_counter()
                collected = stage.collect(k, policy(state))
            state, metrics = _update(made, stage, step, state, frozen, collected, began)
            records.metrics(k, metrics)
            records.completions(k, collected.completions)
            _show(bar, metrics)
            if (k + 1) % every == 0 or k + 1 == stage.steps:
                checkpoint.save(manager, k + 1, state)
        if stage.heldout:
            records.heldout(stage.steps, stage.heldout(policy(state)))
    return state


def _update(made, stage, step, state, frozen, collected: Collected, began: float):
    """One call of the update program, and its metrics on the host."""
    called = time.perf_counter()
    skipped = int(state.skipped)
    rollout, values = sharding.put_groups((collected.rollout, collected.rewards), made.mesh)
    state, device = step(state, frozen, rollout, values, stage.sampling, stage.objective)
    metrics = {name: float(value) for name, value in jax.device_get(device).items()}
    now = time.perf_counter()
    if stage.algorithm.loss == 'nll':  # demonstrations have no sampler, rewards or clip to speak of
        kept = ('loss', 'grad_norm', 'num_tokens', 'skipped_updates')
        metrics = {name: metrics[name] for name in kept}
    updates = int(state.step) * stage.algorithm.inner_updates - int(state.skipped)
    metrics |= collected.metrics | {
        'learning_rate': float(stage.schedule(max(updates - 1, 0))),
        'timing/update': now - called,
        'step_time': now - began,
        'perf/tokens_per_second': metrics['num_tokens'] / (now - began),
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
