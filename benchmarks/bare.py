"""Bare JAX loops that do a step's work without a framework: what our times are held against.

Decoding reads each prompt once, draws by an inverse distribution function in two levels and runs
all rows to T columns. The gradient is that of the completions' mean log-prob, prompts read once for
their groups, accumulated over groups. Layers are unrolled, nothing is computed again, and there is
no optimizer, loss, mask, end of sequence, filter or metric: floors, not trainers.
`benchmarks/floors.py` times and checks them.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks.workloads import Shape
from grpo_jax.types import Params

_BLOCK = 64  # tokens per block of the two-level draw
Pick = Callable[[jax.Array, jax.Array], jax.Array]  # key, logits [N, V] -> tokens [N]


def arrange(params: Params, c: Shape) -> dict[str, Any]:
    """Our parameters as matrices of unrolled layers, products of the same input side by side."""

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

    It may return a cache beside, and the caches of all layers are handed back.
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


def _causal(c: Shape, q, k, v):
    """Self-attention of rows q [B, S, H, h] with k, v [B, S, K, h]."""
    b, s, _, h = q.shape
    q = q.reshape(b, s, c.kv_heads, -1, h)
    scores = _product('bskrh,bnkh->bkrsn', q * h**-0.5, k)
    weights = jax.nn.softmax(jnp.where(jnp.tril(jnp.ones((s, s), bool)), scores, -1e30))
    return jnp.einsum('bkrsn,bnkh->bskrh', weights.astype(v.dtype), v).reshape(b, s, -1)


def prefill(c: Shape, w: dict[str, Any], prompts: jax.Array):
    """Last states [B, D] of prompts [B, P], and per layer keys and values [B, K, P, h]."""
    b, p = prompts.shape

    def attend(_, q, k, v):
        q, k, v = (x.reshape(b, p, -1, c.head_dim) for x in (q, k, v))
        return _causal(c, q, k, v), (k.swapaxes(1, 2), v.swapaxes(1, 2))

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
    c: Shape, w: dict[str, Any], prompts, key, *, group_size: int, length: int, pick: Pick = draw
) -> jax.Array:
    """Tokens i32[B, G, T] sampled over prompts [B, P] of T = `length` columns."""
    (b, p), rows = prompts.shape, prompts.shape[0] * group_size
    last, prompt = prefill(c, w, prompts)

    def choose(hidden, i):
        logits = jnp.matmul(hidden, w['head'], preferred_element_type=jnp.float32)
        return pick(jax.random.fold_in(key, i), logits)

    def step(i, carry):
        token, caches, out = carry

        def attend(n, q, k, v):
            q = q.reshape(b, group_size, c.kv_heads, -1, c.head_dim) * c.head_dim**-0.5
            own = tuple(
                jax.lax.dynamic_update_slice_in_dim(cache, new[:, :, None], i - 1, axis=2)
                for cache, new in zip(caches[n], (k, v), strict=True)
            )
            keys, values = (x.reshape(b, group_size, *x.shape[1:]) for x in own)
            there = _product('bgkrh,bknh->bgkrn', q, prompt[n][0])
            here = _product('bgkrh,bgknh->bgkrn', q, keys)
            here = jnp.where(jnp.arange(length) < i, here, -1e30)
            weights = jax.nn.softmax(jnp.concatenate([there, here], -1)).astype(v.dtype)
            read = jnp.einsum('bgkrn,bknh->bgkrh', weights[..., :p], prompt[n][1])
            read += jnp.einsum('bgkrn,bgknh->bgkrh', weights[..., p:], values)
            return read, own

        hidden, caches = _run(c, w, token, jnp.full(rows, p + i - 1), attend)
        token = choose(hidden, i)
        return token, caches, out.at[i].set(token)

    token = choose(jnp.repeat(last, group_size, 0), 0)
    empty = jnp.zeros((rows, c.kv_heads, length, c.head_dim), w['embedding'].dtype)
    carry = (token, [(empty, empty)] * c.layers, jnp.zeros((length, rows), jnp.int32))
    carry = jax.lax.fori_loop(1, length, step, (*carry[:2], carry[2].at[0].set(token)))
    return carry[2].T.reshape(b, group_size, length)


def group_logits(c: Shape, w: dict[str, Any], prompt: jax.Array, tokens: jax.Array) -> jax.Array:
    """f32[G, T, V] for one group: prompt [P] and completions [G, T] in one pass."""
    (g, t), p = tokens.shape, len(prompt)
    s = t - 1  # the last token is predicted, not read
    ids = jnp.concatenate([prompt, tokens[:, :-1].reshape(-1)])
    positions = jnp.concatenate([jnp.arange(p), jnp.tile(p + jnp.arange(s), g)])

    def attend(_, q, k, v):
        read = _causal(c, q[None, :p], k[None, :p], v[None, :p])[0]
        own_q = q[p:].reshape(g, s, c.kv_heads, -1, c.head_dim) * c.head_dim**-0.5
        own_k, own_v = (x[p:].reshape(g, s, c.kv_heads, -1) for x in (k, v))
        there = _product('gskrh,nkh->kgsrn', own_q, k[:p])
        here = _product('gskrh,gnkh->kgsrn', own_q, own_k)
        here = jnp.where(jnp.tril(jnp.ones((s, s), bool))[:, None], here, -1e30)
        weights = jax.nn.softmax(jnp.concatenate([there, here], -1)).astype(v.dtype)
        own = jnp.einsum('kgsrn,nkh->gskrh', weights[..., :p], v[:p])
        own += jnp.einsum('kgsrn,gnkh->gskrh', weights[..., p:], own_v)
        return jnp.concatenate([read, own.reshape(g * s, -1)]), None

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
