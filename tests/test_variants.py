"""Every variant's losses, weights and gradients against float64 NumPy, on generated batches.

The oracle adds up one token after another in complex numbers, see `oracle.complex_step`.
"""

import functools
import itertools

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest

from grpo_jax.algorithm import losses
from grpo_jax.algorithm.advantages import group_advantages, normalize_batch, process_advantages
from grpo_jax.algorithm.config import COEFFICIENTS, Algorithm
from grpo_jax.algorithm.covariance import choose_tokens
from grpo_jax.algorithm.critic import gae
from grpo_jax.algorithm.logprobs import token_weights
from grpo_jax.types import Batch, Prompts, Rollout

VARIANTS = {
    'GRPO': {},
    'GRPO, k2': {'kl': 'k2'},
    'Dr. GRPO': {'scale': 'none', 'aggregation': 'constant', 'kl': 'none'},
    'DAPO': {'aggregation': 'token_mean', 'clip_high': 0.28, 'kl': 'none'},
    'BNPO': {'aggregation': 'microbatch_token_mean'},
    'RLOO': {'baseline': 'leave_one_out', 'scale': 'none'},
    'REINFORCE++': {'baseline': 'none', 'scale': 'batch'},
    'GSPO': {'ratio': 'sequence', 'clip_low': 3e-4, 'clip_high': 4e-4},
    'GSPO, token': {'ratio': 'sequence_token', 'clip_low': 3e-4, 'clip_high': 4e-4},
    'CISPO': {'loss': 'cispo', 'clip_low': 1.0, 'clip_high': 2.0},
    'SAPO': {'loss': 'sapo'},
    'LUSPO': {'ratio': 'sequence', 'aggregation': 'sequence_sum', 'clip_low': 2e-3},
    'VESPO': {'loss': 'vespo', 'aggregation': 'token_mean'},
    'VESPO, truncated': {'loss': 'vespo', 'importance': 'token', 'importance_cap': 1.1},
    'VESPO, masked': {'loss': 'vespo', 'importance': 'token_upper_mask', 'importance_cap': 1.2},
    'GMPO': {'loss': 'gmpo', 'clip_low': 0.05, 'clip_high': 0.1},
    'unbiased KL': {'unbiased_kl': True},
    'unbiased KL, k1': {'unbiased_kl': True, 'kl': 'k1'},
    'unbiased KL, GSPO': {'unbiased_kl': True, 'ratio': 'sequence', 'kl_clamp': 0.05},
    'unbiased KL, GSPO, token': {'unbiased_kl': True, 'ratio': 'sequence_token'},
    'off-policy mask': {'off_policy_threshold': 0.05},
    'off-policy mask, CISPO': {
        'off_policy_threshold': 0.05,
        'loss': 'cispo',
        'importance': 'token',
    },
    'Clip-Cov': {'covariance': 'clip', 'cov_share': 1.0, 'cov_low': 0.05, 'cov_high': 0.5},
    'KL-Cov': {'covariance': 'kl', 'cov_share': 0.3, 'loss': 'surrogate', 'inner_updates': 2},
    'KL-Cov, truncated': {
        'covariance': 'kl',
        'cov_share': 0.1,
        'inner_updates': 2,
        'importance': 'token',
    },
    'dual clip': {'dual_clip': 3.0},
    'truncated importance': {'importance': 'token', 'importance_cap': 1.1},
    'truncated, sequence': {'importance': 'sequence', 'importance_cap': 1.2},
    'masked importance': {'importance': 'token_mask', 'importance_cap': 1.1},
    'masked, sequence': {'importance': 'sequence_mask', 'importance_cap': 1.5},
    'masked above': {'importance': 'token_upper_mask', 'importance_cap': 1.1},
    'masked above, sequence': {'importance': 'sequence_upper_mask', 'importance_cap': 1.2},
    'KL clamp': {'kl_clamp': 0.05},
    'population std': {'scale': 'population_std'},
    'nll': {'loss': 'nll', 'baseline': 'none', 'scale': 'none'},
    'TRPO': {'loss': 'surrogate', 'kl': 'none'},
    'PPO': {'baseline': 'critic', 'scale': 'batch', 'kl': 'none', 'gamma': 0.99, 'lam': 0.95},
    'process': {'supervision': 'process'},
    'process, population std': {'supervision': 'process', 'scale': 'population_std'},
    'process, off-policy mask': {'supervision': 'process', 'off_policy_threshold': 0.05},
    'process, no std': {'supervision': 'process', 'scale': 'none'},
    'process, REINFORCE++': {'supervision': 'process', 'baseline': 'none', 'scale': 'batch'},
}
SIZE = (4, 3, 5)  # B, G, T


