"""The same mathematics from the papers, slow and simple, without any code of the package.

The transformer keeps no cache and shares nothing: a completion is read together with its prompt, as
one sequence. It takes its array library as an argument, NumPy for float64 values and jax.numpy for
gradients.
The rest is Python loops over scalars.
"""

import itertools
import math
import statistics

import jax
import jax.numpy as jnp
import numpy as np

# The model


def hidden_states(params, tokens, config, xp=np):
    """[N, S, D] from tokens [N, S]: RMSNorm, rotary grouped-query attention, gated MLP."""
    x = params['embedding'][tokens]
    for layer in range(config.layers):
        block = _layer(params['blocks'], layer)
        x = x + _attention(_norm(x, block['attention_norm'], config, xp), block, config, xp)
        y = _norm(x, block['mlp_norm'], config, xp)
        gate = y @ block['gate']
        x = x + (gate / (1 + xp.exp(-gate)) * (y @ block['up'])) @ block['down']
    return _norm(x, params['final_norm'], config, xp)


def logits(params, hidden):
    return hidden @ (params['head'] if 'head' in params else params['embedding'].T)


def _layer(blocks, layer):
    return {
        name: _layer(value, layer) if isinstance(value, dict) else value[layer]
        for name, value in blocks.items()
    }


def _norm(x, norm, config, xp):
    return norm['scale'] * x / xp.sqrt((x * x).mean(-1)[..., None] + config.norm_eps)


