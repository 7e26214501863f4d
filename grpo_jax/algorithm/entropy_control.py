"""An entropy bonus that keeps the entropy near a target; in a run `grpo.entropy_control`."""


def next_entropy_bonus(
    coefficient: float,
    entropy: float,
    *,
    target: float,
    step: float = 0.005,
    least: float = 0.0,
    most: float = 1.0,
) -> tuple[float, float]:
    """Adaptive entropy control: the coefficient, and the bonus of the next training step.

    Skywork-OR1 (He et al., arXiv 2505.22312, section 3.3), with the rule and the defaults of TRL's
    `use_adaptive_entropy`: c <- c + step where the entropy is at most the target, else c - step,
    within [least, most]; the bonus is c where the entropy is at most the target, else 0.

    It depends on all earlier steps, so it is not part of the update. In a training loop of your own
    set `Algorithm.entropy_bonus` to the bonus as an array, such as `jnp.float32(bonus)`: a program
    has the term for any array.

    Args:
      coefficient: c of the last step; at first 0, or another start.
      entropy: of the policy in the last step, in nats per token; the metric 'entropy'.
      target: in nats per token.
      step: by how much c changes.
      least: the lower bound of c.
      most: the upper bound of c.

    Returns:
      The new coefficient, to pass to the next call, and the bonus.

    Raises:
      ValueError: `least` is above `most`, or a number is negative or not finite.
    """
    if not (0 <= least <= most < float('inf') and 0 <= step < float('inf')):
        raise ValueError(
            f'least={least}, most={most}, step={step}: make least at most most, all of them '
            'finite, and least and step at least 0'
        )
    low = entropy <= target
    coefficient = min(max(coefficient + (step if low else -step), least), most)
    return coefficient, coefficient if low else 0.0
