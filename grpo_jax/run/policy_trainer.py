"""The trainer of the policy: the training state of a stage, and the calls of its update program."""

import dataclasses
import functools
from collections.abc import Callable, Iterable
from typing import Any

import jax
import numpy as np
import optax

from grpo_jax import models, sharding
from grpo_jax.algorithm.checks import shape_of
from grpo_jax.algorithm.config import Algorithm
from grpo_jax.algorithm.critic import Critic
from grpo_jax.algorithm.program import Step, init_state, make_train_step
from grpo_jax.engine.compute import Compute, ComputePlan
from grpo_jax.run import abstract
from grpo_jax.run.compute_plans import settle
from grpo_jax.run.heldout import make_evaluator
from grpo_jax.run.parameters import initial_adapters
from grpo_jax.run.problems import Problems
from grpo_jax.run.rollouts import CollectedBatch, Position
from grpo_jax.run.setup import Setup
from grpo_jax.run.stages import Call, Stage, StageParams, make_optimizer
from grpo_jax.types import Params, Rollout, Sampling, TrainState


@dataclasses.dataclass(frozen=True)
class PolicyTrainer:
    """Trains the policy by the update program.

    Attributes:
      setup: the run.
      name: of the stage.
      batch: returns an abstract rollout and rewards of an update.
      algorithm: what the update computes.
      compute: the config's options of how it does.
      optimizer: of the policy.
      schedule: of its learning rate, or None.
      sampling: how completions are sampled.
      critic: if there is one.
      initial_policy_samples: whether the stage's initial policy is needed to the end.
      controls_entropy: whether the entropy bonus is that of the position.
    """

    setup: Setup
    name: str
    batch: Callable[[], tuple[Rollout, Any]]
    algorithm: Algorithm
    compute: Compute
    optimizer: optax.GradientTransformation
    schedule: optax.Schedule | None
    sampling: Sampling
    critic: Critic | None = None
    initial_policy_samples: bool = False
    controls_entropy: bool = False

    def stage(
        self,
        steps: int,
        sample: Callable[[Position, Params, StageParams], Iterable[Rollout]],
        collect: Callable[[Position, Iterable[Rollout], Params, StageParams], CollectedBatch],
        heldout: Problems | None,
    ) -> Stage:
        """Make the stage that trains on these samples."""
        return Stage(
            self.name,
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
            plan=lambda: self.plan,
            update=self.update_call,
        )

    @functools.cached_property
    def plan(self) -> ComputePlan:
        """How updates are computed."""
        shape = shape_of(self.batch()[0])
        return settle(self.setup, self.name, self.compute, shape, self.update_call)

    @property
    def _lora(self) -> bool:
        return bool(self.setup.model.config.lora.rank)

    @property
    def _fixed_reference(self) -> bool:
        """Whether the initial policy is the reference of the whole stage."""
        return self.algorithm.uses_reference and not self.algorithm.moves_reference

    @functools.cached_property
    def _program(self) -> Step:
        return self._program_of(Compute(*self.plan))

    def _program_of(self, compute: Compute) -> Step:
        return make_train_step(
            self.setup.model,
            self.optimizer,
            self.algorithm,
            self.setup.mesh,
            compute=compute,
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
        rollout, rewards = sharding.put_rollout(batch.rollout, batch.rewards, self.setup.mesh)
        frozen = initial.policy if self._lora or self._fixed_reference else None
        if not self.controls_entropy:
            return self._program(state, frozen, rollout, rewards, self.sampling, self.algorithm)
        entropy = batch.position.entropy
        bonus: Any = self.algorithm.entropy_bonus if entropy is None else entropy.bonus
        bonus = np.asarray(bonus, np.float32)  # an array, so that a bonus of 0 has the same program
        algorithm = dataclasses.replace(self.algorithm, entropy_bonus=bonus)
        state, metrics = self._program(state, frozen, rollout, rewards, self.sampling, algorithm)
        return state, metrics | {'entropy_bonus': bonus}

    def update_call(self, compute: Compute | None = None) -> Call:
        """Return the abstract call of the update program; None: as `plan` says."""
        setup = self.setup
        fresh = functools.partial(
            init_state,
            setup.model,
            self.optimizer,
            critic=self.critic,
            moving_reference=self.algorithm.moves_reference,
        )
        state = sharding.placed(jax.eval_shape(fresh, abstract.key()), setup.mesh)
        frozen = None
        if self._lora or self._fixed_reference:
            base = models.Transformer(setup.model.config.base)
            frozen = abstract.params(setup, base)
        algorithm = self.algorithm
        if self.controls_entropy:
            algorithm = dataclasses.replace(algorithm, entropy_bonus=np.zeros((), np.float32))
        batch = abstract.on_mesh(setup, *self.batch())
        program = self._program if compute is None else self._program_of(compute)
        return Call(program, (state, frozen, *batch, self.sampling, algorithm))

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


def make_critic(setup: Setup, updates: int) -> Critic:
    """Make the critic of a run, with an optimizer for this number of updates."""
    model = models.Transformer(models.with_scalar_head(setup.model.config))
    return Critic(model, make_optimizer(setup.config, 'critic', max(updates, 1))[0])
