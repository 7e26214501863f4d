"""From the config's `grpo` section to an `Algorithm`, and presets applied to a config."""

from collections.abc import Callable, Mapping
from typing import Any

from ml_collections import ConfigDict

from grpo_jax import plugins
from grpo_jax.algorithm.checks import check_support
from grpo_jax.algorithm.config import Algorithm
from grpo_jax.algorithm.entropy_control import next_entropy_bonus
from grpo_jax.algorithm.estimators import check_group_size
from grpo_jax.algorithm.preferences import PAIRWISE
from grpo_jax.algorithm.presets import CONVENTIONS, PRESETS
from grpo_jax.engine.compute import Compute
from grpo_jax.engine.decode import WEIGHTS
from grpo_jax.engine.token_sampling import check_sampling, without_inactive
from grpo_jax.run.config_checks import differing_defaults
from grpo_jax.run.defaults import algorithm_fields, optimizer_fields
from grpo_jax.run.errors import renamed
from grpo_jax.run.sections import preset_hint
from grpo_jax.run.selection import DROPS
from grpo_jax.types import Sampling

# Keys of `grpo` that a method sets in addition to its `Algorithm`.
RUN_KEYS: dict[str, dict[str, Any]] = {
    'rft': {'source': 'reference', 'drop': ('wrong', 'duplicates')},
    'online_rft': {'drop': ('wrong',)},
    'dpo': {'source': 'reference'},
    'ipo': {'source': 'reference'},
    'dpo_hinge': {'source': 'reference'},
    'dpo_smoothed': {'source': 'reference'},
    'dapo': {'refill': 3},  # soft overlong punishment is the reward `soft_overlong`
}
_PLAIN = {'source': 'policy', 'refill': 0, 'drop': ()}


def apply(config: ConfigDict, name: str) -> ConfigDict:
    """Sets `grpo.algorithm` and the other keys of the method `name`, and returns the config.

    A preset sets every option of `grpo.algorithm`, also beta, so the result does not depend on
    their previous values: change options afterwards. Model, data, rewards, learning rate and sizes
    stay as they are.

    Args:
      config: from `config.defaults()`.
      name: a key of `presets.PRESETS` or of `presets.CONVENTIONS`. A convention sets only the
        options that it names and that have an effect: those of the standard deviation if the method
        in `config` divides by that of a group, and those of the KL term if it has such a term.

    Raises:
      ValueError: unknown name.
    """
    if name in CONVENTIONS:
        return _follow(config, CONVENTIONS[name])
    if name not in PRESETS:
        known = ', '.join((*PRESETS, *CONVENTIONS))
        raise ValueError(f'preset {name!r} is unknown: use one of {known}')
    config.grpo.algorithm.update(algorithm_fields() | PRESETS[name])
    config.grpo.update(_PLAIN | RUN_KEYS.get(name, {}))
    if PRESETS[name].get('step') == 'trust_region':  # which uses no optimizer
        config.grpo.optimizer.update(optimizer_fields())
    return config


def _follow(config: ConfigDict, convention: Mapping[str, Any]) -> ConfigDict:
    algorithm = config.grpo.algorithm
    kl = algorithm.kl != 'none' and bool(algorithm.beta)
    of_group = algorithm.scale in ('std', 'population_std')
    effective = {
        'scale': of_group,
        'advantage_eps': of_group,
        'kl_clamp': kl,
        # k2 has the gradient of the reverse KL without a ratio.
        'unbiased_kl': kl and algorithm.kl_place == 'loss' and algorithm.kl != 'k2',
    }
    algorithm.update({name: value for name, value in convention.items() if effective[name]})
    return config


def algorithm_of(config: ConfigDict) -> Algorithm:
    """Returns the algorithm of the `grpo` section; imports functions that it names by their path.

    Raises:
      ValueError: an unknown option, or one that is set and has no effect.
    """
    options = dict(config.grpo.algorithm)
    for name in ('loss', 'advantage_estimator'):
        if ':' in options[name] or '.' in options[name]:
            options[name] = _load(f'grpo.algorithm.{name}', options[name])
    options['advantage_estimator'] = options['advantage_estimator'] or None
    try:
        algorithm = Algorithm(**options)
    except ValueError as error:
        name = str(error).partition('=')[0]
        text = str(error).replace(', None', ", or '' for none")  # which has no type in a config
        hint = preset_hint(options.get(name)) if ' is unknown: ' in text else ''
        raise ValueError(f'grpo.algorithm.{text}{hint}') from error
    if algorithm.moves_reference and config.model.lora.rank:
        raise ValueError(
            f'grpo.algorithm.reference_decay={algorithm.reference_decay} with adapters, whose '
            'reference is their fixed base: set it to 1 or train all parameters'
        )
    entropy_control_of(config)
    _check_source(config.grpo, algorithm)
    _check_sampler(config.grpo, algorithm)
    _check_sections(config, algorithm)
    return algorithm


