"""The training command: supervised fine-tuning on demonstrations, then GRPO from that checkpoint.

    python -m grpo_jax.train --config=configs/arithmetic.py --workdir=FOLDER [--config.key=value
    ...]

The same command resumes a run that was stopped, however it was stopped: batch k and the random
numbers of step k are functions of the seed and k, so the resumed run makes the same numbers as an
unbroken one.
"""

import dataclasses
import functools
import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import jax
import numpy as np
import optax
from ml_collections import ConfigDict
from tqdm import tqdm

from grpo_jax import checkpoint, data, evaluate, models, report, rewards, sharding, update
from grpo_jax.advantages import check_group_options
from grpo_jax.config import run_command
from grpo_jax.losses import Objective
from grpo_jax.optimizer import adamw
from grpo_jax.sample import check_sampling
from grpo_jax.types import Params, Rollout, Sampling, TrainState

log = logging.getLogger('grpo_jax')

SFT = update.Algorithm(loss='nll', baseline='none', scale='none', aggregation='token_mean')


class Collected(NamedTuple):
    """What one step learns from."""

    rollout: Rollout
    rewards: np.ndarray  # f32[B, G]
    metrics: dict[str, float]
    completions: list[dict[str, Any]]  # for completions.jsonl


@dataclasses.dataclass(frozen=True)
class Stage:
    """One training stage: where its data come from and what it does with them."""

    name: str
    steps: int
    algorithm: update.Algorithm
    optimizer: optax.GradientTransformation
    schedule: optax.Schedule
    sampling: Sampling
    objective: Objective
    collect: Callable[[int, Params], Collected]  # (step, policy parameters)
    heldout: Callable[[Params], evaluate.Evaluation] | None  # asked every eval_every steps
    eval_every: int


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
    setup = evaluate.prepare(config, checkpoint.check_workdir(workdir, config))
    training = evaluate.load_problems(
        config, setup.workdir, setup.tokenizer, config.data.train_split
    )
    sft = _sft_stage(setup, training) if config.sft.steps else None
    grpo = _grpo_stage(setup, training)
    checkpoint.claim_workdir(setup.workdir, config)
    params = jax.jit(models.init, static_argnums=0)(setup.model, jax.random.key(config.seed))
    params = jax.device_put(params, sharding.shardings(params, setup.mesh))
    if sft:
        params = _run_stage(setup, sft, params, None).params
    _run_stage(setup, grpo, params, params if grpo.objective.beta else None)
    picture = report.plot(setup.workdir)
    tests = report.read(setup.workdir / 'heldout.jsonl', 'grpo')
    before, after = (row['metrics']['eval/accuracy'] for row in (tests[0], tests[-1]))
    print(report.before_and_after(setup.workdir))
    print(f'curves: {picture}')
    print(f'held-out accuracy: {before:.1%} → {after:.1%}')
    return tests[-1]['metrics']


def _sft_stage(setup: evaluate.Setup, training: evaluate.Problems) -> Stage:
    c, config = setup.config.sft, setup.config
    algorithm = dataclasses.replace(SFT, microbatch=c.microbatch)
    ones = np.ones((c.batch_size, 1), np.float32)
    sharding.check_batch(c.batch_size, c.microbatch, setup.mesh)
    table = data.tokenize_demonstrations(
        training.rows,
        setup.tokenizer,
        template=config.data.prompt,
        completion_template=config.data.demonstration,
        prompt_length=config.data.prompt_length,
        completion_length=config.data.completion_length,
    )
    if table.prompts.dropped:
        dropped, rows = table.prompts.dropped, len(training.rows)
        log.warning('dropped %d of %d demonstrations, too long', dropped, rows)
    batches = data.batches(table, c.batch_size, seed=config.seed)

    def collect(step: int, params: Params) -> Collected:
        return Collected(batches[step], ones, {}, [])

    optimizer, schedule = adamw(steps=c.steps, **c.optimizer)
    return Stage(
        'sft', c.steps, algorithm, optimizer, schedule, Sampling(), Objective(), collect, None, 1
    )


