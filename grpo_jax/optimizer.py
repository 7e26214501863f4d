"""The optimizer: optax's AdamW behind a gradient clip, with warm-up and decay; and its step."""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from grpo_jax.types import Params


def adamw(
    *,
    learning_rate: float,
    steps: int,
    warmup_steps: int = 0,
    hold_steps: int = 0,
    decay: str = 'constant',
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    clip_norm: float = 1.0,
) -> tuple[optax.GradientTransformation, optax.Schedule]:
    """AdamW behind a clip of the gradient's global norm, with linear warm-up.

    Args:
      learning_rate: the peak.
      steps: optimizer updates in all, where the decay ends.
      warmup_steps: updates over which the rate rises linearly; the first already moves.
      hold_steps: updates at the peak between warm-up and decay.
      decay: 'constant', 'linear' or 'cosine' (both to zero at `steps`).
      b1: decay of the first moment.
      b2: decay of the second moment.
      eps: Adam's epsilon.
      weight_decay: of matrices; norm scales and biases are left alone.
      clip_norm: largest global norm of the gradient; 0: any.

    Returns:
      The transformation, and its schedule from the number of updates made to the learning rate.

    Raises:
      ValueError: unknown decay, a number that is out of its range, or a warm-up and hold that are
        longer than the run.
    """
    for name, value, most in (
        ('learning_rate', learning_rate, math.inf),
        ('warmup_steps', warmup_steps, math.inf),
        ('hold_steps', hold_steps, math.inf),
        ('b1', b1, 1.0),
        ('b2', b2, 1.0),
        ('eps', eps, math.inf),
        ('weight_decay', weight_decay, math.inf),
        ('clip_norm', clip_norm, math.inf),
    ):
        if not 0 <= value < most:  # a NaN is not
            below = f' and below {most:g}' if most < math.inf else ''
            raise ValueError(f'{name}={value} is out of range: make it at least 0{below}')
    start = warmup_steps + hold_steps
    if start > steps:
        raise ValueError(
            f'warmup_steps={warmup_steps} and hold_steps={hold_steps} are more than steps={steps}: '
            'shorten them'
        )
    shapes: dict[str, Callable[[Any], Any]] = {
        'constant': lambda x: 1.0,
        'linear': lambda x: 1.0 - x,
        'cosine': lambda x: 0.5 * (1 + jnp.cos(jnp.pi * x)),
    }
    if decay not in shapes:
        raise ValueError(f'decay={decay!r} is unknown: use one of {", ".join(shapes)}')

    def schedule(count):
        warm = jnp.minimum((count + 1) / (warmup_steps + 1), 1.0)
        done = jnp.clip((count - start) / max(steps - start, 1), 0.0, 1.0)
        return learning_rate * warm * shapes[decay](done)

    def matrices(params):
        return jax.tree_util.tree_map_with_path(
            lambda path, _: not path[-1].key.endswith(('scale', 'bias')), params
        )

    optimizer = optax.chain(
        optax.clip_by_global_norm(clip_norm) if clip_norm else optax.identity(),
        optax.adamw(schedule, b1=b1, b2=b2, eps=eps, weight_decay=weight_decay, mask=matrices),
    )
    return optimizer, schedule


def updated(
    optimizer: optax.GradientTransformation,
    gradient: Params,
    params: Params,
    moments: optax.OptState,
    finite: jax.Array,
) -> tuple[Params, optax.OptState]:
    """Parameters and moments after one update, or as they were where `finite` bool[] is false.

    In a branch, which writes over what it was given: a choice at the end would need both.
    """

    def step(params, moments):
        updates, after = optimizer.update(gradient, moments, params)
        return optax.apply_updates(params, updates), after

    return jax.lax.cond(finite, step, lambda *unchanged: unchanged, params, moments)


def either(first: jax.Array, new: Params, old: Params) -> Params:
    """Each leaf of `new` where `first` bool[] is true, else of `old`."""
    return jax.tree.map(lambda new, old: jnp.where(first, new, old), new, old)
