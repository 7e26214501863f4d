"""Optimizers with gradient clipping and a learning-rate schedule, and the parameter update."""

import inspect
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike
from jaxtyping import Array, Bool

from grpo_jax import plugins, sharding
from grpo_jax.algorithm.stored_moments import with_moments
from grpo_jax.types import Params, TrainState


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
    moments: str = '',
) -> tuple[optax.GradientTransformation, optax.Schedule]:
    """AdamW with gradient clipping by global norm and a learning-rate schedule.

    Args:
      learning_rate: the peak.
      steps: total number of optimizer updates; the decay ends there.
      warmup_steps: updates over which the rate rises linearly; it is above 0 at the first update.
      hold_steps: updates at the peak between warm-up and decay.
      decay: 'constant', 'linear' or 'cosine' (both to zero at `steps`).
      b1: decay of the first moment.
      b2: decay of the second moment.
      eps: Adam's epsilon.
      weight_decay: applied to all parameters but norm scales and biases.
      clip_norm: largest global norm of the gradient; 0: no clipping.
      moments: dtype in which the moments are stored, see `stored_moments.with_moments`.

    Returns:
      The transformation, and its schedule from the number of updates made to the learning rate.

    Raises:
      ValueError: unknown decay or moments, a number that is out of its range, or a warm-up and hold
        that are longer than `steps` together.
    """
    _check_ranges(
        b1=(b1, 1.0), b2=(b2, 1.0), eps=(eps, math.inf), weight_decay=(weight_decay, math.inf)
    )
    schedule = warmup_schedule(
        learning_rate=learning_rate,
        steps=steps,
        warmup_steps=warmup_steps,
        hold_steps=hold_steps,
        decay=decay,
    )

    def matrices(params: Params) -> Params:
        return jax.tree_util.tree_map_with_path(
            lambda path, _: not path[-1].key.endswith(('scale', 'bias')), params
        )

    update = optax.adamw(schedule, b1=b1, b2=b2, eps=eps, weight_decay=weight_decay, mask=matrices)
    return _with_clipping(clip_norm, with_moments(update, moments)), schedule


def make_optimizer(
    name: str | Callable[..., optax.GradientTransformation] = 'adamw',
    *,
    learning_rate: float,
    steps: int,
    warmup_steps: int = 0,
    hold_steps: int = 0,
    decay: str = 'constant',
    clip_norm: float = 1.0,
    moments: str = '',
    options: Mapping[str, Any] | None = None,
    **adamw_options: float,
) -> tuple[optax.GradientTransformation, optax.Schedule]:
    """`adamw`, or any other optimizer with the same clipping and schedule.

    Args:
      name: 'adamw'; or an optax factory, called as `factory(learning_rate=schedule, **options)`; or
        the path of one, such as 'optax.contrib:muon'.
      learning_rate: the peak.
      steps: total number of optimizer updates; the decay ends there.
      warmup_steps: as in `adamw`.
      hold_steps: as in `adamw`.
      decay: as in `adamw`.
      clip_norm: largest global norm of the gradient; 0: no clipping.
      moments: dtype in which the floats of the optimizer's state are stored, see
        `stored_moments.with_moments`.
      options: keyword arguments of the factory.
      **adamw_options: `b1`, `b2`, `eps` and `weight_decay` of `adamw`. Other optimizers take
        theirs from `options`.

    Returns:
      The transformation, and its schedule from the number of updates made to the learning rate.

    Raises:
      ValueError: an optimizer that cannot be loaded, an option that it does not have or that has no
        effect, or a schedule that `adamw` rejects.
    """
    options = dict(options or {})
    schedule_options: dict[str, Any] = {
        'learning_rate': learning_rate, 'steps': steps, 'warmup_steps': warmup_steps,
        'hold_steps': hold_steps, 'decay': decay,
    }  # fmt: skip
    if name == 'adamw':
        if options:
            raise ValueError(
                f"options={options} has no effect with name='adamw': set b1, b2, eps and "
                'weight_decay instead'
            )
        return adamw(clip_norm=clip_norm, moments=moments, **(schedule_options | adamw_options))
    factory = plugins.lookup('optimizer', name, {'adamw': adamw}) if isinstance(name, str) else name
    label = name if isinstance(name, str) else getattr(name, '__name__', repr(name))
    usual = inspect.signature(adamw).parameters
    for option, value in adamw_options.items():
        if option not in usual or value != usual[option].default:
            raise ValueError(
                f'{option}={value} has no effect with name={label!r}: use options instead'
            )
    schedule = warmup_schedule(**schedule_options)
    optimizer = with_moments(_call_factory(factory, label, schedule, options), moments)
    return _with_clipping(clip_norm, optimizer), schedule


def _call_factory(
    factory: Callable[..., Any], label: str, schedule: optax.Schedule, options: dict[str, Any]
) -> optax.GradientTransformation:
    """The optimizer that a factory returns for the schedule and its own options."""
    signature = inspect.signature(factory)
    try:
        signature.bind(learning_rate=schedule, **options)
    except TypeError as error:
        known = ', '.join(name for name in signature.parameters if name != 'learning_rate')
        raise ValueError(
            f'options={options} do not fit {label}: {error}; it takes {known}'
        ) from error
    optimizer = factory(learning_rate=schedule, **options)
    if not isinstance(optimizer, optax.GradientTransformation):
        kind = type(optimizer).__name__
        raise ValueError(f'{label} returned {kind}: return an optax.GradientTransformation')
    return optimizer