def _grpo_stage(setup: evaluate.Setup, training: evaluate.Problems) -> Stage:
    c, config = setup.config.grpo, setup.config
    algorithm = update.Algorithm(**c.algorithm)
    sampling = Sampling(**c.sampling)
    check_sampling(sampling)
    check_group_options(c.group_size, baseline=algorithm.baseline, scale=algorithm.scale)
    sharding.check_batch(c.batch_size, algorithm.microbatch, setup.mesh)
    if not c.rewards:
        raise ValueError('grpo.rewards is empty: name at least one reward function and its weight')
    weights = dict(c.rewards)
    for name, weight in weights.items():
        if not isinstance(weight, int | float) or not np.isfinite(weight):
            raise ValueError(f'grpo.rewards.{name}={weight!r}: a weight is a finite number')
    functions = {name: rewards.resolve(name) for name in weights}
    batches = data.batches(training.table, c.batch_size, seed=config.seed)

    def collect(step: int, params: Params) -> Collected:
        start = time.perf_counter()
        rollout = setup.sampler(
            params, batches[step], step=step, sampling=sampling, group_size=c.group_size
        )
        host = jax.device_get(rollout)
        sampled = time.perf_counter()
        judged = evaluate.judge(host, training, functions, weights)
        metrics = {
            **rewards.statistics(judged.scores),
            'timing/sample': sampled - start,
            'timing/reward': time.perf_counter() - sampled,
        }
        if config.eval.correct in judged.scores.parts:
            metrics['accuracy'] = float(np.mean(judged.scores.parts[config.eval.correct] >= 1))
        total = judged.scores.total.reshape(c.batch_size, c.group_size)
        some = _completion_rows(judged, config.log.completions)
        return Collected(rollout, total, metrics, some)

    heldout = functools.partial(
        evaluate.evaluate, setup.sampler, problems=setup.heldout, **evaluate.settings(config.eval)
    )
    optimizer, schedule = adamw(steps=c.steps * algorithm.inner_updates, **c.optimizer)
    objective = Objective(**c.objective)
    return Stage(
        'grpo', c.steps, algorithm, optimizer, schedule, sampling, objective, collect, heldout,
        config.eval.every,
    )  # fmt: skip


def _completion_rows(judged: evaluate.Judged, count: int) -> list[dict[str, Any]]:
    return [
        {
            'prompt': judged.prompts[i],
            'completion': judged.completions[i],
            'reward': float(judged.scores.total[i]),
            'rewards': {k: _number(v[i]) for k, v in judged.scores.parts.items()},
        }
        for i in range(min(count, len(judged.prompts)))
    ]


def _number(value: float) -> float | None:
    return None if np.isnan(value) else float(value)


def _run_stage(
    setup: evaluate.Setup, stage: Stage, params: Params, ref_params: Params | None
) -> TrainState:
    """Trains from `params`, or from this stage's newest checkpoint, to the stage's last step."""
    save = setup.config.checkpoint
    manager = checkpoint.open_manager(setup.workdir / 'checkpoints' / stage.name, keep=save.keep)
    state = update.init_state(setup.model, stage.optimizer, params, setup.mesh)
    start = manager.latest_step() or 0
    if start:
        state = checkpoint.restore(manager, state, setup.mesh)
        print(f'{stage.name}: resumed at step {start} of {stage.steps}')
    if start == stage.steps and not stage.heldout:
        manager.close()
        return state
    step = update.make_step(setup.model, stage.optimizer, stage.algorithm, setup.mesh)
    records = report.Records(setup.workdir, stage.name, start)
    with _closing(manager, records), _bar(stage, start) as bar:
        for k in range(start, stage.steps):
            with _saving_on_failure(manager, k, state):
                if stage.heldout and k % stage.eval_every == 0:
                    records.heldout(k, stage.heldout(state.params))
                began = time.perf_counter()
                collected = stage.collect(k, state.params)
            state, metrics = _update(setup, stage, step, state, ref_params, collected, began)
            records.metrics(k, metrics)
            records.completions(k, collected.completions)
            _show(bar, metrics)
            if (k + 1) % save.every == 0 or k + 1 == stage.steps:
                checkpoint.save(manager, k + 1, state)
        if stage.heldout:
            records.heldout(stage.steps, stage.heldout(state.params))
    return state


def _update(setup, stage, step, state, ref_params, collected: Collected, began: float):
    """One call of the update program, and its metrics on the host."""
    called = time.perf_counter()
    skipped = int(state.skipped)
    rollout, values = sharding.put_groups((collected.rollout, collected.rewards), setup.mesh)
    state, device = step(state, ref_params, rollout, values, stage.sampling, stage.objective)
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
        manager.close()
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
