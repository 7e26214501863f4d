"""The stage that trains the reward model on samples of the policy."""

import dataclasses
import functools
from collections.abc import Iterable
from typing import Any

import jax
import numpy as np
import optax
from jaxtyping import Bool, Int

from grpo_jax import data, models, rewards, sharding
from grpo_jax.algorithm import reward_model
from grpo_jax.algorithm.program import init_state
from grpo_jax.algorithm.sample import last_block
from grpo_jax.data.batching import BatchSequence
from grpo_jax.engine.calls import Call
from grpo_jax.engine.compute import Compute, ComputePlan
from grpo_jax.run import abstract, hosts
from grpo_jax.run.compute_plans import settle
from grpo_jax.run.episodes.recorded import RecordedReplies
from grpo_jax.run.episodes.sampling import EpisodeSampler
from grpo_jax.run.graders import calls_of, check_functions, correctness
from grpo_jax.run.grading import Grader
from grpo_jax.run.methods import algorithm_of
from grpo_jax.run.problems import Problems
from grpo_jax.run.replay_buffer import ReplayBuffer
from grpo_jax.run.rollouts import CollectedBatch, Position
from grpo_jax.run.setup import Setup
from grpo_jax.run.stages import (
    Stage,
    StageParams,
    check_batch_size,
    make_optimizer,
    stage_name,
)
from grpo_jax.types import Array, Params, Prompts, Rollout, Sampling, StepRewards, TrainState

_FIRST_STEP = 1 << 20  # number of the first step in its random numbers; the policy's start at 0


def reward_stage(setup: Setup, training: Problems, iteration: int = 1) -> Stage:
    """Make the stage that trains the reward model on samples of the iteration's first policy.

    A share of the groups comes from samples of earlier iterations, see `ReplayBuffer`.

    Args:
      setup: the run, with a reward model.
      training: problems to sample completions of.
      iteration: from 1.

    Raises:
      ValueError: options that the user has to fix.
    """
    c, config = setup.config.reward_model, setup.config
    algorithm_of(config)  # rejects options without effect
    check_loss(c.loss, c.kind, c.group_size)
    check_batch_size(config, setup.mesh, 'reward_model', 'microbatch', c.microbatch)
    optimizer, schedule = make_optimizer(config, 'reward_model', c.steps)
    batches = data.batches(
        training.table,
        c.batch_size,
        seed=config.seed + 1,
        name='reward_model.batch_size',
        split=config.data.train_split,
    )
    length = training.table.tokens.shape[1]
    shape = (c.batch_size, c.group_size, length, config.data.completion_length)
    training_stage = _RewardTraining(
        setup,
        shape,
        iteration,
        _label_grader(setup, training),
        EpisodeSampler(setup, training),
        batches,
        ReplayBuffer(setup.workdir / 'replay', iteration, c.replay, config.seed),
        optimizer,
    )
    return Stage(
        stage_name('reward', iteration),
        c.steps,
        1,
        schedule,
        start=training_stage.start,
        step=training_stage.step,
        sample=training_stage.sample,
        collect=training_stage.collect,
        policy=lambda state, initial: initial.policy,
        finish=lambda initial, state: initial._replace(reward=state.params),
        plan=lambda: training_stage.plan,
        shape=shape,
        rows=training.table.summary(),
        update=training_stage.update_call,
    )


def check_loss(loss: str, kind: str, group_size: int) -> None:
    """Check that the loss of a reward model fits its kind and its groups.

    Raises:
      ValueError: it does not.
    """
    if (loss == 'step') != (kind == 'process'):
        raise ValueError(
            f'reward_model.loss={loss!r} with kind={kind!r}: an outcome model is trained by '
            "'bradley_terry' or 'label', a process model by 'step'"
        )
    if loss == 'bradley_terry' and group_size < 2:
        raise ValueError(
            f"reward_model.group_size={group_size} with loss='bradley_terry', which compares "
            "completions of one prompt: make it at least 2, or use loss='label'"
        )


def _label_grader(setup: Setup, training: Problems) -> Grader:
    """Make the grader of what the reward model learns: correctness, or the step function."""
    config = setup.config
    functions, weights = correctness(config)
    if not functions and config.reward_model.kind == 'outcome':
        raise ValueError(
            f'reward_model.steps={config.reward_model.steps} with an empty eval.correct, which '
            'labels the completions: name the reward function that is 1 where an answer is right'
        )
    steps = None
    if config.reward_model.kind == 'process':
        name, function, _ = rewards.build_steps(config.grpo.step_rewards)
        steps = name, function, 1.0
    check_functions(functions, training, alone=True)
    calls = calls_of(config, functions, steps)
    return Grader(training, functions, weights, steps, calls=calls)


@jax.jit
def _count(length: Int[Array, ' B'], mask: Bool[Array, 'B G T']) -> Int[Array, '']:
    """Count the tokens of a rollout that the reward model reads: each prompt once."""
    return length.sum() + mask.sum()


