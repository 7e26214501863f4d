"""Checks of an `Algorithm`: unknown choices, wrong combinations, options without effect.

Each check raises a ValueError whose message begins with the name of the option.
"""

import dataclasses
import numbers
from typing import TYPE_CHECKING

from grpo_jax.algorithm.advantages import check_group_options
from grpo_jax.algorithm.binding import names_of
from grpo_jax.algorithm.logprobs import AGGREGATIONS
from grpo_jax.algorithm.losses import IMPORTANCES, KL_ESTIMATORS, LOSSES, RATIOS

if TYPE_CHECKING:
    from grpo_jax.algorithm.config import Algorithm


def check_choices(algorithm: 'Algorithm') -> None:
    """Rejects unknown choices."""
    a = algorithm
    check_group_options(2, baseline=a.baseline, scale=a.scale)
    for name, known in (
        ('loss', tuple(LOSSES)),
        ('ratio', RATIOS),
        ('importance', IMPORTANCES),
        ('supervision', ('outcome', 'process')),
        ('aggregation', AGGREGATIONS),
        ('kl', (*KL_ESTIMATORS, 'none')),
        ('kl_place', ('loss', 'reward')),
        ('step', ('optimizer', 'trust_region')),
    ):
        value = getattr(a, name)
        if value not in known and not (name == 'loss' and callable(value)):
            raise ValueError(f'{name}={value!r} is unknown: use one of {", ".join(known)}')
    for name in ('inner_updates', 'cg_steps', 'backtracks'):
        if getattr(a, name) < 1:
            raise ValueError(f'{name}={getattr(a, name)} is out of range: make it at least 1')


def check_combinations(algorithm: 'Algorithm') -> None:
    """Rejects combinations that would compute the wrong thing."""
    a = algorithm
    if a.kl == 'k1' and a.kl_place == 'loss':
        raise ValueError(
            "kl='k1' with kl_place='loss' has an expected on-policy gradient of zero: "
            "use kl='k2' or 'k3', or kl_place='reward'"
        )
    process = a.supervision == 'process'
    in_reward = a.kl != 'none' and a.kl_place == 'reward'
    if in_reward and process and not a.has_critic:
        raise ValueError(
            "kl_place='reward' with supervision='process' would need a KL for each step: "
            "use kl_place='loss', or baseline='critic', whose rewards are per token"
        )
    if process and a.baseline == 'leave_one_out':
        raise ValueError(
            "baseline='leave_one_out' with supervision='process' is not defined: use 'mean', "
            "'none' or 'critic'"
        )
    if a.pairwise:
        _check_pairs(a)
    if a.step == 'trust_region' and (a.loss != 'surrogate' or a.inner_updates > 1):
        raise ValueError(
            f"step='trust_region' with loss={a.loss!r}, inner_updates={a.inner_updates}: its line "
            "search replaces the clip; use loss='surrogate' and inner_updates=1"
        )
    if a.advantage_estimator is not None:
        for name, value in (('baseline', 'mean'), ('scale', 'std'), ('supervision', 'outcome')):
            if getattr(a, name) != value:
                raise ValueError(
                    f'{name}={getattr(a, name)!r} has no effect with an '
                    'advantage_estimator: remove one of them'
                )


def _check_pairs(algorithm: 'Algorithm') -> None:
    """A preference loss uses only the order of its two rewards, so other options must be off."""
    a = algorithm
    for name, value in (
        ('ratio', 'token'),
        ('importance', 'none'),
        ('supervision', 'outcome'),
        ('baseline', 'mean'),
        ('scale', 'none'),
        ('aggregation', 'sequence_mean'),
        ('kl', 'none'),
    ):
        if getattr(a, name) != value:
            raise ValueError(
                f'{name}={getattr(a, name)!r} with loss={a.loss!r}: preference losses '
                f'compare whole completions; use {name}={value!r}'
            )
    if 'top_entropy' in (a.terms or ()):
        raise ValueError(
            f'top_entropy={a.top_entropy} has no effect with loss={a.loss!r}: remove it'
        )
    if 'beta' not in (a.terms or ()):
        raise ValueError(f'beta=0 with loss={a.loss!r}: set it above 0')


def check_effects(algorithm: 'Algorithm') -> None:
    """Rejects coefficients and choices that are set but that nothing uses."""
    a = algorithm
    defaults = {field.name: field.default for field in dataclasses.fields(a)}
    used = names_of(a.loss_function) | {'entropy_bonus', 'top_entropy'}
    reasons = dict.fromkeys(a.coefficients, f'loss={a.name_of_loss!r}')
    for names, active, reason in (
        (('importance_cap',), a.importance != 'none', "importance='none'"),
        (('gamma', 'lam', 'value_clip'), a.has_critic, f'baseline={a.baseline!r}'),
        (('max_kl', 'damping'), a.step == 'trust_region', f'step={a.step!r}'),
        (('cg_steps', 'backtracks'), a.step == 'trust_region', f'step={a.step!r}'),
        (('advantage_eps',), a.has_std, f'scale={a.scale!r}'),
        (('beta',), a.kl != 'none', "kl='none'"),
        (('kl_clamp',), a.has_kl, f'beta={a.beta}, kl={a.kl!r}'),
        (('reference_decay',), a.uses_reference, f'beta={a.beta}, kl={a.kl!r}'),
    ):
        used |= set(names) if active else set()
        reasons |= dict.fromkeys(names, reason)
    if a.kl == 'none' and a.kl_place != 'loss':
        raise ValueError(f"kl_place={a.kl_place!r} has no effect with kl='none': remove it")
    if a.loss == 'nll' and a.ratio != 'token':
        raise ValueError(f"ratio={a.ratio!r} has no effect with loss='nll': remove it")
    for name in (*a.coefficients, 'cg_steps', 'backtracks'):
        value = getattr(a, name)
        if name not in used and not (isinstance(value, numbers.Real) and value == defaults[name]):
            raise ValueError(f'{name}={value} has no effect with {reasons[name]}: remove it')