def case(seed):
    """Arrays [B, G, T] with ratios on both sides of every bound, ragged masks, both signs."""
    rng = np.random.default_rng(seed)
    old = rng.uniform(-4, -0.2, SIZE)
    spread = rng.choice([1e-4, 0.05, 0.3, 1.0])
    logprobs = old + spread * rng.standard_normal(SIZE)
    used = rng.integers(1, SIZE[2] + 1, SIZE[:2])
    used[0, 0] = SIZE[2]
    rewards = rng.choice([0.0, 1.0], SIZE[:2]) if seed % 2 else rng.uniform(-1, 2, SIZE[:2])
    mask = np.arange(SIZE[2]) < used[..., None]
    ends = mask & (rng.random(SIZE) < rng.choice([0.1, 0.5]))  # groups with no step, or one
    steps = rng.uniform(-1, 2, SIZE)
    steps[0] = 0.7  # whose mean rounds
    return {
        'logprobs': logprobs,
        'old': old,
        'sampled': old + 0.1 * rng.standard_normal(SIZE),
        'ref': old + 0.3 * rng.standard_normal(SIZE),
        'mask': mask,
        'rewards': rewards,
        'ends': ends,
        'steps': np.where(ends, steps, np.nan),
        'values': np.where(mask, rng.standard_normal(SIZE), np.nan),
    }


@functools.cache
def program(name):
    """(case, algorithm) -> loss and gradient by the package's functions, compiled once."""
    return jax.jit(ours)


def ours(case, algorithm):
    a = algorithm
    baseline, scale = a.baseline, a.scale
    mask = jnp.asarray(case['mask'])

    def group_of(rewards, steps, ends, values, mask):
        if baseline == 'critic':
            rewards = jnp.where(ends, steps, 0)
            return gae(rewards, values, mask, gamma=a.gamma, lam=a.lam)
        if a.supervision == 'process':
            return process_advantages(steps, ends, baseline=baseline, scale=scale, eps=1e-4)
        rewards = group_advantages(rewards, baseline=baseline, scale=scale, eps=1e-4)
        return jnp.broadcast_to(rewards[:, None], mask.shape)

    def loss(logprobs):
        names = ('rewards', 'steps', 'ends', 'values', 'mask')
        advantages = jax.vmap(group_of)(*(jnp.asarray(case[name]) for name in names))
        if scale == 'batch':
            advantages = normalize_batch(advantages, mask, eps=1e-4)
        weights = token_weights(mask, aggregation=a.aggregation, microbatch=2)
        rollout = Rollout(Prompts(None, None, None), None, mask, jnp.asarray(case['sampled']), None)
        ref = None if a.kl == 'none' else jnp.asarray(case['ref'])
        old, chosen = jnp.asarray(case['old']), None
        if a.covariance != 'none':
            chosen = choose_tokens(a, old, advantages, mask, jnp.int32(0))
        batch = Batch(rollout, advantages, weights, ref, old, high_covariance=chosen)
        axes = Batch(Rollout(None, None, 0, 0, None), 0, 0, None if ref is None else 0, 0)
        axes = axes._replace(high_covariance=None if chosen is None else 0)
        values, _ = jax.vmap(lambda x, group: losses.policy_loss(a, x, group), in_axes=(0, axes))(
            logprobs, batch
        )
        return jnp.where(mask, weights * values, 0).sum()

    return jax.value_and_grad(loss)(jnp.asarray(case['logprobs']))


