"""The trainer of the policy: the training state of a stage, and the calls of its update program."""

import dataclasses
import functools
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from grpo_jax import models, sharding
from grpo_jax.algorithm.checks import shape_of
from grpo_jax.algorithm.config import Algorithm
from grpo_jax.algorithm.critic import Critic
from grpo_jax.algorithm.explanation import TokenTerms, make_explain
from grpo_jax.algorithm.program import MOMENTS, Step, init_state, make_train_step
from grpo_jax.engine.calls import Call
from grpo_jax.engine.compute import Compute, ComputePlan
from grpo_jax.run import abstract
from grpo_jax.run.compute_plans import settle
from grpo_jax.run.heldout import make_evaluator
from grpo_jax.run.parameters import initial_adapters
from grpo_jax.run.problems import Problems
from grpo_jax.run.rollouts import CollectedBatch, Position
from grpo_jax.run.setup import Setup
from grpo_jax.run.stages import Stage, StageParams, make_optimizer
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
            explain=self.explain,
        )

    @functools.cached_property
    def plan(self) -> ComputePlan:
        """How updates are computed."""
        algorithm, shape = self.algorithm, shape_of(self.batch()[0])
        whole_groups = algorithm.pairwise or not isinstance(algorithm.loss, str)
        return settle(
            self.setup, self.name, self.compute, shape, self.update_call,
            fixed=('rows',) if whole_groups else (),
        )  # fmt: skip

    @property
    def _lora(self) -> bool:
        return bool(self.setup.model.config.lora.rank)

    @property
    def _offload_moments(self) -> bool:
        return bool(self.setup.config.mesh.offload_moments)

    @property
    def _fixed_reference(self) -> bool:
        """Whether the initial policy is the reference of the whole stage."""
        return self.algorithm.uses_reference and not self.algorithm.moves_reference

    @functools.cached_property
    def _program(self) -> Step:
        return self._program_of(self.plan)

    def _program_of(self, plan: ComputePlan) -> Step:
        return make_train_step(
            self.setup.model,
            self.optimizer,
            self.algorithm,
            self.setup.mesh,
            compute=Compute(*plan),
            critic=self.critic,
            offload_moments=self._offload_moments,
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
            offload_moments=self._offload_moments,
        )

    def step(
        self, state: TrainState, initial: StageParams, batch: CollectedBatch
    ) -> tuple[TrainState, dict[str, jax.Array]]:
        """Do one training step."""
        frozen, rollout, rewards, algorithm = self._arguments(initial, batch)
        state, metrics = self._call(state, frozen, rollout, rewards, algorithm).run()
        if self.controls_entropy:
            metrics |= {'entropy_bonus': algorithm.entropy_bonus}
        return state, metrics

    def explain(
        self, state: TrainState, initial: StageParams, batch: CollectedBatch, update: int = 0
    ) -> TokenTerms:
        """Return what an inner update of the step does with each token; the state stays.

        Args:
          state: before the step.
          initial: the parameters that the stage started with.
          batch: of the step.
          update: number of the inner update, from 0.
        """
        frozen, rollout, rewards, algorithm = self._arguments(initial, batch)
        run = make_explain(
            self.setup.model,
            self.algorithm,
            self.setup.mesh,
            compute=Compute(*self.plan),
            critic=self.critic,
        )
        updated = None
        if update:
            before, now = (
                dataclasses.replace(a, inner_updates=update) for a in (self.algorithm, algorithm)
            )
            trainer = dataclasses.replace(self, algorithm=before)
            copied = jax.tree.map(jnp.copy, state)
            call = trainer._call(copied, frozen, rollout, rewards, now, plan=self.plan)
            updated = call.run()[0].params
        return run(state, frozen, rollout, rewards, self.sampling, algorithm, updated=updated)

    def _arguments(
        self, initial: StageParams, batch: CollectedBatch
    ) -> tuple[Params | None, Rollout, Any, Algorithm]:
        """Return what `_call` takes after the state."""
        rollout, rewards = sharding.put_rollout(batch.rollout, batch.rewards, self.setup.mesh)
        frozen = initial.policy if self._lora or self._fixed_reference else None
        algorithm = self.algorithm
        if self.controls_entropy:
            entropy = batch.position.entropy
            bonus: Any = algorithm.entropy_bonus if entropy is None else entropy.bonus
            bonus = np.asarray(bonus, np.float32)  # an array: a bonus of 0 has the same program
            algorithm = dataclasses.replace(algorithm, entropy_bonus=bonus)
        return frozen, rollout, rewards, algorithm

    def update_call(self, plan: ComputePlan | None = None) -> Call:
        """Return the abstract call of the update program; None: as `plan` says."""
        setup = self.setup
        fresh = functools.partial(
            init_state,
            setup.model,
            self.optimizer,
            critic=self.critic,
            moving_reference=self.algorithm.moves_reference,
        )
        host = MOMENTS if self._offload_moments else ()
        state = sharding.placed(jax.eval_shape(fresh, abstract.key()), setup.mesh, host=host)
        frozen = None
        if self._lora or self._fixed_reference:
            base = models.Transformer(setup.model.config.base)
            frozen = abstract.params(setup, base)
        algorithm = self.algorithm
        if self.controls_entropy:
            algorithm = dataclasses.replace(algorithm, entropy_bonus=np.zeros((), np.float32))
        batch = abstract.on_mesh(setup, *self.batch())
        return self._call(state, frozen, *batch, algorithm, plan=plan)

    def _call(
        self, state: Any, frozen: Any, rollout: Any, rewards: Any, algorithm: Algorithm, *,
        plan: ComputePlan | None = None,
    ) -> Call:  # fmt: skip
        """Return a call of the update program; None: as `self.plan` says."""
        program = self._program if plan is None else self._program_of(plan)
        return Call(
            program, (state, frozen, rollout, rewards, self.sampling, algorithm),
            name=f'update of {" x ".join(map(str, rollout.tokens.shape))} tokens',
            closed_over=(self.setup.model.config, plan or self.plan),
        )  # fmt: skip

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