@dataclasses.dataclass(frozen=True)
class _RewardTraining:
    """Samples, labels and trains; the methods are those of a `Stage`."""

    setup: Setup
    shape: abstract.Shape
    iteration: int
    grader: Grader
    sampler: EpisodeSampler
    batches: BatchSequence[Prompts]
    replay: ReplayBuffer
    optimizer: optax.GradientTransformation

    @property
    def _model(self) -> models.Transformer:
        if self.setup.reward_model is None:
            raise ValueError('reward_model.steps without a reward model: set reward_model.weight')
        return self.setup.reward_model

    @functools.cached_property
    def plan(self) -> ComputePlan:
        """How updates are computed."""
        c, name = self.setup.config.reward_model, stage_name('reward', self.iteration)
        compute = Compute(microbatch=c.microbatch, remat=self.setup.config.model.remat)
        return settle(
            self.setup, name, compute, self.shape, self.update_call,
            fixed=('logprob_chunk', 'rows'),
        )  # fmt: skip

    @functools.cached_property
    def _program(self) -> reward_model.Step:
        return self._program_of(self.plan)

    def _program_of(self, plan: ComputePlan) -> reward_model.Step:
        loss, mesh = self.setup.config.reward_model.loss, self.setup.mesh
        model, microbatch = plan.configure(self._model), plan.microbatch
        return reward_model.make_step(model, self.optimizer, loss, mesh, microbatch=microbatch)

    def start(self, initial: StageParams) -> TrainState:
        params = initial.reward
        if params is None:
            params = models.scalar_params(initial.policy, self._model.config)
        return init_state(self._model, self.optimizer, params, self.setup.mesh)

    def update_call(self, plan: ComputePlan | None = None) -> Call:
        """Return the abstract call of the update program; None: as `plan` says."""
        shape = self.shape
        fresh = functools.partial(init_state, self._model, self.optimizer)
        state = sharding.placed(jax.eval_shape(fresh, abstract.key()), self.setup.mesh)
        tokens = shape[0], shape[1], shape[3]
        labels: Any = jax.ShapeDtypeStruct(shape[:2], np.float32)
        if self.setup.config.reward_model.loss == 'step':
            labels = jax.ShapeDtypeStruct(tokens, np.float32), jax.ShapeDtypeStruct(tokens, bool)
        batch = abstract.rollout(shape), labels
        where = sharding.groups(self.setup.mesh)
        rollout, labels = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where), batch
        )
        arrays = labels if isinstance(labels, tuple) else (labels,)
        return self._call(state, rollout, *arrays, plan=plan)

    def _call(
        self, state: Any, rollout: Any, *labels: Any, plan: ComputePlan | None = None
    ) -> Call:
        """Return a call of the update program; None: as `self.plan` says."""
        program = self._program if plan is None else self._program_of(plan)
        name = f'update of the reward model, {" x ".join(map(str, rollout.tokens.shape))} tokens'
        closed_over = self._model.config, plan or self.plan
        return Call(program, (state, rollout, *labels), name=name, closed_over=closed_over)

    def sample(self, position: Position, policy: Params, initial: StageParams) -> list[Rollout]:
        config = self.setup.config
        number = (self.iteration - 1) * config.reward_model.steps + position.step
        rollout = self.sampler(
            initial.policy,
            self.batches[number],
            book=self._book(position),
            step=_FIRST_STEP + number,
            sampling=Sampling(**config.grpo.sampling),
            group_size=config.reward_model.group_size,
        )
        return [rollout]

    def collect(
        self,
        position: Position,
        sampled: Iterable[Rollout],
        policy: Params,
        initial: StageParams,
    ) -> CollectedBatch:
        rollout = hosts.fetch(last_block(sampled))
        books = [] if (book := self._book(position)) is None else [book]
        graded = dataclasses.replace(self.grader, books=books).grade(rollout, None)
        right = graded.texts.scores.parts.get(self.setup.config.eval.correct)
        labels: Any = graded.steps
        if labels is None and right is not None:
            labels = np.nan_to_num(right).reshape(rollout.ended.shape)  # None counts as wrong
        rollout, labels = self.replay.mix(position.step, (rollout._replace(trained=None), labels))
        metrics = {} if right is None else {'accuracy': float(np.mean(right >= 1))}
        following = position.next_step(rollout)
        metrics['num_tokens'] = float(following.tokens)
        return CollectedBatch(rollout, labels, metrics, [], following)

    def _book(self, position: Position) -> RecordedReplies | None:
        return self.sampler.book(f'{stage_name("reward", self.iteration)}.{position.step}')

    def step(
        self, state: TrainState, initial: StageParams, batch: CollectedBatch
    ) -> tuple[TrainState, dict[str, jax.Array]]:
        rollout, labels = sharding.put_groups((batch.rollout, batch.rewards), self.setup.mesh)
        arrays = tuple(labels) if isinstance(labels, StepRewards) else (labels,)
        state, metrics = self._call(state, rollout, *arrays).run()
        tokens = _count(rollout.prompts.length, rollout.mask)
        metrics = {f'reward_model/{name}': value for name, value in metrics.items()}
        metrics['skipped_updates'] = metrics.pop('reward_model/skipped_updates')
        return state, metrics | {'step_tokens': tokens}
