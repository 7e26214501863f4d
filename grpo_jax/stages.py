"""The stages of a training run: where their data come from, and what is done with them."""

import dataclasses
import functools
import logging
import operator
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from grpo_jax import data, judging, rewards, setup, sharding, update
from grpo_jax.advantages import check_group_options
from grpo_jax.losses import Objective
from grpo_jax.optimizer import adamw
from grpo_jax.rewards import pool
from grpo_jax.sample import check_sampling
from grpo_jax.setup import Problems, Setup
from grpo_jax.types import Params, Prompts, Rollout, Sampling

log = logging.getLogger('grpo_jax')

SFT = update.Algorithm(
    loss='nll', baseline='none', scale='none', aggregation='token_mean', kl='none'
)


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
    heldout: Callable[[Params], judging.Evaluation] | None  # asked every eval_every steps
    eval_every: int


def sft_stage(made: Setup, training: Problems) -> Stage:
    """Imitation of the demonstrations."""
    c, config = made.config.sft, made.config
    algorithm = dataclasses.replace(SFT, microbatch=c.microbatch)
    ones = np.ones((c.batch_size, 1), np.float32)
    sharding.check_batch(c.batch_size, c.microbatch, made.mesh)
    table = data.tokenize_demonstrations(
        training.rows,
        made.tokenizer,
        completion_template=config.data.demonstration,
        completion_length=config.data.completion_length,
        **setup.prompting(config, made.workdir),
    )
    if table.prompts.dropped:
        log.warning('demonstrations: %s', table.prompts.summary())
    batches = data.batches(table, c.batch_size, seed=config.seed)

    def collect(step: int, params: Params) -> Collected:
        return Collected(batches[step], ones, {}, [])

    optimizer, schedule = adamw(steps=c.steps, **c.optimizer)
    return Stage(
        'sft', c.steps, algorithm, optimizer, schedule, Sampling(), Objective(), collect, None, 1
    )


def grpo_stage(made: Setup, training: Problems, heldout: Problems) -> Stage:
    """GRPO on sampled completions."""
    c, config = made.config.grpo, made.config
    algorithm, objective = _objective(c.algorithm, c.objective)
    sampling = Sampling(**c.sampling)
    check_sampling(sampling)
    check_group_options(c.group_size, baseline=algorithm.baseline, scale=algorithm.scale)
    sharding.check_batch(c.batch_size, algorithm.microbatch, made.mesh)
    if c.sample_batch:
        sharding.check_batch(c.batch_size, c.sample_batch, made.mesh, name='sample_batch')
    functions, weights = rewards.build(c.rewards)
    judge = functools.partial(
        judging.judge, problems=training, functions=functions, weights=weights
    )
    batches = data.batches(training.table, c.batch_size, seed=config.seed)

    def collect(step: int, params: Params) -> Collected:
        start = time.perf_counter()

        def sample(prompts: Prompts) -> Rollout:
            return made.sampler(
                params, prompts, step=step, sampling=sampling, group_size=c.group_size
            )

        rollout, judged, seconds = _sample_and_judge(sample, judge, batches[step], c.sample_batch)
        metrics = {**rewards.statistics(judged.scores), 'timing/sample': seconds}
        metrics['timing/reward'] = time.perf_counter() - start - seconds
        if config.eval.correct in judged.scores.parts:
            metrics['accuracy'] = float(np.mean(judged.scores.parts[config.eval.correct] >= 1))
        total = judged.scores.total.reshape(c.batch_size, c.group_size)
        some = _completion_rows(judged, config.log.completions)
        return Collected(rollout, total, metrics, some)

    ask = functools.partial(
        judging.evaluate, made.sampler, problems=heldout, **judging.settings(config.eval)
    )
    optimizer, schedule = adamw(steps=c.steps * algorithm.inner_updates, **c.optimizer)
    return Stage(
        'grpo', c.steps, algorithm, optimizer, schedule, sampling, objective, collect, ask,
        config.eval.every,
    )  # fmt: skip


def _objective(options: Any, scalars: Any) -> tuple[update.Algorithm, Objective]:
    """Both from their sections of the config: a term whose weight is 0 is left out of the program.

    Raises:
      ValueError: an unknown option, or a scalar that is set but that none of the options reads.
    """
    algorithm, objective = update.Algorithm(**options), Objective(**scalars)
    if not objective.beta:
        algorithm = dataclasses.replace(algorithm, kl='none')
    if objective.entropy_bonus:
        algorithm = dataclasses.replace(algorithm, entropy=True)
    if objective.top_entropy < 1:
        algorithm = dataclasses.replace(algorithm, entropy_mask=True)
    read = {
        'dual_clip': algorithm.loss == 'clipped',
        'clip_low': algorithm.loss in ('clipped', 'cispo'),
        'clip_high': algorithm.loss in ('clipped', 'cispo'),
        'tau_positive': algorithm.loss == 'sapo',
        'tau_negative': algorithm.loss == 'sapo',
        'importance_cap': algorithm.importance != 'none',
        'kl_clamp': algorithm.kl != 'none',
    }
    usual = Objective()
    for name, active in read.items():
        value = getattr(objective, name)
        if not active and value != getattr(usual, name):
            raise ValueError(
                f'grpo.objective.{name}={value} does nothing with loss={algorithm.loss!r}, '
                f'importance={algorithm.importance!r} and kl={algorithm.kl!r}: leave it away'
            )
    return algorithm, objective


def _sample_and_judge(
    sample: Callable[[Prompts], Rollout],
    judge: Callable[[Rollout], judging.Judged],
    prompts: Prompts,
    size: int,
) -> tuple[Rollout, judging.Judged, float]:
    """Samples `size` prompts at a time (0: all) and rewards each part while the next is sampled.

    Completions do not depend on how they are cut, see `sample.row_keys`.

    Returns:
      the whole rollout on the devices, what the rewards say of it, and the seconds that sampling
      took.
    """
    began, before, count = time.perf_counter(), pool.timeouts(), len(prompts.index)
    size = size or count
    cuts = [slice(start, start + size) for start in range(0, count, size)]
    parts = [sample(jax.tree.map(operator.itemgetter(cut), prompts)) for cut in cuts]
    finished = []

    def wait_and_judge(part: Rollout) -> judging.Judged:
        host = jax.device_get(part)
        finished.append(time.perf_counter())
        return judge(host)

    if len(parts) == 1:  # in the main thread, where an interrupt or a signal can end a reward
        return parts[0], wait_and_judge(parts[0]), finished[0] - began
    with ThreadPoolExecutor(max_workers=len(parts)) as threads:
        judged = judging.together(list(threads.map(wait_and_judge, parts)))
    # The parts were judged at once, so each has counted the others' timeouts too.
    scores = judged.scores._replace(timeouts=pool.timeouts() - before)
    rollout = jax.tree.map(lambda *x: jnp.concatenate(x), *parts)
    return rollout, judged._replace(scores=scores), max(finished) - began


def _completion_rows(judged: judging.Judged, count: int) -> list[dict[str, Any]]:
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
