"""From the config's `grpo` section to what the update computes; refuses what would do nothing."""

import dataclasses
from typing import NamedTuple

from ml_collections import ConfigDict

from grpo_jax.algorithm import Algorithm
from grpo_jax.collect import DROPS
from grpo_jax.config import differing_defaults
from grpo_jax.preferences import PAIRWISE
from grpo_jax.sample import WEIGHTS
from grpo_jax.types import Objective, Sampling


class Parts(NamedTuple):
    """What a policy is trained with."""

    algorithm: Algorithm
    objective: Objective
    sampling: Sampling


def parts_of(config: ConfigDict) -> Parts:
    """Algorithm and scalars of the `grpo` section, a term of weight 0 left out of the program.

    Raises:
      ValueError: an unknown option, or one that is set but that none of the others reads.
    """
    c = config.grpo
    algorithm, objective = Algorithm(**c.algorithm), Objective(**c.objective)
    if not objective.beta:
        algorithm = dataclasses.replace(algorithm, kl='none')
    if objective.entropy_bonus:
        algorithm = dataclasses.replace(algorithm, entropy=True)
    trusted = algorithm.step == 'trust_region'
    read = {
        'clip_low': algorithm.has_bounds,
        'clip_high': algorithm.has_bounds,
        'dual_clip': algorithm.loss == 'clipped',
        'tau_positive': algorithm.loss == 'sapo',
        'tau_negative': algorithm.loss == 'sapo',
        'importance_cap': algorithm.importance != 'none',
        'kl_clamp': algorithm.kl != 'none',
        'reference_decay': algorithm.reads_reference,
        'top_entropy': algorithm.loss not in PAIRWISE,
        'label_smoothing': algorithm.loss == 'dpo',
        'gamma': algorithm.has_critic,
        'lam': algorithm.has_critic,
        'value_clip': algorithm.has_critic,
        'max_kl': trusted,
        'damping': trusted,
    }
    usual = Objective()
    for name, active in read.items():
        value = getattr(objective, name)
        if not active and value != getattr(usual, name):
            raise ValueError(
                f'grpo.objective.{name}={value} does nothing with loss={algorithm.loss!r}, '
                f'importance={algorithm.importance!r}, baseline={algorithm.baseline!r}, '
                f'step={algorithm.step!r} and kl={algorithm.kl!r}: leave it away'
            )
    if objective.top_entropy < 1:
        algorithm = dataclasses.replace(algorithm, entropy_mask=True)
    for name, active in {
        'cg_steps': trusted,
        'backtracks': trusted,
        'entropy_mask': objective.top_entropy < 1,
        'advantage_eps': algorithm.scale != 'none',
    }.items():
        if not active and c.algorithm[name] != getattr(Algorithm, name):
            raise ValueError(
                f'grpo.algorithm.{name}={c.algorithm[name]} does nothing with '
                f'step={algorithm.step!r}, scale={algorithm.scale!r} and '
                f'top_entropy={objective.top_entropy}: leave it away'
            )
    if objective.beta and not algorithm.reads_reference:
        raise ValueError(
            f"grpo.objective.beta={objective.beta} does nothing with kl='none': set it to 0"
        )
    if objective.reference_decay < 1 and config.model.lora.rank:
        raise ValueError(
            f'grpo.objective.reference_decay={objective.reference_decay} with adapters: their '
            'reference is the base, which stays; set it to 1 or train all parameters'
        )
    _check_source(c, algorithm, objective)
    _check_sampler(c, algorithm)
    _check_sections(config, algorithm)
    return Parts(algorithm, objective, Sampling(**c.sampling))


def _check_sections(config: ConfigDict, algorithm: Algorithm) -> None:
    """Refuses what is set in a section that nothing reads."""
    unread = {}
    if not algorithm.has_critic:
        unread['critic'] = f'baseline={algorithm.baseline!r}'
    if not config.reward_model.weight:
        unread['reward_model'] = 'reward_model.weight=0'
    elif not config.reward_model.steps:
        for name in ('loss', 'batch_size', 'group_size', 'microbatch', 'replay', 'optimizer'):
            unread[f'reward_model.{name}'] = 'reward_model.steps=0'
    if algorithm.step == 'trust_region':
        unread['grpo.optimizer'] = "step='trust_region'"
    for path, reason in differing_defaults(config, unread):
        raise ValueError(f'{path} does nothing with {reason}: leave it away')


def _check_source(c: ConfigDict, algorithm: Algorithm, objective: Objective) -> None:
    if c.source not in ('policy', 'reference'):
        raise ValueError(f'grpo.source={c.source!r} is unknown: use policy or reference')
    if c.source == 'reference' and algorithm.loss not in ('nll', *PAIRWISE):
        raise ValueError(
            f"grpo.source='reference' with loss={algorithm.loss!r}, whose ratio is that to the "
            f"policy itself: use loss='nll' or one of {', '.join(PAIRWISE)}"
        )
    if algorithm.loss in PAIRWISE:
        if not objective.beta:
            raise ValueError(f'grpo.objective.beta=0 with loss={algorithm.loss!r}: set it above 0')
        if c.group_size < 2 or c.drop:
            raise ValueError(
                f'loss={algorithm.loss!r} needs pairs: grpo.group_size={c.group_size} has to be '
                f'at least 2, and grpo.drop={tuple(c.drop)} empty'
            )
    for name in c.drop:
        if name not in DROPS:
            known = ', '.join(DROPS)
            raise ValueError(f'grpo.drop names {name!r}, which is unknown: use some of {known}')


def _check_sampler(c: ConfigDict, algorithm: Algorithm) -> None:
    """Refuses samples of a policy that is not quite the one trained, where nothing corrects it."""
    if c.weights not in WEIGHTS:
        raise ValueError(f'grpo.weights={c.weights!r} is unknown: use one of {", ".join(WEIGHTS)}')
    if c.weights != 'model' and algorithm.importance == 'none':
        raise ValueError(
            f"grpo.weights={c.weights!r} with grpo.algorithm.importance='none': what is sampled is "
            "of rounded weights; correct for it by importance='token' or another, or sample with "
            "weights='model'"
        )
    if c.ahead and c.source == 'policy' and algorithm.importance == 'none':
        raise ValueError(
            "grpo.ahead=True with grpo.algorithm.importance='none': what is sampled ahead is of a "
            "policy one update old; correct for it by importance='token' or another"
        )
    if c.ahead and c.refill:
        raise ValueError(
            f'grpo.ahead=True with grpo.refill={c.refill}: a batch is refilled from the policy '
            'that sampled it, which is gone by then; set one of them to 0'
        )
