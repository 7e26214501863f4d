"""The interface of a training stage, and helpers that all stages share."""

import dataclasses
from collections.abc import Callable, Iterable
from typing import NamedTuple

import jax
import optax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from grpo_jax import sharding
from grpo_jax.algorithm import optimizer as optimizers
from grpo_jax.algorithm.config import Algorithm
from grpo_jax.algorithm.explanation import TokenTerms
from grpo_jax.engine.calls import Call
from grpo_jax.engine.compute import ComputePlan
from grpo_jax.run.evaluation import Evaluation
from grpo_jax.run.mesh import splittable_group
from grpo_jax.run.rollouts import CollectedBatch, Position
from grpo_jax.types import Params, Rollout, TrainState


class StageParams(NamedTuple):
    """The parameters that a stage starts with, or passes on to the next stage."""

    policy: Params  # without adapters
    adapters: Params = None  # of the policy, if they are not yet merged into it
    reward: Params = None  # of the reward model
    values: Params = None  # of the critic


@dataclasses.dataclass(frozen=True)
class Stage:
    """One training stage. Its options are checked when it is made.

    Functions take the parameters that the stage started with as `initial`.

    Attributes:
      name: of its checkpoints and records.
      steps: number of training steps.
      updates: updates of the optimizer per step.
      schedule: schedule of the learning rate, or None.
      start: makes the training state from `initial`; may donate the buffers of the policy.
      step: the training step, (state, initial, batch) -> (state, metrics).
      sample: dispatches the sampling of a step, (position, policy, initial) -> partial rollouts, of
        which the last is complete. It dispatches the first one at once, and all of them if the
        stage is `ahead`.
      collect: waits for the samples and grades them,
        (position, samples, policy, initial) -> batch.
      policy: the parameters that sample and are evaluated, (state, initial) -> parameters.
      finish: (initial, state) -> parameters for the next stage.
      heldout: evaluates a policy on held-out problems, (policy, initial) -> evaluation, every
        `eval_every` steps; None: no evaluation.
      eval_every: steps between these evaluations.
      algorithm: the algorithm of a policy's stage.
      plan: returns how its updates are computed.
      shape: (B, G, P, T) of the batches that it samples, or that it trains on without sampling.
      rows: how many rows of the data set it uses.
      update: the abstract call of its update program, with a plan instead of the settled one.
      explain: what a step does with each token, (state, initial, batch, inner update) -> terms;
        None: the stage trains no policy.
      ahead: whether step k + 1 is sampled before the update of step k.
      stale: whether that sampling depends on the policy, which the update changes.
      follow: changes a position by the metric `entropy` of its last step, (position, entropy) ->
        position; None: positions do not depend on metrics.
    """

    name: str
    steps: int
    updates: int
    schedule: optax.Schedule | None
    start: Callable[[StageParams], TrainState]
    step: Callable[
        [TrainState, StageParams, CollectedBatch], tuple[TrainState, dict[str, jax.Array]]
    ]
    sample: Callable[[Position, Params, StageParams], Iterable[Rollout]]
    collect: Callable[[Position, Iterable[Rollout], Params, StageParams], CollectedBatch]
    policy: Callable[[TrainState, StageParams], Params]
    finish: Callable[[StageParams, TrainState], StageParams]
    heldout: Callable[[Params, StageParams], Evaluation] | None = None
    eval_every: int = 1
    algorithm: Algorithm | None = None
    plan: Callable[[], ComputePlan] | None = None
    shape: tuple[int, int, int, int] = (1, 1, 1, 1)
    rows: str = ''
    update: Callable[[ComputePlan | None], Call] | None = None
    explain: Callable[..., TokenTerms] | None = None
    ahead: bool = False
    stale: bool = False
    follow: Callable[[Position, float], Position] | None = None


def stage_name(kind: str, iteration: int) -> str:
    """Return the name of a stage: 'grpo', then 'grpo-2'; see `layout.stage_order`."""
    return kind if iteration == 1 else f'{kind}-{iteration}'


def make_optimizer(
    config: ConfigDict, section: str, steps: int
) -> tuple[optax.GradientTransformation, optax.Schedule]:
    """Make the optimizer of a section of the config and its schedule.

    Args:
      config: of the run.
      section: name of the section.
      steps: updates until the end of the schedule.

    Raises:
      ValueError: an option of the optimizer is wrong; names the section.
    """
    options = config[section].optimizer.to_dict()
    try:
        return optimizers.make_optimizer(steps=steps, **options)
    except ValueError as error:
        of_name = f'optimizer {options["name"]!r}' in str(error)
        key = f' ({section}.optimizer.name)' if of_name else ''
        raise ValueError(f'{section}.optimizer: {error}{key}') from error


def check_batch_size(
    config: ConfigDict, mesh: Mesh | None, section: str, name: str, microbatch: int | None
) -> None:
    """Check that a section's batch divides into microbatches and over the mesh.

    Args:
      config: of the run.
      mesh: the devices; None: one.
      section: name of the section.
      name: key of the microbatch in that section, for error messages.
      microbatch: groups per microbatch; None: chosen automatically.

    Raises:
      ValueError: it does not.
    """
    batch_size = config[section].batch_size
    sharding.check_batch(
        batch_size,
        batch_size if microbatch is None else microbatch,
        mesh,
        group_size=splittable_group(config) if section == 'grpo' else 1,
        of=f'{section}.batch_size',
        name=f'{section}.{name}',
    )