def expected_advantages(case, options, o):
    """Token by token, from the definitions."""
    baseline, scale = options.get('baseline', 'mean'), options.get('scale', 'std')
    table = np.zeros(SIZE)
    for b in range(SIZE[0]):
        steps, ends = case['steps'][b], case['ends'][b]
        if baseline == 'critic':
            rewards = np.where(ends, steps, 0)
            table[b] = oracle.gae(rewards, case['values'][b], case['mask'][b], o.gamma, o.lam)
        elif options.get('supervision') == 'process':
            table[b] = oracle.process_advantages(steps, ends, baseline, scale)
        else:
            table[b] = outcome_advantages(case['rewards'][b], baseline, scale)[:, None]
    if scale == 'batch':
        used = table[case['mask']]
        same = used.max() == used.min()
        table = np.zeros(SIZE) if same else (table - used.mean()) / (used.std() + 1e-4)
    return table


def outcome_advantages(rewards, baseline, scale):
    own = (baseline, scale) not in (('none', 'none'), ('none', 'batch'))
    if own and rewards.max() == rewards.min():
        return np.zeros(len(rewards))
    return np.array(oracle.advantages(rewards, baseline, scale))


def expected_weight(mask, b, g, aggregation):
    groups, size, length = mask.shape
    if aggregation == 'microbatch_token_mean':  # two groups at a time, every second one
        pair = mask[b % 2 :: 2]
        return 1 / (groups / 2 * pair.sum())
    return {
        'sequence_mean': 1 / (groups * size * mask[b, g].sum()),
        'token_mean': 1 / mask.sum(),
        'constant': 1 / (groups * size * length),
        'sequence_sum': 1 / (groups * size),
    }[aggregation]


def chosen_tokens(case, advantage, options, o):
    """Positions of high covariance, one after another from the highest."""
    places = [tuple(place) for place in np.argwhere(case['mask'])]
    mean, mean_advantage = (np.mean([x[at] for at in places]) for x in (case['old'], advantage))
    cov = {at: (case['old'][at] - mean) * (advantage[at] - mean_advantage) for at in places}
    if options.get('covariance') == 'clip':  # a share of 1: all within the bounds
        return {at for at in places if o.cov_low < cov[at] < o.cov_high}
    if options.get('covariance') == 'kl':
        count = max(1, int(o.cov_share * len(places)))
        return set(sorted(places, key=lambda at: -cov[at])[:count])
    return set()


def gamma_weight(log_ratio, importance, a, o):
    """VESPO's phi of a completion."""
    w = np.exp(log_ratio.real.sum()) * importance.prod()
    positive = o.vespo_k_positive, o.vespo_lambda_positive
    k, decay = positive if a >= 0 else (o.vespo_k_negative, o.vespo_lambda_negative)
    return w**k * np.exp(decay * (1 - w))


def geometric_mean(log_ratio, advantages, o):
    """GMPO's ratio of a completion, each factor clipped where its advantage pushes it to."""
    clipped = [
        (x if x.real < o.clip_high else o.clip_high)
        if a > 0
        else (x if x.real > -o.clip_low else -o.clip_low)
        for x, a in zip(log_ratio, advantages, strict=True)
    ]
    return np.exp(np.mean(clipped))


def bounded_importance(importance, kind, cap):
    """One token's weight."""
    if kind == 'none':
        return 1.0
    if not kind.endswith('mask'):
        return min(importance, cap)
    low = 0 if 'upper' in kind else 1 / cap
    return importance if low <= importance <= cap else 0.0


