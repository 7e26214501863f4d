"""Every variant's losses, weights and gradients against float64 NumPy, on generated batches.

The oracle adds up one token after another in complex numbers: the derivative by a log-prob is the
imaginary part of the loss at that log-prob + ih, exact to rounding, and what is not differentiated
is taken from the real parts.
"""

import functools
import itertools

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from grpo_jax import losses
from grpo_jax.advantages import group_advantages, normalize_batch
from grpo_jax.losses import Objective
from grpo_jax.score import token_weights
from grpo_jax.types import Batch, Prompts, Rollout

H = 1e-30

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
}
SCALARS = Objective._fields
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
    return {
        'logprobs': logprobs,
        'old': old,
        'sampled': old + 0.1 * rng.standard_normal(SIZE),
        'ref': old + 0.3 * rng.standard_normal(SIZE),
        'mask': np.arange(SIZE[2]) < used[..., None],
        'rewards': rewards,
    }


@functools.cache
def program(name):
    """(case, objective) -> loss and gradient by the package's functions, compiled once."""
    return jax.jit(functools.partial(ours, VARIANTS[name]))


def ours(options, case, objective):
    chosen = {'baseline': 'mean', 'scale': 'std', 'aggregation': 'sequence_mean', 'kl': 'k3'}
    chosen |= {name: value for name, value in options.items() if name not in SCALARS}
    baseline, scale, aggregation = (chosen.pop(n) for n in ('baseline', 'scale', 'aggregation'))
    mask = jnp.asarray(case['mask'])

    def loss(logprobs):
        advantages = jax.vmap(
            lambda r: group_advantages(r, baseline=baseline, scale=scale, eps=1e-4)
        )(jnp.asarray(case['rewards']))
        advantages = jnp.broadcast_to(advantages[..., None], mask.shape)
        if scale == 'batch':
            advantages = normalize_batch(advantages, mask, eps=1e-4)
        weights = token_weights(mask, aggregation=aggregation, microbatch=2)
        rollout = Rollout(Prompts(None, None, None), None, mask, jnp.asarray(case['sampled']), None)
        ref = None if chosen['kl'] == 'none' else jnp.asarray(case['ref'])
        batch = Batch(rollout, advantages, weights, ref, jnp.asarray(case['old']))
        axes = Batch(Rollout(None, None, 0, 0, None), 0, 0, None if ref is None else 0, 0)
        values, _ = jax.vmap(
            lambda x, group: losses.per_token(x, group, objective, **chosen), in_axes=(0, axes)
        )(logprobs, batch)
        return jnp.where(mask, weights * values, 0).sum()

    return jax.value_and_grad(loss)(jnp.asarray(case['logprobs']))


def expected_advantages(case, baseline, scale):
    """Token by token, from the definitions."""
    groups, size, _ = SIZE
    table = np.zeros(SIZE)
    for b, g in itertools.product(range(groups), range(size)):
        row = case['rewards'][b]
        others = np.delete(row, g)
        value = row[g] - {'mean': row.mean(), 'leave_one_out': others.mean(), 'none': 0}[baseline]
        if scale in ('std', 'population_std'):
            value /= row.std(ddof=1 if scale == 'std' else 0) + 1e-4
        if row.max() == row.min() and (baseline, scale) not in (
            ('none', 'none'),
            ('none', 'batch'),
        ):
            value = 0.0
        table[b, g] = value
    if scale == 'batch':
        used = table[case['mask']]
        same = used.max() == used.min()
        table = np.zeros(SIZE) if same else (table - used.mean()) / (used.std() + 1e-4)
    return table


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
    advantage = expected_advantages(
        case, options.get('baseline', 'mean'), options.get('scale', 'std')
    )
    total, gradient = 0.0, np.zeros(SIZE)
    for at in itertools.product(range(SIZE[0]), range(SIZE[1])):
        weight = expected_weight(case['mask'], *at, options.get('aggregation', 'sequence_mean'))
        start = case['logprobs'][at].astype(complex)
        total += weight * sum(z.real for z in row_loss(start, case, at, advantage, options, o))
        for t in np.flatnonzero(case['mask'][at]):
            moved = start.copy()
            moved[t] += 1j * H
            slope = sum(z.imag for z in row_loss(moved, case, at, advantage, options, o)) / H
            gradient[at][t] = weight * slope
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
    objective = Objective(beta=0.1)._replace(**{k: v for k, v in options.items() if k in SCALARS})
    rest = {k: v for k, v in options.items() if k not in SCALARS}
    batch = case(seed)
    with jax.enable_x64(True):
        value, gradient = program(name)(batch, objective)
        value, gradient = float(value), np.asarray(gradient)
    want, want_gradient = expected(batch, rest, objective)
    scale = max(np.abs(want_gradient).max(), 1e-12)
    assert value == pytest.approx(want, rel=1e-6, abs=1e-9)
    np.testing.assert_allclose(gradient / scale, want_gradient / scale, atol=1e-6)
    assert (gradient[~batch['mask']] == 0).all()