def entropy_control_of(config: ConfigDict) -> dict[str, float] | None:
    """Returns the arguments of `next_entropy_bonus` in the `grpo` section; None: a fixed bonus.

    Raises:
      ValueError: an option out of its range.
    """
    options, start = dict(config.grpo.entropy_control), config.grpo.algorithm.entropy_bonus
    if not options['target']:
        return None
    if not 0 < options['target'] < float('inf'):
        raise ValueError(
            f'grpo.entropy_control.target={options["target"]} is out of range: make it above 0, or '
            '0 to switch it off'
        )
    try:
        next_entropy_bonus(start, 0.0, **options)
    except ValueError as error:
        raise ValueError(f'grpo.entropy_control: {error}') from error
    if not options['least'] <= start <= options['most']:
        raise ValueError(
            f'grpo.algorithm.entropy_bonus={start} is where grpo.entropy_control starts: make it '
            f'at least least={options["least"]} and at most most={options["most"]}'
        )
    return options


def compute_of(config: ConfigDict) -> Compute:
    """Returns the compute options of the `grpo` section.

    Raises:
      ValueError: an option out of its range.
    """
    try:
        return Compute(**config.grpo.compute, remat=config.model.remat)
    except ValueError as error:
        raise ValueError(f'grpo.compute.{error}') from error


def sampling_of(config: ConfigDict) -> Sampling:
    """Returns how completions are sampled in training, without filters that keep all tokens.

    Raises:
      ValueError: an option out of its range.
    """
    sampling = Sampling(**config.grpo.sampling)
    with renamed({'sampling ': 'grpo.sampling.'}):
        check_sampling(sampling)
    return without_inactive(sampling)


def check_group(config: ConfigDict, algorithm: Algorithm) -> None:
    """Checks that groups have enough completions for the advantages.

    Raises:
      ValueError: they have not.
    """
    with renamed({'group_size=': 'grpo.group_size=', 'pass_k=': 'grpo.algorithm.pass_k='}):
        check_group_size(algorithm, config.grpo.group_size)


def _load(key: str, path: str) -> Callable[..., Any]:
    try:
        loaded: Callable[..., Any] = plugins.load(path)
    except ValueError as error:
        raise ValueError(f'{key}: {error}') from error
    return loaded


def _check_sections(config: ConfigDict, algorithm: Algorithm) -> None:
    """Rejects keys that are set in a section without effect."""
    unused = {}
    if not algorithm.has_critic:
        unused['critic'] = f'baseline={algorithm.baseline!r}'
    if not config.reward_model.weight:
        unused['reward_model'] = 'reward_model.weight=0'
    elif not config.reward_model.steps:
        for name in ('loss', 'batch_size', 'group_size', 'microbatch', 'replay', 'optimizer'):
            unused[f'reward_model.{name}'] = 'reward_model.steps=0'
    if not config.grpo.entropy_control.target:
        unused['grpo.entropy_control'] = 'grpo.entropy_control.target=0'
    if algorithm.step == 'trust_region':
        unused['grpo.optimizer'] = "step='trust_region'"
    for path, reason in differing_defaults(config, unused):
        raise ValueError(f'{path} has no effect with {reason}: remove it')


def _check_source(c: ConfigDict, algorithm: Algorithm) -> None:
    if c.source not in ('policy', 'reference'):
        raise ValueError(f'grpo.source={c.source!r} is unknown: use policy or reference')
    if c.source == 'reference' and algorithm.loss not in ('nll', *PAIRWISE):
        raise ValueError(
            f"grpo.source='reference' with loss={algorithm.name_of_loss!r}, which needs samples of "
            f"the current policy: use loss='nll' or one of {', '.join(PAIRWISE)}"
        )
    if algorithm.pairwise and (c.group_size < 2 or c.drop):
        raise ValueError(
            f'loss={algorithm.loss!r} needs pairs: grpo.group_size={c.group_size} has to be '
            f'at least 2, and grpo.drop={tuple(c.drop)} empty'
        )
    for name in c.drop:
        if name not in DROPS:
            known = ', '.join(DROPS)
            raise ValueError(f'grpo.drop names {name!r}, which is unknown: use any of {known}')


def _check_sampler(c: ConfigDict, algorithm: Algorithm) -> None:
    """Rejects samples of a policy that differs from the trained one without a correction."""
    if c.weights not in WEIGHTS:
        raise ValueError(f'grpo.weights={c.weights!r} is unknown: use one of {", ".join(WEIGHTS)}')
    if c.weights != 'model' and algorithm.importance == 'none':
        raise ValueError(
            f"grpo.weights={c.weights!r} with grpo.algorithm.importance='none': completions are "
            "sampled with rounded weights; correct for it by importance='token' or another, or "
            "sample with weights='model'"
        )
    if c.ahead and c.source == 'policy' and algorithm.importance == 'none':
        raise ValueError(
            "grpo.ahead=True with grpo.algorithm.importance='none': completions are sampled by a "
            "policy one update old; correct for it by importance='token' or another"
        )
    check_support(algorithm, recorded='support' in c.record)
    if c.ahead and c.refill:
        raise ValueError(
            f'grpo.ahead=True with grpo.refill={c.refill}: extra batches need the policy that '
            'sampled the first one, which has been updated by then; remove one of them'
        )
