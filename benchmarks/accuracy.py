"""Compares attention on this device with float32, before anything is timed.

    python -m benchmarks.accuracy

Compares attention in bfloat16 (with the kernels for the platform, if there are any) to the einsum
form in float32: outputs and gradients of prompts and completions, and the output of one token of
each completion, also with windows and soft caps. Prints |actual - exact| / |exact| of each, and
fails above 1e-2: rounding operands to bfloat16 gives 2e-3 to 4e-3, wrong masks and layouts give
more than 1e-1.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from benchmarks import workloads
from benchmarks.ours import make_model
from grpo_jax.models import ModelConfig
from grpo_jax.models.attention import MASKED_POSITION, DecodeCache, LayerCaches, Piece, attend
from grpo_jax.models.kernels import dispatch, selection

TOLERANCE = 1e-2
# B, G, H, K, P, T, h: the shapes of 1.5B and 7B, odd sizes, and more queries of a key than 16.
SIZES = (
    (4, 16, 12, 2, 512, 1024, 128),
    (2, 16, 28, 4, 300, 200, 128),
    (3, 2, 20, 1, 100, 80, 64),
)
# What the decode kernel supports and cuDNN does not.
WINDOWED: dict[str, Any] = {'attention_softcap': 30.0, 'window': 100, 'window_layers': (0,)}


def main() -> None:
    """Prints a line for each size."""
    small = jax.default_backend() == 'cpu'
    print(f'jax {jax.__version__}, {jax.devices()[0].device_kind}')
    worst = 0.0
    for groups, rows, heads, kv_heads, columns, length, width in SIZES:
        if small:
            groups, rows, columns, length = 2, 2, columns // 8, length // 8
        shape = dataclasses.replace(
            workloads.QWEN_1_5B, layers=1, heads=heads, kv_heads=kv_heads, head_dim=width
        )
        config = make_model(shape).config
        errors = dict(of_groups(config, groups, rows, columns, length))
        if selection.caches_in_place(config):
            errors |= of_token(config, groups, rows, columns, length)
            windowed = dataclasses.replace(config, **WINDOWED)
            errors |= {
                f'{name}, window and soft cap': error
                for name, error in of_token(windowed, groups, rows, columns, length)
            }
        print(
            f'{selection.choose_attention(config)}, B, G, H, K, P, T, h ='
            f' {groups, rows, heads, kv_heads, columns, length, width}: '
            + ', '.join(f'{name} {error:.1e}' for name, error in errors.items()),
            flush=True,
        )
        worst = max(worst, *(np.nan_to_num(error, nan=np.inf) for error in errors.values()))
    if worst > TOLERANCE:
        raise SystemExit(f'error {worst:.1e} is larger than rounding explains, {TOLERANCE}')


def of_groups(
    c: ModelConfig, groups: int, rows: int, columns: int, length: int
) -> Iterator[tuple[str, float]]:
    """Errors of `dispatch.attend_groups` over ragged prompts: the output and all gradients."""
    draw = _normal(c)
    q = draw(groups, rows, length, c.heads, c.head_dim)
    own = [draw(groups, rows, c.kv_heads, length, c.head_dim) for _ in range(2)]
    prompt = [draw(groups, c.kv_heads, columns, c.head_dim) for _ in range(2)]
    weights = draw(*q.shape).astype(jnp.float32)
    starts = _lengths(groups, columns)
    positions = starts[:, None] + jnp.arange(length)
    prompt_positions = _positions(columns, starts)

    def loss(
        c: ModelConfig, q: Array, k: Array, v: Array, prompt_k: Array, prompt_v: Array
    ) -> tuple[Array, Array]:
        pieces = [Piece(prompt_k, prompt_v, prompt_positions), Piece(k, v, positions)]
        out = dispatch.attend_groups(c, q, pieces, positions).astype(jnp.float32)
        return (out * weights).sum(), out

    def run(c: ModelConfig, arrays: Any) -> tuple[Array, ...]:
        program = jax.grad(functools.partial(loss, c), argnums=(0, 1, 2, 3, 4), has_aux=True)
        gradients, out = jax.jit(program)(*arrays)
        return out, *gradients

    arrays = q, *own, *prompt
    actual = run(c, arrays)
    with jax.default_matmul_precision('highest'):
        exact_form = dataclasses.replace(c, attention='einsum', dtype='float32')
        exact = run(exact_form, [x.astype(jnp.float32) for x in arrays])
    names = 'output', 'dq', 'dk', 'dv', 'dk of prompts', 'dv of prompts'
    for name, a, b in zip(names, actual, exact, strict=True):
        yield name, _error(a, b)


def of_token(
    c: ModelConfig, groups: int, rows: int, columns: int, length: int
) -> Iterator[tuple[str, float]]:
    """Errors of `dispatch.attend_token` in the first, one more and nearly the last column."""
    draw = _normal(c)
    layers = 2
    q = draw(groups, rows, c.heads, c.head_dim)
    new = draw(groups, rows, c.kv_heads, c.head_dim), draw(groups, rows, c.kv_heads, c.head_dim)
    prompt_shape = layers, groups, c.kv_heads, columns, c.head_dim
    own_shape = layers, groups, rows, c.kv_heads, length, c.head_dim
    prompt, own = (draw(*prompt_shape), draw(*prompt_shape)), (draw(*own_shape), draw(*own_shape))
    starts = _lengths(groups, columns)
    window = jnp.int32(c.window) if c.window else None
    actual = jax.jit(functools.partial(dispatch.attend_token, c))
    exact = jax.jit(functools.partial(_exact_token, c))
    for t in (0, 63, length - 3):
        cache = DecodeCache(LayerCaches(prompt, own), starts, jnp.int32(t))
        inputs = q, new, cache, jnp.int32(layers - 1), window
        with jax.default_matmul_precision('highest'):
            expected = exact(*inputs)
        yield f'token {t}', _error(actual(*inputs)[0], expected)


def _exact_token(
    c: ModelConfig, q: Array, new: Any, cache: DecodeCache, layer: Array, window: Array | None
) -> Array:
    """By the einsum form in float32."""

    def attend_group(q: Array, new: Any, prompt: Any, own: Any, start: Array) -> Array:
        prompt_piece = Piece(prompt[0], prompt[1], _positions(prompt[0].shape[1], start))
        columns = _positions(own[0].shape[2], cache.t)
        filled = jnp.where(columns < MASKED_POSITION, start + columns, MASKED_POSITION)
        position = (start + cache.t)[None]
        token = Piece(new[0][:, :, None], new[1][:, :, None], position)
        pieces = [prompt_piece, Piece(own[0], own[1], filled), token]
        return attend(
            q[:, None],
            pieces,
            position,
            scale=c.head_dim**-0.5,
            softcap=c.attention_softcap,
            window=window,
        )[:, 0]

    caches = jax.tree.map(lambda x: x[layer], cache.layers)
    q, new, caches = jax.tree.map(lambda x: x.astype(jnp.float32), (q, new, caches))
    return jax.vmap(attend_group)(q, new, caches.prompt, caches.own, cache.length)


def _normal(c: ModelConfig) -> Callable[..., Array]:
    """Draws arrays of a shape in the config's dtype."""
    keys = iter(jax.random.split(jax.random.key(0), 8))
    return lambda *shape: jax.random.normal(next(keys), shape).astype(c.dtype)


def _lengths(groups: int, columns: int) -> Int[Array, ' B']:
    """Of prompts, one of them as long as there are columns."""
    rest = np.random.default_rng(0).integers(1, columns, groups - 1)
    return jnp.asarray([columns, *rest], jnp.int32)


def _positions(columns: int, ends: Int[Array, '*batch']) -> Int[Array, '*batch N']:
    """0, 1, ... and MASKED_POSITION from `ends` on."""
    return jnp.where(jnp.arange(columns) < ends[..., None], jnp.arange(columns), MASKED_POSITION)


def _error(actual: Float[Array, '...'], exact: Float[Array, '...']) -> float:
    return float(jnp.linalg.norm(actual.astype(jnp.float32) - exact) / jnp.linalg.norm(exact))


if __name__ == '__main__':
    main()