def _attention(x, block, config, xp):
    heads = {}
    for name in ('query', 'key', 'value'):
        y = xp.einsum('nsd,dhw->nshw', x, block[name])
        if config.attention_bias:
            y = y + block[f'{name}_bias']
        if config.qk_norm and name != 'value':
            y = _norm(y, block[f'{name}_norm'], config, xp)
        if name != 'value':
            y = _rotate(y, config.rope_theta, xp)
        heads[name] = xp.repeat(y, config.heads // y.shape[2], axis=2)
    scores = xp.einsum('nqhw,nkhw->nhqk', heads['query'], heads['key']) / math.sqrt(config.head_dim)
    visible = np.tril(np.ones((x.shape[1], x.shape[1]), bool))
    scores = xp.where(visible, scores, -np.inf)
    weights = xp.exp(scores - scores.max(-1)[..., None])
    weights = weights / weights.sum(-1)[..., None]
    return xp.einsum('nhqk,nkhw,hwd->nqd', weights, heads['value'], block['out'])


def _rotate(x, theta, xp):
    """Turns component pairs (i, i + h/2) as complex numbers by position times theta^(-2i/h)."""
    half = x.shape[-1] // 2
    angle = np.arange(x.shape[1])[:, None] * theta ** (-np.arange(half) / half)
    turn = np.exp(1j * angle)[:, None, :].astype(np.result_type(x.dtype, np.complex64))
    turned = (x[..., :half] + 1j * x[..., half:]) * turn
    return xp.concatenate([turned.real, turned.imag], axis=-1)


def float64(params):
    return jax.tree.map(lambda x: np.asarray(x, np.float64), params)


def sequences(rollout):
    """A prompt's real tokens and one completion, no gap between: [B * G, P + T], padded at the end.

    Also the positions [B * G, T] whose states predict the completion's tokens.
    """
    groups, group_size, length = rollout.tokens.shape
    rows, places = [], []
    for b in range(groups):
        size = int(rollout.prompts.length[b])
        prompt = np.asarray(rollout.prompts.tokens[b])
        for g in range(group_size):
            padding = prompt[size:] * 0
            rows.append(np.concatenate([prompt[:size], rollout.tokens[b, g], padding]))
            places.append(size - 1 + np.arange(length))
    return np.stack(rows), np.stack(places)


def completion_logits(params, rollout, config, xp=np):
    """[B, G, T, V] for the completion tokens, by a plain forward over all B * G sequences."""
    rows, places = sequences(rollout)
    hidden = hidden_states(params, rows, config, xp)
    hidden = hidden[np.arange(len(rows))[:, None], places]
    return logits(params, hidden).reshape(*rollout.tokens.shape, -1)


def bigram_logits(params, rollout):
    """The same of a policy that sees only the token before."""
    rows, places = sequences(rollout)
    seen = np.take_along_axis(rows, places, 1)
    return (params['embedding'][seen] @ params['head']).reshape(*rollout.tokens.shape, -1)


def bigram_pull_back(params, rollout, cotangent, temperature):
    """Gradient of sum(cotangent * log-probs) by the bigram policy's parameters, token by token."""
    rows, places = sequences(rollout)
    seen = np.take_along_axis(rows, places, 1).reshape(rollout.tokens.shape)
    gradient = {name: np.zeros_like(value) for name, value in params.items()}
    for i in map(tuple, np.argwhere(cotangent)):
        hidden = params['embedding'][seen[i]]
        error = -distribution(hidden @ params['head'], temperature)
        error[rollout.tokens[i]] += 1
        error *= cotangent[i] / temperature
        gradient['head'] += np.outer(hidden, error)
        gradient['embedding'][seen[i]] += params['head'] @ error
    return gradient


def logprobs(logits, tokens, temperature=1.0, xp=np):
    """[..., T] of the tokens under softmax(logits / temperature)."""
    scaled = logits / temperature
    norm = xp.log(xp.exp(scaled - scaled.max(-1)[..., None]).sum(-1)) + scaled.max(-1)
    return xp.take_along_axis(scaled, tokens[..., None], -1)[..., 0] - norm


def pull_back(make_logits, params, tokens, cotangent, temperature=1.0):
    """Gradient of sum(cotangent * log-probs) by the parameters of make_logits(params, xp)."""
    with jax.enable_x64(True):

        def loss(params):
            return (logprobs(make_logits(params, jnp), tokens, temperature, jnp) * cotangent).sum()

        # A program that runs once: half the compile time, however slow it is.
        quick = {'xla_backend_optimization_level': 0}
        gradient = jax.jit(jax.grad(loss), compiler_options=quick)(
            jax.tree.map(jnp.asarray, float64(params))
        )
        return jax.tree.map(np.asarray, gradient)


# The token distribution


def distribution(logits, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0, keep=None):
    """Probabilities [V], sorted, cut, renormalized; `keep` stays whatever the filters say."""
    scaled = np.asarray(logits, np.float64) / temperature
    probability = np.exp(scaled - scaled.max())
    order = sorted(range(len(scaled)), key=lambda i: -probability[i])
    kept = order[:top_k] if top_k else order
    total, mass, nucleus = sum(probability[i] for i in kept), 0.0, []
    for i in kept:
        if not nucleus or mass < top_p * total:
            nucleus.append(i)
            mass += probability[i]
    kept = [i for i in nucleus if probability[i] >= min_p * probability[order[0]]]
    if keep is not None and keep not in kept:
        kept.append(keep)
    out = np.zeros(len(scaled))
    out[kept] = probability[kept]
    return out / out.sum()


# Advantages, losses, weights


def advantages(rewards, baseline='mean', scale='std', eps=1e-4):
    """One group's, as a list."""
    rewards = [float(r) for r in rewards]
    out = []
    for i, reward in enumerate(rewards):
        others = rewards[:i] + rewards[i + 1 :]
        zero = {
            'mean': lambda: statistics.fmean(rewards),
            'leave_one_out': lambda others=others: statistics.fmean(others),
            'none': lambda: 0.0,
        }[baseline]()
        spread = {'std': statistics.stdev, 'population_std': statistics.pstdev}.get(scale)
        out.append((reward - zero) / (spread(rewards) + eps if spread else 1.0))
    return out


def opo(rewards, lengths):
    """r minus the mean weighted by length."""
    pairs = [(float(r), int(n)) for r, n in zip(rewards, lengths, strict=True)]
    mean = sum(r * n for r, n in pairs) / sum(n for _, n in pairs)
    return [r - mean for r, _ in pairs]


def best_minus_second(rewards):
    """The maximum of the group minus the maximum of the others."""
    rewards = [float(r) for r in rewards]
    return [max(rewards) - max(rewards[:i] + rewards[i + 1 :]) for i in range(len(rewards))]


def pass_at_k(rewards, k, eps):
    """The mean over the subsets of size k that a completion is in of their advantages."""
    rewards = [float(r) for r in rewards]
    subsets = [*itertools.combinations(range(len(rewards)), k)]
    best = [max(rewards[i] for i in subset) for subset in subsets]
    mean, std = statistics.fmean(best), statistics.pstdev(best)
    advantages = []
    for i in range(len(rewards)):
        with_it = [b for b, subset in zip(best, subsets, strict=True) if i in subset]
        advantages.append((statistics.fmean(with_it) - mean) / (std + eps) if std else 0.0)
    return advantages


def gdpo(values, weights, eps=1e-4):
    """[B, G] from rewards [B, G, R]: normalized one by one, summed, normalized; NaN is None."""
    total = np.zeros(values.shape[:2])
    for b, k in np.ndindex(values.shape[0], values.shape[2]):
        rows = [g for g in range(values.shape[1]) if not math.isnan(values[b, g, k])]
        of_function = [float(values[b, g, k]) for g in rows]
        if len(set(of_function)) < 2:
            continue
        for g, value in zip(rows, of_function, strict=True):
            z = (value - statistics.fmean(of_function)) / (statistics.stdev(of_function) + eps)
            total[b, g] += float(weights[b, k]) * z
    scored = ~np.isnan(values).all(-1)
    mean, std = total[scored].mean(), total[scored].std(ddof=1)
    return np.where(scored, (total - mean) / (std + eps), 0.0)


def process_advantages(rewards, ends, baseline='mean', scale='std', eps=1e-4):
    """One group's [G, T], from the rewards of its steps."""
    steps = [float(r) for r in rewards[ends]]
    out = np.zeros(ends.shape)
    relative = baseline != 'none' or scale in ('std', 'population_std')
    if relative and len(set(steps)) < 2:
        return out
    zero = statistics.fmean(steps) if baseline == 'mean' else 0.0
    spread = {'std': statistics.stdev, 'population_std': statistics.pstdev}.get(scale)
    unit = spread(steps) + eps if spread else 1.0
    for g, t in np.ndindex(ends.shape):
        later = [u for u in range(t, ends.shape[1]) if ends[g, u]]
        out[g, t] = sum((float(rewards[g, u]) - zero) / unit for u in later)
    return out


def gae(rewards, values, mask, gamma, lam):
    """[G, T]: the sum of the temporal differences to come, written out."""
    out = np.zeros(mask.shape)
    for g, row in enumerate(mask):
        used = int(row.sum())
        v = [*(float(x) for x in values[g, :used]), 0.0]
        error = [float(rewards[g, t]) + gamma * v[t + 1] - v[t] for t in range(used)]
        for t in range(used):
            out[g, t] = sum((gamma * lam) ** (u - t) * error[u] for u in range(t, used))
    return out


def clipped(logprob, old, advantage, low, high):
    """One token's loss, case by case of the advantage's sign."""
    ratio = math.exp(logprob - old)
    if advantage >= 0:
        return -advantage * min(ratio, 1 + high)
    return -advantage * max(ratio, 1 - low)


def kl(name, logprob, ref):
    ratio = math.exp(ref - logprob)
    return {
        'k1': -math.log(ratio),
        'k2': math.log(ratio) ** 2 / 2,
        'k3': ratio - math.log(ratio) - 1,
    }[name]


def weights(mask, aggregation):
    groups, group_size, length = mask.shape
    out = np.zeros(mask.shape)
    for b, g, t in np.argwhere(mask):
        out[b, g, t] = {
            'sequence_mean': 1 / (groups * group_size * mask[b, g].sum()),
            'token_mean': 1 / mask.sum(),
            'constant': 1 / (groups * group_size * length),
            'sequence_sum': 1 / (groups * group_size),
        }[aggregation]
    return out


def total_loss(
    logprobs, old, advantages, weights, *, loss='clipped', low=0.2, high=0.2, beta=0.0, kls=None
):
    """Sum of weights * (loss + beta * kl) over tokens; kls = (name, reference log-probs)."""
    total = 0.0
    for i in map(tuple, np.argwhere(weights)):
        if loss == 'clipped':
            value = clipped(logprobs[i], old[i], advantages[i], low, high)
        else:
            value = -advantages[i] * logprobs[i]
        if kls is not None:
            value += beta * kl(kls[0], logprobs[i], kls[1][i])
        total += weights[i] * value
    return total


def slope(function, x, step=1e-5):
    """Central finite differences of a scalar function by each element of x."""
    x = np.array(x, np.float64)
    out = np.zeros_like(x)
    for i in np.ndindex(x.shape):
        ends = []
        for sign in (1, -1):
            moved = x.copy()
            moved[i] += sign * step
            ends.append(function(moved))
        out[i] = (ends[0] - ends[1]) / (2 * step)
    return out


def complex_step(function, x, mask):
    """Value and derivatives of a scalar function of complex numbers by the elements of x in mask.

    A derivative is the imaginary part at x + ih, exact to rounding. What the function shall not
    differentiate it takes from the real parts.
    """
    h = 1e-30
    out = np.zeros(x.shape)
    for i in map(tuple, np.argwhere(mask)):
        moved = x.astype(complex)
        moved[i] += 1j * h
        out[i] = function(moved).imag / h
    return function(x.astype(complex)).real, out


def assert_same(ours, expected):
    """(value, gradient) each, to 1e-6 of the value and of the gradient's largest element."""
    (value, gradient), (want, want_gradient) = ours, expected
    np.testing.assert_allclose(value, want, rtol=1e-6, atol=1e-9)
    unit = max(np.abs(want_gradient).max(), 1e-12)
    np.testing.assert_allclose(gradient / unit, want_gradient / unit, rtol=0, atol=1e-6)
