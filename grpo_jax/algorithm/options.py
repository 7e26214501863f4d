"""Checks of an `Algorithm`: unknown choices, wrong combinations, options without effect.

Each check raises a ValueError whose message begins with the name of the option.
"""

import dataclasses
import numbers
from typing import TYPE_CHECKING

from grpo_jax.algorithm.advantages import check_group_options
from grpo_jax.algorithm.binding import names_of
from grpo_jax.algorithm.covariance import COVARIANCES
from grpo_jax.algorithm.estimators import ESTIMATORS, REWARD_AGGREGATIONS
from grpo_jax.algorithm.logprobs import AGGREGATIONS
from grpo_jax.algorithm.losses import KL_ESTIMATORS, LOSSES
from grpo_jax.algorithm.off_policy import IMPORTANCES, RATIOS

if TYPE_CHECKING:
    from grpo_jax.algorithm.config import Algorithm


_OPEN = ('loss', 'advantage_estimator')  # which may be functions of your own
# Losses whose gradient is the same for any `ratio`: they have none, or one of their own.
_WITHOUT_RATIO = ('nll', 'vespo', 'gmpo')


def check_choices(algorithm: 'Algorithm') -> None:
    """Rejects unknown choices."""
    a = algorithm
    check_group_options(2, baseline=a.baseline, scale=a.scale)
    for name, known in (
        ('loss', tuple(LOSSES)),
        ('ratio', RATIOS),
        ('importance', IMPORTANCES),
        ('supervision', ('outcome', 'process')),
        ('advantage_estimator', (*ESTIMATORS, None)),
        ('reward_aggregation', REWARD_AGGREGATIONS),
        ('aggregation', AGGREGATIONS),
        ('kl', (*KL_ESTIMATORS, 'none')),
        ('kl_place', ('loss', 'reward')),
        ('covariance', COVARIANCES),
        ('step', ('optimizer', 'trust_region')),
    ):
        value = getattr(a, name)
        if value not in known and not (name in _OPEN and callable(value)):
            raise ValueError(
                f'{name}={value!r} is unknown: use one of {", ".join(map(str, known))}'
            )
    for name in ('inner_updates', 'cg_steps', 'backtracks', 'pass_k'):
        if getattr(a, name) < 1:
            raise ValueError(f'{name}={getattr(a, name)} is out of range: make it at least 1')


def check_combinations(algorithm: 'Algorithm') -> None:
    """Rejects combinations that would compute the wrong thing."""
    a = algorithm
    if a.kl == 'k1' and a.kl_place == 'loss' and not a.unbiased_kl:
        raise ValueError(
            "kl='k1' with kl_place='loss' has an expected on-policy gradient of zero: "
            "use kl='k2' or 'k3', or kl_place='reward', or unbiased_kl=True"
        )
    if a.unbiased_kl and a.kl == 'k2':
        raise ValueError(
            "unbiased_kl=True with kl='k2', whose gradient is that of the reverse KL without the "
            "ratio and another one with it: use kl='k3' or 'k1', or unbiased_kl=False"
        )
    process = a.supervision == 'process'
    in_reward = a.kl != 'none' and a.kl_place == 'reward'
    if in_reward and process and not a.has_critic:
        raise ValueError(
            "kl_place='reward' with supervision='process' would need a KL for each step: "
            "use kl_place='loss', or baseline='critic', whose rewards are per token"
        )
    if process and a.baseline in ('leave_one_out', 'greedy'):
        raise ValueError(
            f"baseline={a.baseline!r} with supervision='process' is not defined: use 'mean', "
            "'none' or 'critic'"
        )
    if a.baseline == 'greedy' and a.reward_aggregation != 'sum_then_normalize':
        raise ValueError(
            f"reward_aggregation={a.reward_aggregation!r} with baseline='greedy', which is the sum "
            "of the functions' rewards: use 'sum_then_normalize', or another baseline"
        )
    if a.loss == 'vespo' and a.importance.startswith('sequence'):
        raise ValueError(
            f"importance={a.importance!r} with loss='vespo', which multiplies the weights of a "
            "completion's tokens: use 'none', 'token', 'token_mask' or 'token_upper_mask'"
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
        ('covariance', 'none'),
        ('reward_aggregation', 'sum_then_normalize'),
    ):
        if getattr(a, name) != value:
            raise ValueError(
                f'{name}={getattr(a, name)!r} with loss={a.loss!r}: preference losses '
                f'compare whole completions; use {name}={value!r}'
            )
    for name in ('top_entropy', 'off_policy_threshold'):
        if name in (a.terms or ()):
            value = getattr(a, name)
            raise ValueError(f'{name}={value} has no effect with loss={a.loss!r}: remove it')
    if 'beta' not in (a.terms or ()):
        raise ValueError(f'beta=0 with loss={a.loss!r}: set it above 0')


def check_effects(algorithm: 'Algorithm') -> None:
    """Rejects coefficients and choices that are set but that nothing uses."""
    a = algorithm
    defaults = {field.name: field.default for field in dataclasses.fields(a)}
    used = names_of(a.loss_function) | a.estimator_arguments
    used |= {'entropy_bonus', 'top_entropy', 'off_policy_threshold'}
    reasons = dict.fromkeys(a.coefficients, f'loss={a.name_of_loss!r}')
    for names, active, reason in (
        (('router_balance',), a.step == 'optimizer', f'step={a.step!r}'),
        (('importance_cap',), a.importance != 'none', "importance='none'"),
        (('cov_share',), a.covariance != 'none', "covariance='none'"),
        (('cov_low', 'cov_high'), a.covariance == 'clip', f'covariance={a.covariance!r}'),
        (('cov_kl',), a.covariance == 'kl', f'covariance={a.covariance!r}'),
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
    _check_effects_of_choices(a)
    reasons['pass_k'] = f'advantage_estimator={a.advantage_estimator!r}'
    for name in (*a.coefficients, 'cg_steps', 'backtracks', 'pass_k'):
        value = getattr(a, name)
        if name not in used and not (isinstance(value, numbers.Real) and value == defaults[name]):
            raise ValueError(f'{name}={value} has no effect with {reasons[name]}: remove it')


def _check_effects_of_choices(algorithm: 'Algorithm') -> None:
    """Rejects choices that are set and that nothing uses."""
    a = algorithm
    without_kl = "kl='none'" if a.kl == 'none' else f'beta={a.beta}'
    in_reward = f'kl_place={a.kl_place!r}'
    for name, unset, active, reason in (
        ('kl', ('k3', 'none'), a.has_kl, without_kl),
        ('kl_place', ('loss',), a.has_kl, without_kl),
        ('unbiased_kl', (False,), a.has_kl, without_kl),
        ('unbiased_kl', (False,), a.kl_place == 'loss', in_reward),
        ('ratio', ('token',), a.loss not in _WITHOUT_RATIO, f'loss={a.loss!r}'),
        (
            'reward_aggregation',
            ('sum_then_normalize',),
            a.supervision == 'outcome' and not a.has_critic,
            f'supervision={a.supervision!r}, baseline={a.baseline!r}',
        ),
        # In the only update the policy is the old one, where the KL has no gradient.
        ('covariance', ('none', 'clip'), a.inner_updates > 1, 'inner_updates=1'),
    ):
        value = getattr(a, name)
        if not active and value not in unset:
            raise ValueError(f'{name}={value!r} has no effect with {reason}: remove it')
