"""The stages that train the policy: supervised fine-tuning, and GRPO or another method."""

import dataclasses
import logging
from collections.abc import Iterable
from typing import Any

import jax
import numpy as np
import optax

from grpo_jax import data, sharding
from grpo_jax.algorithm.presets import SFT
from grpo_jax.algorithm.sample import last_block
from grpo_jax.engine.compute import Compute
from grpo_jax.engine.token_sampling import without_inactive
from grpo_jax.run import abstract
from grpo_jax.run.collector import RolloutCollector
from grpo_jax.run.episodes.sampling import EpisodeSampler
from grpo_jax.run.graders import make_grader
from grpo_jax.run.methods import (
    algorithm_of,
    check_group,
    compute_of,
    entropy_control_of,
    sampling_of,
)
from grpo_jax.run.policy_trainer import PolicyTrainer, make_critic
from grpo_jax.run.problems import Problems, naming_template, prompting
from grpo_jax.run.rollouts import (
    CollectedBatch,
    Position,
    PrefetchedBatches,
)
from grpo_jax.run.setup import Setup
from grpo_jax.run.stages import (
    Stage,
    StageParams,
    check_batch_size,
    make_optimizer,
    stage_name,
)
from grpo_jax.types import Params, Rollout, Sampling, TrainState

log = logging.getLogger('grpo_jax')

# Metrics of SFT: demonstrations have no sampler, no rewards, and lengths that do not change.
_SFT_METRICS = ('loss', 'grad_norm', 'step_tokens', 'skipped_updates')


def sft_stage(setup: Setup, training: Problems, heldout: Problems | None = None) -> Stage:
    """Make the stage of supervised fine-tuning on demonstrations.

    Args:
      setup: the run.
      training: problems with demonstrations.
      heldout: problems to evaluate on, where this is the last stage.

    Raises:
      ValueError: options or demonstrations that the user has to fix.
    """
    c, config = setup.config.sft, setup.config
    check_batch_size(config, setup.mesh, 'sft', 'microbatch', c.microbatch)
    with naming_template('data.demonstration'):
        table = data.tokenize_demonstrations(
            training.rows,
            setup.tokenizer,
            completion_template=config.data.demonstration,
            completion_length=config.data.completion_length,
            hidden=setup.hidden,
            **prompting(config, setup.workdir),
        )
    for ids in (table.prompts.used_ids(), table.tokens[table.mask]):
        data.check_token_ids(ids, setup.tokenizer, setup.model.config.vocab_size)
    if table.prompts.dropped:
        log.warning('demonstrations: %s', table.prompts.summary())
    batches = data.batches(
        table,
        c.batch_size,
        seed=config.seed,
        name='sft.batch_size',
        split=config.data.train_split,
    )
    ones = np.ones((c.batch_size, 1), np.float32)

    def sample(position: Position, policy: Params, initial: StageParams) -> list[Rollout]:
        return [sharding.put_groups(batches[position.step], setup.mesh)]

    def collect(
        position: Position, sampled: Iterable[Rollout], policy: Params, initial: StageParams
    ) -> CollectedBatch:
        rollout = last_block(sampled)
        following = position.next_step(batches[position.step])
        metrics = {'num_tokens': float(following.tokens)}
        return CollectedBatch(rollout, ones, metrics, [], following)

    shape = (c.batch_size, 1, table.prompts.tokens.shape[1], table.tokens.shape[1])
    rewards = jax.ShapeDtypeStruct(ones.shape, ones.dtype)
    trainer = PolicyTrainer(
        setup,
        'sft',
        lambda: (abstract.rollout(shape), rewards),
        SFT,
        Compute(microbatch=c.microbatch, remat=config.model.remat),
        *make_optimizer(config, 'sft', c.steps),
        without_inactive(Sampling()),
    )

    def step(state: TrainState, initial: StageParams, batch: CollectedBatch) -> Any:
        state, metrics = trainer.step(state, initial, batch)
        return state, {name: metrics[name] for name in _SFT_METRICS}

    stage = trainer.stage(c.steps, sample, collect, heldout)
    rows = table.prompts.summary()
    return dataclasses.replace(stage, step=step, ahead=True, shape=shape, rows=rows)


def grpo_stage(
    setup: Setup, training: Problems, heldout: Problems | None, iteration: int = 1
) -> Stage:
    """Make the stage that trains on sampled completions by the options of the `grpo` section.

    Args:
      setup: the run.
      training: problems to train on.
      heldout: problems to evaluate on, if there are any.
      iteration: from 1.

    Raises:
      ValueError: options that the user has to fix.
    """
    c, config = setup.config.grpo, setup.config
    algorithm, compute, sampling = algorithm_of(config), compute_of(config), sampling_of(config)
    control = entropy_control_of(config)
    check_group(config, algorithm)
    check_batch_size(config, setup.mesh, 'grpo', 'compute.microbatch', compute.microbatch)
    batches = data.batches(
        training.table,
        c.batch_size,
        seed=config.seed,
        name='grpo.batch_size',
        split=config.data.train_split,
    )
    collector = RolloutCollector(
        setup,
        algorithm,
        make_grader(setup, training, algorithm),
        PrefetchedBatches(lambda number: sharding.put_groups(batches[number], setup.mesh)),
        stage_name('grpo', iteration),
        EpisodeSampler(setup, training),
    )
    updates = c.steps * algorithm.inner_updates
    optimizer, schedule = make_optimizer(config, 'grpo', updates)
    if algorithm.step == 'trust_region':
        optimizer, schedule = optax.identity(), None
    length = training.table.tokens.shape[1]
    shape = (c.batch_size, c.group_size, length, config.data.completion_length)

    def batch() -> tuple[Rollout, Any]:
        trained = (*shape[:1], 2, *shape[2:]) if algorithm.pairwise else shape
        rollout = abstract.sampled_rollout(
            setup, trained, sampling, tuple(c.record), kept=bool(c.drop)
        )
        count = len(collector.grader.functions) + (setup.reward_model is not None)
        return rollout, abstract.rewards(algorithm, trained, count)

    trainer = PolicyTrainer(
        setup,
        stage_name('grpo', iteration),
        batch,
        algorithm,
        compute,
        optimizer,
        schedule,
        sampling,
        critic=make_critic(setup, updates) if algorithm.has_critic else None,
        initial_policy_samples=c.source == 'reference',
        controls_entropy=control is not None,
    )
    stage = trainer.stage(c.steps, collector.sample, collector.collect, heldout)
    follow = None
    if control is not None:
        start = float(algorithm.entropy_bonus)

        def follow(position: Position, entropy: float) -> Position:
            return position.follow(entropy, start, **control)

    return dataclasses.replace(
        stage,
        ahead=c.ahead,
        stale=c.ahead and c.source == 'policy',
        follow=follow,
        shape=shape,
        rows=training.table.summary(),
    )
