"""Bare JAX loops that do the work of a step without a framework, as a baseline for our times.

Decoding processes each prompt once, draws tokens by an inverse distribution function in two levels
and runs all completions to T tokens. The gradient is that of the mean log-prob of the completions,
with each prompt processed once for its group, accumulated over groups. Layers are unrolled, nothing
is recomputed, and there is no optimizer, loss, mask, end token, filter or metric: these are floors,
not trainers.
`benchmarks/floors.py` times and checks them.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks.workloads import Shape
from grpo_jax.types import Params

_BLOCK = 64  # tokens per block of the two-level draw
_COLUMNS = 64  # by which the rows' keys and values grow


def arrange(params: Params, c: Shape) -> dict[str, Any]:
    """Our parameters as matrices of unrolled layers; those with the same input are concatenated."""

    def layer(i: int) -> dict[str, jax.Array]:
        p = jax.tree.map(lambda x: x[i], params['blocks'])
        qkv = [p[name].reshape(c.width, -1) for name in ('query', 'key', 'value')]
        bias = [p[f'{name}_bias'].reshape(-1) for name in ('query', 'key', 'value')]
        return {
            'attention_norm': p['attention_norm']['scale'],
            'qkv': jnp.concatenate(qkv, 1),
            'bias': jnp.concatenate(bias),
            'out': p['out'].reshape(-1, c.width),
            'mlp_norm': p['mlp_norm']['scale'],
            'gate_up': jnp.concatenate([p['gate'], p['up']], 1),
            'down': p['down'],
        }

    head = params['embedding'].T if c.tied_head else params['head']
    return {
        'embedding': params['embedding'],
        'head': head,
        'norm': params['final_norm']['scale'],
        'layers': [layer(i) for i in range(c.layers)],
    }


def _norm(c: Shape, x: jax.Array, scale: jax.Array) -> jax.Array:
    y = x.astype(jnp.float32)
    y = y * jax.lax.rsqrt(jnp.mean(y * y, -1, keepdims=True) + c.norm_eps)
    return (y * scale).astype(x.dtype)


def _rotate(c: Shape, x: jax.Array, positions: jax.Array) -> jax.Array:
    """Heads x [N, heads, h] turned by their positions [N]."""
    angles = positions[:, None] / c.rope_theta ** (jnp.arange(0, c.head_dim, 2) / c.head_dim)
    cos, sin = jnp.cos(angles)[:, None], jnp.sin(angles)[:, None]
    a, b = jnp.split(x.astype(jnp.float32), 2, -1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], -1).astype(x.dtype)


def _run(c: Shape, w: dict[str, Any], ids, positions, attend):
    """Final states [N, D] of tokens [N]; `attend(layer, q, k, v)` of [N, heads, h] -> [N, H * h].

    `attend` may also return a cache; the caches of all layers are returned.
    """
    x, caches = w['embedding'][ids], []
    for i, p in enumerate(w['layers']):
        qkv = _norm(c, x, p['attention_norm']) @ p['qkv'] + p['bias']
        cuts = c.heads * c.head_dim, (c.heads + c.kv_heads) * c.head_dim
        q, k, v = (y.reshape(len(y), -1, c.head_dim) for y in jnp.split(qkv, cuts, -1))
        read, cache = attend(i, _rotate(c, q, positions), _rotate(c, k, positions), v)
        caches.append(cache)
        x = x + read.reshape(len(x), -1) @ p['out']
        gate, up = jnp.split(_norm(c, x, p['mlp_norm']) @ p['gate_up'], 2, -1)
        x = x + (jax.nn.silu(gate) * up) @ p['down']
    return _norm(c, x, w['norm']), caches


def _product(equation: str, a: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.einsum(equation, a, b, preferred_element_type=jnp.float32)


def _read(scores: list[jax.Array], values: list[jax.Array], equations: list[str]) -> jax.Array:
    """Softmax over several pieces of scores, times their values; divided by the sum at the end."""
    peaks = [x.max(-1, keepdims=True) for x in scores]
    peak = jax.lax.stop_gradient(functools.reduce(jnp.maximum, peaks))
    weights = [jnp.exp(x - peak) for x in scores]
    total = functools.reduce(jnp.add, [x.sum(-1, keepdims=True) for x in weights])
    parts = [
        _product(equation, x.astype(v.dtype), v)
        for equation, x, v in zip(equations, weights, values, strict=True)
    ]
    return (functools.reduce(jnp.add, parts) / total).astype(values[0].dtype)


def _heads_first(c: Shape, x: jax.Array) -> jax.Array:
    """[..., S, heads, h] -> [K, ..., S, R, h], the R heads of each key/value head together."""
    x = x.reshape(*x.shape[:-2], c.kv_heads, -1, c.head_dim)
    return jnp.moveaxis(x, -3, 0)


def _causal(c: Shape, q, k, v):
    """Self-attention [B, S, H * h] of q [B, S, H, h]; keys and values are [K, B, S, h]."""
    b, s = q.shape[:2]
    q = _heads_first(c, q) * c.head_dim**-0.5
    scores = _product('kbsrh,kbnh->kbsrn', q, k)
    scores = jnp.where(jnp.tril(jnp.ones((s, s), bool))[:, None], scores, -1e30)
    return jnp.moveaxis(_read([scores], [v], ['kbsrn,kbnh->kbsrh']), 0, 2).reshape(b, s, -1)


def prefill(c: Shape, w: dict[str, Any], prompts: jax.Array):
    """Last states [B, D] of prompts [B, P], and per layer keys and values [K, B, P, h]."""
    b, p = prompts.shape

    def attend(_, q, k, v):
        q, k, v = (x.reshape(b, p, -1, c.head_dim) for x in (q, k, v))
        k, v = jnp.moveaxis(k, 2, 0), jnp.moveaxis(v, 2, 0)
        return _causal(c, q, k, v), (k, v)

    positions = jnp.tile(jnp.arange(p), b)
    hidden, caches = _run(c, w, prompts.reshape(-1), positions, attend)
    return hidden.reshape(b, p, -1)[:, -1], caches


def draw(key: jax.Array, logits: jax.Array) -> jax.Array:
    """Tokens [N] from the softmax of logits f32[N, V]: first a block by its mass, then in it."""
    rows = len(logits)
    mass = jnp.exp(logits - logits.max(-1, keepdims=True))
    blocks = jnp.pad(mass, ((0, 0), (0, -mass.shape[1] % _BLOCK))).reshape(rows, -1, _BLOCK)
    u = jax.random.uniform(key, (2, rows, 1))
    outer = jnp.cumsum(blocks.sum(-1), -1)
    block = jnp.argmax(outer > u[0] * outer[:, -1:], -1)
    inner = jnp.cumsum(jnp.take_along_axis(blocks, block[:, None, None], 1)[:, 0], -1)
    return block * _BLOCK + jnp.argmax(inner > u[1] * inner[:, -1:], -1)


def generate(
    c: Shape, w: dict[str, Any], prompts, key, *, group_size: int, length: int
) -> jax.Array:
    """Tokens i32[B, G, T] sampled over prompts [B, P] of T = `length` columns."""
    (b, p), rows = prompts.shape, prompts.shape[0] * group_size
    last, prompt = prefill(c, w, prompts)

    def choose(hidden, i):
        logits = jnp.matmul(hidden, w['head'], preferred_element_type=jnp.float32)
        return draw(jax.random.fold_in(key, i), logits)

    def step(i, carry):
        token, caches, out = carry

        def attend(n, q, k, v):
            q = _heads_first(c, q.reshape(b, group_size, -1, c.head_dim)) * c.head_dim**-0.5
            new = (jnp.moveaxis(x.reshape(b, group_size, 1, *x.shape[1:]), 3, 0) for x in (k, v))
            keys, values = (
                jax.lax.dynamic_update_slice_in_dim(cache, column, i - 1, axis=3)
                for cache, column in zip(caches[n], new, strict=True)
            )
            there = _product('kbgrh,kbnh->kbgrn', q, prompt[n][0])
            here = _product('kbgrh,kbgnh->kbgrn', q, keys)
            here = jnp.where(jnp.arange(keys.shape[3]) < i, here, -1e30)
            products = ['kbgrn,kbnh->kbgrh', 'kbgrn,kbgnh->kbgrh']
            read = _read([there, here], [prompt[n][1], values], products)
            return jnp.moveaxis(read, 0, 2).reshape(rows, -1), (keys, values)

        hidden, caches = _run(c, w, token, jnp.full(rows, p + i - 1), attend)
        token = choose(hidden, i)
        return token, caches, out.at[i].set(token)

    token = choose(jnp.repeat(last, group_size, 0), 0)
    empty = jnp.zeros((c.kv_heads, b, group_size, 0, c.head_dim), w['embedding'].dtype)
    out = jnp.zeros((length, rows), jnp.int32).at[0].set(token)
    carry = token, [(empty, empty)] * c.layers, out
    for start in range(0, length, _COLUMNS):
        end = min(start + _COLUMNS, length)
        wider = ((0, 0), (0, 0), (0, 0), (0, end - start), (0, 0))
        caches = jax.tree.map(lambda cache, wider=wider: jnp.pad(cache, wider), carry[1])
        carry = jax.lax.fori_loop(max(start, 1), end, step, (carry[0], caches, carry[2]))
    return carry[2].T.reshape(b, group_size, length)


def group_logits(c: Shape, w: dict[str, Any], prompt: jax.Array, tokens: jax.Array) -> jax.Array:
    """f32[G, T, V] for one group: prompt [P] and completions [G, T] in one pass."""
    (g, t), p = tokens.shape, len(prompt)
    s = t - 1  # the last token is predicted and is not an input
    ids = jnp.concatenate([prompt, tokens[:, :-1].reshape(-1)])
    positions = jnp.concatenate([jnp.arange(p), jnp.tile(p + jnp.arange(s), g)])

    def attend(_, q, k, v):
        k, v = k.swapaxes(0, 1), v.swapaxes(0, 1)
        (prompt_k, own_k), (prompt_v, own_v) = (
            (x[:, :p], x[:, p:].reshape(-1, g, s, c.head_dim)) for x in (k, v)
        )
        read = _causal(c, q[None, :p], prompt_k[:, None], prompt_v[:, None])[0]
        q = _heads_first(c, q[p:].reshape(g, s, -1, c.head_dim)) * c.head_dim**-0.5
        there = _product('kgsrh,knh->kgsrn', q, prompt_k)
        here = _product('kgsrh,kgnh->kgsrn', q, own_k)
        here = jnp.where(jnp.tril(jnp.ones((s, s), bool))[:, None], here, -1e30)
        products = ['kgsrn,knh->kgsrh', 'kgsrn,kgnh->kgsrh']
        own = _read([there, here], [prompt_v, own_v], products)
        return jnp.concatenate([read, jnp.moveaxis(own, 0, 2).reshape(g * s, -1)]), None

    hidden, _ = _run(c, w, ids, positions, attend)
    first = jnp.broadcast_to(hidden[p - 1], (g, 1, c.width))
    hidden = jnp.concatenate([first, hidden[p:].reshape(g, s, -1)], 1)
    logits = jnp.matmul(hidden.reshape(g * t, -1), w['head'], preferred_element_type=jnp.float32)
    return logits.reshape(g, t, -1)


def group_logprobs(c: Shape, w: dict[str, Any], prompt, tokens) -> jax.Array:
    """f32[G, T] of one group's completions."""
    logits = group_logits(c, w, prompt, tokens)
    chosen = jnp.take_along_axis(logits, tokens[..., None], -1)[..., 0]
    return chosen - jax.nn.logsumexp(logits, -1)


def score(c: Shape, w: dict[str, Any], prompts, tokens) -> jax.Array:
    """Log-probs f32[B, G, T], one group after the other."""
    return jax.lax.map(lambda group: group_logprobs(c, w, *group), (prompts, tokens))


def gradient(c: Shape, w: dict[str, Any], prompts, tokens) -> Any:
    """Of the mean log-prob, added up over the groups."""

    def add(total, group):
        one = jax.grad(lambda w: group_logprobs(c, w, *group).mean())(w)
        return jax.tree.map(jnp.add, total, one), None

    return jax.lax.scan(add, jax.tree.map(jnp.zeros_like, w), (prompts, tokens))[0]
