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
    'dual clip': {'dual_clip': 3.0},
    'truncated importance': {'importance': 'token', 'importance_cap': 1.1},
    'truncated, sequence': {'importance': 'sequence', 'importance_cap': 1.2},
    'masked importance': {'importance': 'token_mask', 'importance_cap': 1.1},
    'masked, sequence': {'importance': 'sequence_mask', 'importance_cap': 1.5},
    'KL clamp': {'kl_clamp': 0.05},
    'population std': {'scale': 'population_std'},
    'nll': {'loss': 'nll', 'baseline': 'none', 'scale': 'none'},
    'TRPO': {'loss': 'surrogate', 'kl': 'none'},
    'PPO': {'baseline': 'critic', 'scale': 'batch', 'kl': 'none', 'gamma': 0.99, 'lam': 0.95},
    'process': {'supervision': 'process'},
    'process, population std': {'supervision': 'process', 'scale': 'population_std'},
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
        batch = Batch(rollout, advantages, weights, ref, jnp.asarray(case['old']))
        axes = Batch(Rollout(None, None, 0, 0, None), 0, 0, None if ref is None else 0, 0)
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
    }[aggregation]


def row_loss(x, case, at, advantage, options, o):
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
        elif loss == 'sapo':
            tau = o.tau_positive if a > 0 else o.tau_negative
            value = -a * 4 / tau / (1 + np.exp(-tau * (ratio - 1)))
        else:
            value = max((-ratio * a, -inside * a), key=lambda z: z.real)
            if o.dual_clip and a < 0 and value.real > o.dual_clip * abs(a):
                value = complex(o.dual_clip * abs(a))
        if kind.endswith('mask'):
            value *= (
                importance[t] if 1 / o.importance_cap <= importance[t] <= o.importance_cap else 0
            )
        elif kind != 'none':
            value *= min(importance[t], o.importance_cap)
        kl = options.get('kl', 'k3')
        if kl != 'none':
            d = ref[t] - x[t]
            term = {'k2': d * d / 2, 'k3': np.exp(d) - d - 1}[kl]
            if o.kl_clamp and abs(term.real) > o.kl_clamp:
                term = complex(np.sign(term.real) * o.kl_clamp)
            value += o.beta * term
        out.append(value)
    return out


def expected(case, options, o):
    advantage = expected_advantages(case, options, o)
    total, gradient = 0.0, np.zeros(SIZE)
    for at in itertools.product(range(SIZE[0]), range(SIZE[1])):
        weight = expected_weight(case['mask'], *at, options.get('aggregation', 'sequence_mean'))
        value, gradient[at] = oracle.complex_step(
            lambda x, at=at, weight=weight: (
                weight * sum(row_loss(x, case, at, advantage, options, o))
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
