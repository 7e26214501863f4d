"""Arrays for attention over prompts and completions, and its definition in float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import tiny

from grpo_jax.models.attention import MASKED_POSITION, Piece
from grpo_jax.models.kernels import cudnn, dispatch, splash

# The TPU's kernel runs interpreted and the GPU's by XLA: the same code around another inside.
ON_CPU = {
    splash: functools.partial(splash.attend, interpret=True),
    cudnn: functools.partial(cudnn.attend, implementation='xla'),
}


def run_on_cpu(monkeypatch):
    """Makes all kernels run on this machine."""
    for module, kernel in ON_CPU.items():
        monkeypatch.setattr(module, 'attend', kernel)


def configure(attention, **options):
    """A config that every form supports; the arrays' dtype is another matter."""
    options = {'dtype': 'bfloat16', 'head_dim': 8, 'attention': attention} | options
    return tiny.make_model(**options).config


def make_arrays(*, batch=2, rows=3, length=5, columns=6, heads=4, kv_heads=2, width=8):
    """Queries, own keys and values, those of the prompt, and what the output is multiplied with."""
    rng = np.random.default_rng(0)

    def array(*shape):
        return jnp.asarray(rng.standard_normal(shape).astype(np.float32))

    q = 1.5 * array(batch, rows, length, heads, width)
    own = tuple(array(batch, rows, kv_heads, length, width) for _ in range(2))
    prompt = tuple(array(batch, kv_heads, columns, width) for _ in range(2)) if columns else ()
    return (q, own, prompt), array(*q.shape)


def attend(config, arrays, start, window=None):
    """`attend_groups` as prefill (without a prompt) and extend call it."""
    q, own, prompt = arrays
    positions = start[:, None] + jnp.arange(q.shape[2])
    pieces = [Piece(*own, positions)]
    if prompt:
        columns = jnp.arange(prompt[0].shape[2])
        pieces.insert(
            0, Piece(*prompt, jnp.where(columns < start[:, None], columns, MASKED_POSITION))
        )
    return dispatch.attend_groups(config, q, pieces, positions, window)


def value_and_gradient(config, arrays, weights, start):
    def loss(arrays):
        out = attend(config, arrays, start)
        return (weights * out).sum(), out

    (_, out), gradient = tiny.jit(jax.value_and_grad(loss, has_aux=True))(arrays)
    return out, gradient


def softmax_attention(arrays, weights, start, *, scale=8**-0.5, softcap=0.0):
    """Output and gradients of sum(weights * output), a head of a row at a time, in float64."""
    q, own, prompt = jax.tree.map(lambda x: np.asarray(x, np.float64), arrays)
    out, (dq, down, dprompt) = np.zeros_like(q), jax.tree.map(np.zeros_like, (q, own, prompt))
    for b, g, head in np.ndindex(q.shape[0], q.shape[1], q.shape[3]):
        kv, past = head * own[0].shape[2] // q.shape[3], start[b]
        k, v = (x[b, g, kv] for x in own)
        if prompt:
            k, v = (np.concatenate([prompt[i][b, kv, :past], x]) for i, x in enumerate((k, v)))
        visible = np.tri(q.shape[2], len(k), len(k) - q.shape[2], dtype=bool)
        scores, slope = scale * q[b, g, :, head] @ k.T, 1.0
        if softcap:
            scores = softcap * np.tanh(scores / softcap)
            slope = 1 - (scores / softcap) ** 2
        p = np.where(visible, np.exp(scores - scores.max(-1, keepdims=True)), 0)
        p /= p.sum(-1, keepdims=True)
        out[b, g, :, head] = p @ v
        dout = np.asarray(weights[b, g, :, head], np.float64)
        dp = dout @ v.T
        ds = scale * slope * p * (dp - (p * dp).sum(-1, keepdims=True))
        dq[b, g, :, head] = ds @ k
        for i, dx in enumerate((ds.T @ q[b, g, :, head], p.T @ dout)):
            if prompt:
                dprompt[i][b, kv, :past] += dx[:past]
            down[i][b, g, kv] += dx[len(k) - q.shape[2] :]
    return out, (dq, down, dprompt)
