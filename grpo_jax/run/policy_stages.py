"""The stages that train the policy: supervised fine-tuning, and GRPO or another method."""

import dataclasses
import functools
import logging
from collections.abc import Callable, Iterable
from typing import Any

import jax
import numpy as np
import optax

from grpo_jax import data, models, sharding
from grpo_jax.algorithm.config import Algorithm
from grpo_jax.algorithm.critic import Critic
from grpo_jax.algorithm.presets import SFT
from grpo_jax.algorithm.program import Step, init_state, make_train_step
from grpo_jax.algorithm.sample import last_block
from grpo_jax.engine.compute import Compute
from grpo_jax.run.collector import RolloutCollector
from grpo_jax.run.graders import make_grader
from grpo_jax.run.heldout import make_evaluator
from grpo_jax.run.methods import (
    algorithm_of,
    check_group,
    compute_of,
    entropy_control_of,
    sampling_of,
)
from grpo_jax.run.parameters import initial_adapters
from grpo_jax.run.problems import Problems, prompting
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
    table = data.tokenize_demonstrations(
        training.rows,
        setup.tokenizer,
        completion_template=config.data.demonstration,
        completion_length=config.data.completion_length,
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
        following = position.next_step(rollout)
        metrics = {'num_tokens': float(following.tokens)}
        return CollectedBatch(rollout, ones, metrics, [], following)

    trainer = _PolicyTrainer(
        setup,
        SFT,
        Compute(microbatch=c.microbatch),
        *make_optimizer(config, 'sft', c.steps),
        Sampling(),
    )

    def step(state: TrainState, initial: StageParams, batch: CollectedBatch) -> Any:
        state, metrics = trainer.step(state, initial, batch)
        return state, {name: metrics[name] for name in _SFT_METRICS}

    stage = trainer.stage('sft', c.steps, sample, collect, heldout)
    return dataclasses.replace(stage, step=step, ahead=True)


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
    )
    updates = c.steps * algorithm.inner_updates
    optimizer, schedule = make_optimizer(config, 'grpo', updates)
    if algorithm.step == 'trust_region':
        optimizer, schedule = optax.identity(), None
    trainer = _PolicyTrainer(
        setup,
        algorithm,
        compute,
        optimizer,
        schedule,
        sampling,
        critic=_make_critic(setup, updates) if algorithm.has_critic else None,
        initial_policy_samples=c.source == 'reference',
        controls_entropy=control is not None,
    )
    stage = trainer.stage(
        stage_name('grpo', iteration), c.steps, collector.sample, collector.collect, heldout
    )
    follow = None
    if control is not None:
        start = float(algorithm.entropy_bonus)

        def follow(position: Position, entropy: float) -> Position:
            return position.follow(entropy, start, **control)

    return dataclasses.replace(
        stage, ahead=c.ahead, stale=c.ahead and c.source == 'policy', follow=follow
    )


@dataclasses.dataclass(frozen=True)
class _PolicyTrainer:
    """Trains the policy by the update program."""

    setup: Setup
    algorithm: Algorithm
    compute: Compute
    optimizer: optax.GradientTransformation
    schedule: optax.Schedule | None
    sampling: Sampling
    critic: Critic | None = None
    initial_policy_samples: bool = False
    controls_entropy: bool = False  # whether the entropy bonus is that of the position

    def stage(
        self,
        name: str,
        steps: int,
        sample: Callable[[Position, Params, StageParams], Iterable[Rollout]],
        collect: Callable[[Position, Iterable[Rollout], Params, StageParams], CollectedBatch],
        heldout: Problems | None,
    ) -> Stage:
        """Make the stage that trains on these samples."""
        return Stage(
            name,
            steps,
            self.algorithm.inner_updates,
            self.schedule,
            start=self.start,
            step=self.step,
            sample=sample,
            collect=collect,
            policy=self.policy,
            finish=self.finish,
            heldout=make_evaluator(self.setup, heldout),
            eval_every=self.setup.config.eval.every,
            algorithm=self.algorithm,
            compute=self.compute,
        )

    @property
    def _lora(self) -> bool:
        return bool(self.setup.model.config.lora.rank)

    @property
    def _fixed_reference(self) -> bool:
        """Whether the initial policy is the reference of the whole stage."""
        return self.algorithm.uses_reference and not self.algorithm.moves_reference

    @functools.cached_property
    def _program(self) -> Step:
        return make_train_step(
            self.setup.model,
            self.optimizer,
            self.algorithm,
            self.setup.mesh,
            compute=self.compute,
            critic=self.critic,
        )

    def start(self, initial: StageParams) -> TrainState:
        """Make the training state."""
        setup, critic, values = self.setup, self.critic, initial.values
        if critic is not None and values is None:
            values = models.scalar_params(initial.policy, critic.model.config)
        keep = self._lora or self._fixed_reference or self.initial_policy_samples
        return init_state(
            setup.model,
            self.optimizer,
            initial_adapters(setup) if self._lora else initial.policy,
            setup.mesh,
            donate=self._lora or not (keep or critic),
            critic=critic,
            value_params=values,
            moving_reference=self.algorithm.moves_reference,
        )

    def step(
        self, state: TrainState, initial: StageParams, batch: CollectedBatch
    ) -> tuple[TrainState, dict[str, jax.Array]]:
        """Do one training step."""
        rollout, rewards = sharding.put_groups((batch.rollout, batch.rewards), self.setup.mesh)
        frozen = initial.policy if self._lora or self._fixed_reference else None
        if not self.controls_entropy:
            return self._program(state, frozen, rollout, rewards, self.sampling, self.algorithm)
        entropy = batch.position.entropy
        bonus: Any = self.algorithm.entropy_bonus if entropy is None else entropy.bonus
        bonus = np.asarray(bonus, np.float32)  # an array, so that a bonus of 0 has the same program
        algorithm = dataclasses.replace(self.algorithm, entropy_bonus=bonus)
        state, metrics = self._program(state, frozen, rollout, rewards, self.sampling, algorithm)
        return state, metrics | {'entropy_bonus': bonus}

    def policy(self, state: TrainState, initial: StageParams) -> Params:
        """Return the parameters that sample and are evaluated."""
        if self._lora:
            return models.join_adapters(initial.policy, state.params)
        return state.params

    def finish(self, initial: StageParams, state: TrainState) -> StageParams:
        """Return the parameters for the next stage."""
        if self._lora:
            return initial._replace(adapters=state.params, values=state.value_params)
        return initial._replace(policy=state.params, values=state.value_params)


def _make_critic(setup: Setup, updates: int) -> Critic:
    model = models.Transformer(models.with_scalar_head(setup.model.config))
    return Critic(model, make_optimizer(setup.config, 'critic', max(updates, 1))[0])