def warmup_schedule(
    *, learning_rate: float, steps: int, warmup_steps: int = 0, hold_steps: int = 0,
    decay: str = 'constant',
) -> optax.Schedule:  # fmt: skip
    """The learning rate as a function of the number of updates made.

    Arguments as in `adamw`.

    Raises:
      ValueError: unknown decay, a number out of its range, or a schedule longer than `steps`.
    """
    _check_ranges(
        learning_rate=(learning_rate, math.inf),
        warmup_steps=(warmup_steps, math.inf),
        hold_steps=(hold_steps, math.inf),
    )
    start = warmup_steps + hold_steps
    if start > steps:
        raise ValueError(
            f'warmup_steps={warmup_steps} and hold_steps={hold_steps} add up to more than '
            f'steps={steps}: shorten them'
        )
    shapes: dict[str, Callable[[Any], Any]] = {
        'constant': lambda x: 1.0,
        'linear': lambda x: 1.0 - x,
        'cosine': lambda x: 0.5 * (1 + jnp.cos(jnp.pi * x)),
    }
    if decay not in shapes:
        raise ValueError(f'decay={decay!r} is unknown: use one of {", ".join(shapes)}')

    def schedule(count: ArrayLike) -> jax.Array:
        warm = jnp.minimum((count + 1) / (warmup_steps + 1), 1.0)
        done = jnp.clip((count - start) / max(steps - start, 1), 0.0, 1.0)
        return learning_rate * warm * shapes[decay](done)

    return schedule


def _with_clipping(
    clip_norm: float, optimizer: optax.GradientTransformation
) -> optax.GradientTransformation:
    _check_ranges(clip_norm=(clip_norm, math.inf))
    clip = optax.clip_by_global_norm(clip_norm) if clip_norm else optax.identity()
    return optax.chain(clip, optimizer)


def _check_ranges(**values: tuple[float, float]) -> None:
    """Checks that each (value, limit) by name is at least 0 and below its limit."""
    for name, (value, limit) in values.items():
        if not 0 <= value < limit:  # false for NaN too
            below = f' and below {limit:g}' if limit < math.inf else ''
            raise ValueError(f'{name}={value} is out of range: make it at least 0{below}')


def apply_gradient(
    optimizer: optax.GradientTransformation,
    state: TrainState,
    gradient: Params,
    finite: Bool[Array, ''],
) -> tuple[TrainState, dict[str, jax.Array]]:
    """One update of the parameters, or none where the gradient is not finite.

    Args:
      optimizer: any optax transformation.
      state: parameters and moments of a policy or a reward model.
      gradient: of the loss.
      finite: bool[], whether to update.

    Returns:
      The new state, and the scalar 'grad_norm'.
    """
    params, moments = _updated(optimizer, gradient, state.params, state.opt_state, finite)
    state = _count_skipped(state, finite)._replace(params=params, opt_state=moments)
    return state, {'grad_norm': optax.tree.norm(gradient)}


def apply_value_gradient(
    optimizer: optax.GradientTransformation,
    state: TrainState,
    gradient: Params,
    finite: Bool[Array, ''],
) -> tuple[TrainState, dict[str, jax.Array]]:
    """`apply_gradient` for the critic's parameters, without counting a skipped update again."""
    params, moments = _updated(
        optimizer, gradient, state.value_params, state.value_opt_state, finite
    )
    state = state._replace(value_params=params, value_opt_state=moments)
    return state, {'critic/grad_norm': optax.tree.norm(gradient)}


def _updated(
    optimizer: optax.GradientTransformation,
    gradient: Params,
    params: Params,
    moments: optax.OptState,
    finite: Bool[Array, ''],
) -> tuple[Params, optax.OptState]:
    """Parameters and moments after one update, or unchanged where `finite` is false.

    `cond` updates its operands in place; `where` would need memory for both results. Moments in
    the host's memory are copied to the devices once the gradient is there, and back. Outside of the
    branch, XLA would copy them at the start of the program, and keep them during the backward pass.
    """

    def step(params: Params, moments: optax.OptState) -> tuple[Params, optax.OptState]:
        updates, after = optimizer.update(gradient, sharding.on_device(moments), params)
        return optax.apply_updates(params, updates), sharding.back_on_host(after, moments)

    return jax.lax.cond(finite, step, lambda *old: old, params, moments)


def accept_params(state: TrainState, params: Params, finite: Bool[Array, '']) -> TrainState:
    """The state with new parameters where `finite` is true, else with one more skipped update."""
    params = jax.tree.map(lambda new, old: jnp.where(finite, new, old), params, state.params)
    return _count_skipped(state, finite)._replace(params=params)


def _count_skipped(state: TrainState, finite: Bool[Array, '']) -> TrainState:
    """The state with one more skipped update where `finite` is false."""
    return state._replace(skipped=state.skipped + (1 - finite.astype(jnp.int32)))
