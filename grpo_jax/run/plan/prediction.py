"""Predicted times: a roofline for each instruction of a compiled program, and the model's FLOPs."""

from typing import NamedTuple

from grpo_jax import models
from grpo_jax.run.plan.measuring import Measured
from grpo_jax.run.plan.model_flops import forward_flops
from grpo_jax.run.stages import Stage
from grpo_jax.sharding import Chip


class Times(NamedTuple):
    """Seconds of one run of a program: the least that they can be.

    Attributes:
      compute: the sum over instructions of the time of their FLOPs or their bytes, the longer one.
      links: that collectives take, which may run at the same time.
    """

    compute: float
    links: float

    @property
    def total(self) -> float:
        """Seconds, if collectives run while the rest computes."""
        return max(self.compute, self.links)

    @property
    def without_overlap(self) -> float:
        """Seconds, if nothing else runs while collectives do."""
        return self.compute + self.links


class StepTime(NamedTuple):
    """What a training step takes.

    Attributes:
      seconds: of each program, as often as a step runs it.
      mfu: the model's FLOPs of the update in its time, as a share of what the devices can do.
      mfu_without_overlap: the same, if nothing else runs while collectives do.
    """

    seconds: dict[str, float]
    mfu: float
    mfu_without_overlap: float

    @property
    def total(self) -> float:
        """Seconds of a step."""
        return sum(self.seconds.values())


def times_of(measured: Measured, chip: Chip) -> Times:
    """The times of a program."""
    return Times(measured.costs.seconds, measured.costs.traffic / chip.links)


def step_time(
    stage: Stage, config: models.ModelConfig, programs: list[Measured], chip: Chip, devices: int
) -> StepTime:
    """The time of a training step whose completions all have T tokens.

    Args:
      stage: the stage.
      config: of the decoder.
      programs: of the stage.
      chip: what a device can do.
      devices: how many there are.
    """
    seconds, mfus = {}, (0.0, 0.0)
    for measured in programs:
        program, times = measured.program, times_of(measured, chip)
        if program.per_step and times.total:
            seconds[program.name] = times.total * program.per_step
        if program.name.endswith(': update') and times.total:
            ideal = update_flops(stage, config) / (devices * chip.flops)
            mfus = ideal / times.total, ideal / times.without_overlap
    return StepTime(seconds, *mfus)


def update_flops(stage: Stage, config: models.ModelConfig) -> float:
    """The FLOPs that an update needs, of all devices together; recomputation does not count.

    A backward pass is twice a forward pass, and with adapters, whose base has no gradient, as much
    as one. Completions have T tokens.
    """
    algorithm, forward = stage.algorithm, forward_flops(config, stage.shape)
    gradient = (2 if config.lora.rank else 3) * forward * stage.updates
    if algorithm is None:
        return gradient
    passes = int(algorithm.uses_reference) + int(algorithm.needs_old_logprobs)
    if algorithm.has_critic:
        passes += 1 + 3 * stage.updates
    return gradient + passes * forward
