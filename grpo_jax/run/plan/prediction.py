"""Predicted times: a roofline for each instruction of a compiled program, and the model's FLOPs."""

from typing import NamedTuple

from grpo_jax import models
from grpo_jax.run.abstract import Shape
from grpo_jax.run.plan.measuring import Measured
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


class StepTime(NamedTuple):
    """What a training step takes.

    Attributes:
      seconds: of each program, as often as a step runs it.
      mfu: the model's FLOPs of the update in its time, as a share of what the devices can do.
    """

    seconds: dict[str, float]
    mfu: float

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
    seconds, mfu = {}, 0.0
    for measured in programs:
        program, times = measured.program, times_of(measured, chip)
        if program.per_step and times.total:
            seconds[program.name] = times.total * program.per_step
        if program.name.endswith(': update') and times.total:
            work = update_flops(stage, config)
            mfu = work / (times.total * devices * chip.flops)
    return StepTime(seconds, mfu)


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


def forward_flops(config: models.ModelConfig, shape: Shape) -> float:
    """The FLOPs of reading B prompts once each, and their completions, with the output logits.

    A product of [m, k] and [k, n] is 2 m k n. Attention is causal; a group's prompt is read once.
    """
    c, (groups, group_size, prompt, length) = config, shape
    tokens = groups * (prompt + group_size * length)
    attention = c.width * c.head_dim * (2 * c.heads + 2 * c.kv_heads)
    mlp = 3 * c.width * c.mlp_width * (c.experts_per_token if c.experts else 1)
    router = c.width * c.experts
    products = c.layers * (attention + mlp + router) * tokens
    products += c.width * c.vocab_size * groups * group_size * length
    pairs = groups * (prompt**2 / 2 + group_size * (length * prompt + length**2 / 2))
    return 2.0 * products + 4.0 * c.layers * c.heads * c.head_dim * pairs
