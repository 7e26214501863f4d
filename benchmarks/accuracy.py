"""How far attention on this device is from float32, before anything is timed.

    python -m benchmarks.accuracy

Compares what a model of bfloat16 computes (the kernels for its platform, where there are some) with
the einsum form in float32: outputs and gradients of prompts and completions, and the output of one
token of each row. Prints |found - exact| / |exact| of each, and fails above 1e-2: operands rounded
to bfloat16 are off by 2e-3 to 4e-3, wrong masks and layouts by more than 1e-1.
"""

import dataclasses
import functools
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import workloads
from benchmarks.ours import make_model
from grpo_jax.models import ModelConfig, flash
from grpo_jax.models.attention import NOWHERE, Piece, Stacks, attend

TOLERANCE = 1e-2
# B, G, H, K, P, T, h: the shapes of 1.5B and 7B, odd sizes, and more queries of a key than 16.
SIZES = (
    (4, 16, 12, 2, 512, 1024, 128),
    (2, 16, 28, 4, 300, 200, 128),
    (3, 2, 20, 1, 100, 80, 64),
)


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
        found = dict(of_groups(config, groups, rows, columns, length))
        if flash.from_stacks(config):
            found |= of_token(config, groups, rows, columns, length)
        print(
            f'{flash.choose(config)}, B, G, H, K, P, T, h ='
            f' {groups, rows, heads, kv_heads, columns, length, width}: '
            + ', '.join(f'{name} {error:.1e}' for name, error in found.items()),
            flush=True,
        )
        worst = max(worst, *(np.nan_to_num(error, nan=np.inf) for error in found.values()))
    if worst > TOLERANCE:
        raise SystemExit(
            f'off by {worst:.1e}, where {TOLERANCE} is the most that rounding explains'
        )


def of_groups(
    c: ModelConfig, groups: int, rows: int, columns: int, length: int
) -> Iterator[tuple[str, float]]:
    """Errors of `flash.attend_groups` over ragged prompts: the output and all gradients."""
    draw = _normal(c)
    q = draw(groups, rows, length, c.heads, c.head_dim)
    own = [draw(groups, rows, c.kv_heads, length, c.head_dim) for _ in range(2)]
    prompt = [draw(groups, c.kv_heads, columns, c.head_dim) for _ in range(2)]
    slope = draw(*q.shape).astype(jnp.float32)
    starts = _lengths(groups, columns)
    positions = starts[:, None] + jnp.arange(length)
    before = _positions(columns, starts)

    def loss(c, q, k, v, prompt_k, prompt_v):
        pieces = [Piece(prompt_k, prompt_v, before), Piece(k, v, positions)]
        out = flash.attend_groups(c, q, pieces, positions).astype(jnp.float32)
        return (out * slope).sum(), out

    def run(c, arrays):
        program = jax.grad(functools.partial(loss, c), argnums=(0, 1, 2, 3, 4), has_aux=True)
        gradients, out = jax.jit(program)(*arrays)
        return out, *gradients

    arrays = q, *own, *prompt
    found = run(c, arrays)
    with jax.default_matmul_precision('highest'):
        exact_form = dataclasses.replace(c, attention='einsum', dtype='float32')
        exact = run(exact_form, [x.astype(jnp.float32) for x in arrays])
    names = 'output', 'dq', 'dk', 'dv', 'dk of prompts', 'dv of prompts'
    for name, a, b in zip(names, found, exact, strict=True):
        yield name, _error(a, b)


def of_token(
    c: ModelConfig, groups: int, rows: int, columns: int, length: int
) -> Iterator[tuple[str, float]]:
    """Errors of `flash.attend_token` in the first, one more and nearly the last column."""
    draw = _normal(c)
    layers = 2
    q = draw(groups, rows, c.heads, c.head_dim)
    new = draw(groups, rows, c.kv_heads, c.head_dim), draw(groups, rows, c.kv_heads, c.head_dim)
    prompt = tuple(draw(layers, groups, c.kv_heads, columns, c.head_dim) for _ in range(2))
    own = tuple(draw(layers, groups, rows, c.kv_heads, length, c.head_dim) for _ in range(2))
    stacks, starts = Stacks(prompt, own), _lengths(groups, columns)
    found = jax.jit(functools.partial(flash.attend_token, c))
    exact = jax.jit(functools.partial(_exact_token, c.head_dim**-0.5))
    for t in (0, 63, length - 3):
        given = q, new, stacks, jnp.int32(layers - 1), starts, jnp.int32(t)
        with jax.default_matmul_precision('highest'):
            expected = exact(*given)
        yield f'token {t}', _error(found(*given)[0], expected)


def _exact_token(scale, q, new, stacks: Stacks, layer, starts, t):
    """By the einsum form in float32."""

    def one(q, new, prompt, own, start):
        before = Piece(prompt[0], prompt[1], _positions(prompt[0].shape[1], start))
        filled = _positions(own[0].shape[2], t)
        earlier = Piece(own[0], own[1], jnp.where(filled < NOWHERE, start + filled, NOWHERE))
        at = (start + t)[None]
        itself = Piece(new[0][:, :, None], new[1][:, :, None], at)
        return attend(q[:, None], [before, earlier, itself], at, scale=scale)[:, 0]

    of_layer = jax.tree.map(lambda x: x[layer], stacks)
    q, new, kv = jax.tree.map(lambda x: x.astype(jnp.float32), (q, new, of_layer))
    return jax.vmap(one)(q, new, kv.prompt, kv.own, starts)


def _normal(c: ModelConfig):
    keys = iter(jax.random.split(jax.random.key(0), 8))
    return lambda *shape: jax.random.normal(next(keys), shape).astype(c.dtype)


def _lengths(groups: int, columns: int) -> jax.Array:
    """Of prompts, one of them whole."""
    rest = np.random.default_rng(0).integers(1, columns, groups - 1)
    return jnp.asarray([columns, *rest], jnp.int32)


def _positions(columns: int, ends: jax.Array) -> jax.Array:
    """i32[..., columns], NOWHERE from `ends` on."""
    return jnp.where(jnp.arange(columns) < ends[..., None], jnp.arange(columns), NOWHERE)


def _error(found: jax.Array, exact: jax.Array) -> float:
    return float(jnp.linalg.norm(found.astype(jnp.float32) - exact) / jnp.linalg.norm(exact))


if __name__ == '__main__':
    main()