def row_loss(x, case, at, advantage, options, o, chosen):
    """Unweighted losses of one completion's tokens; x complex, the rest as it is."""
    mask = case['mask'][at]
    old, sampled, ref = (case[name][at][mask] for name in ('old', 'sampled', 'ref'))
    x = x[mask]
    log_ratio = x - old
    level = options.get('ratio', 'token')
    if level == 'sequence':
        log_ratio = np.full(x.shape, log_ratio.mean())
    elif level == 'sequence_token':
        log_ratio = log_ratio.real.mean() + x - x.real
    importance = np.exp(old - sampled)
    kind = options.get('importance', 'none')
    if kind.startswith('sequence'):
        importance = np.full(len(x), importance.prod())
    importance = np.array([bounded_importance(w, kind, o.importance_cap) for w in importance])
    far = o.off_policy_threshold and (sampled - x.real).mean() > o.off_policy_threshold
    out = []
    for t, ratio in enumerate(np.exp(log_ratio)):
        a, low, high = advantage[at][t], 1 - o.clip_low, 1 + o.clip_high
        inside = ratio if low < ratio.real < high else complex(np.clip(ratio.real, low, high))
        loss = options.get('loss', 'clipped')
        if loss == 'nll':
            value = -a * x[t]
        elif loss == 'surrogate':
            value = -a * ratio
        elif loss == 'cispo':
            value = -inside.real * a * x[t]
        elif loss == 'vespo':
            value = -gamma_weight(x - old, np.maximum(importance, 1e-8), a, o) * a * x[t]
        elif loss == 'gmpo':
            value = -a * geometric_mean(log_ratio, advantage[at][mask], o)
        elif loss == 'sapo':
            tau = o.tau_positive if a > 0 else o.tau_negative
            value = -a * 4 / tau / (1 + np.exp(-tau * (ratio - 1)))
        else:
            value = max((-ratio * a, -inside * a), key=lambda z: z.real)
            if o.dual_clip and a < 0 and value.real > o.dual_clip * abs(a):
                value = complex(o.dual_clip * abs(a))
        if (*at, t) in chosen and options['covariance'] == 'clip':
            value = 0
        elif (*at, t) in chosen and abs(x[t] - old[t]) > 1e-5:  # what is less is rounding
            value += o.cov_kl * np.sign((x[t] - old[t]).real) * (x[t] - old[t])
        if loss != 'vespo':
            value *= importance[t]
        if far and a < 0:
            value = 0
        kl = options.get('kl', 'k3')
        if kl != 'none':
            d = ref[t] - x[t]
            term = {'k1': -d, 'k2': d * d / 2, 'k3': np.exp(d) - d - 1}[kl]
            if o.kl_clamp and abs(term.real) > o.kl_clamp:
                term = complex(np.sign(term.real) * o.kl_clamp)
            value += o.beta * term * (ratio if options.get('unbiased_kl') else 1)
        out.append(value)
    return out


def expected(case, options, o):
    advantage = expected_advantages(case, options, o)
    total, gradient = 0.0, np.zeros(SIZE)
    chosen = chosen_tokens(case, advantage, options, o)
    for at in itertools.product(range(SIZE[0]), range(SIZE[1])):
        weight = expected_weight(case['mask'], *at, options.get('aggregation', 'sequence_mean'))
        value, gradient[at] = oracle.complex_step(
            lambda x, at=at, weight=weight: (
                weight * sum(row_loss(x, case, at, advantage, options, o, chosen))
            ),
            case['logprobs'][at],
            case['mask'][at],
        )
        total += value
    return total, gradient


@pytest.mark.parametrize('name', VARIANTS)
def test_loss_and_gradient(name):
    for seed in range(30):
        check(name, seed)


@pytest.mark.slow
@pytest.mark.parametrize('name', VARIANTS)
@hypothesis.settings(max_examples=300, deadline=None)
@hypothesis.given(seed=st.integers(0, 10**6))
def test_loss_and_gradient_of_many_batches(name, seed):
    check(name, seed)


def check(name, seed):
    options = VARIANTS[name]
    beta = 0.0 if options.get('kl') == 'none' else 0.1
    algorithm = Algorithm(**{'beta': beta} | options)
    rest = {k: v for k, v in options.items() if k not in COEFFICIENTS}
    batch = case(seed)
    with jax.enable_x64(True):
        value, gradient = program(name)(batch, algorithm)
        value, gradient = float(value), np.asarray(gradient)
    oracle.assert_same((value, gradient), expected(batch, rest, algorithm))
    assert (gradient[~batch['mask']] == 0).all()
