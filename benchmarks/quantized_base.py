"""What a quantized base of adapters costs in accuracy and in memory; in learning, see `learning`.

    python -m benchmarks.quantized_base

Prints Markdown:

- logits: those of random decoders with the options of three families, compared with float32.
- memory: bytes that the compiled update takes and needs besides, of a 1.5B shape (nothing is
  allocated).
"""

import dataclasses
import functools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags

from benchmarks import parts, workloads
from benchmarks.ours import make_model
from grpo_jax import models
from grpo_jax.algorithm.config import Algorithm
from grpo_jax.algorithm.optimizer import adamw
from grpo_jax.algorithm.program import init_state, make_train_step
from grpo_jax.engine.compute import Compute
from grpo_jax.models import Lora, ModelConfig, Transformer
from grpo_jax.models.config import BASES
from grpo_jax.types import Prompts, Rollout

SIZES: dict[str, Any] = {
    'vocab_size': 2048, 'width': 256, 'layers': 4, 'heads': 4, 'kv_heads': 2, 'head_dim': 64,
    'mlp_width': 704,
}  # fmt: skip
FAMILIES: dict[str, dict[str, Any]] = {
    'Qwen2': {'attention_bias': True},
    'Llama': {'tied_head': False},
    'Gemma 2': {
        'norms': 'both', 'norm_plus_one': True, 'activation': 'gelu_tanh', 'embedding_scaled': True,
        'attention_softcap': 50.0, 'logit_softcap': 30.0,
    },
}  # fmt: skip

PARTS = flags.DEFINE_list('parts', ['logits', 'memory'], 'which of them')

Row = dict[str, str]


def main(arguments: list[str]) -> None:
    """Prints the tables that the flags name."""
    tables = {'logits': logits, 'memory': memory}
    parts.check(arguments, PARTS.value, tables)
    for part in PARTS.value:
        print(f'\n{part}:\n')
        for number, row in enumerate(tables[part]()):
            parts.print_row(row, first=not number)


def logits() -> Iterator[Row]:
    """Errors of logits, relative to their standard deviation, and what they do to distributions."""
    tokens = np.random.default_rng(0).integers(0, SIZES['vocab_size'], (16, 64), np.int32)
    for family, options in FAMILIES.items():
        model = Transformer(ModelConfig(**SIZES, **options))
        params = _random_params(model)
        exact, *rounded = (
            _logits(model, models.quantize_base(params, kind), tokens) for kind in BASES
        )
        chances = jax.nn.log_softmax(exact)
        for kind, found in zip(BASES[1:], rounded, strict=True):
            gap = jnp.abs(found - exact) / exact.std()
            kl = (jnp.exp(chances) * (chances - jax.nn.log_softmax(found))).sum(-1).mean()
            same = (found.argmax(-1) == exact.argmax(-1)).mean()
            yield {
                'family': family, 'base': kind, 'mean error / std': f'{gap.mean():.4f}',
                'largest error / std': f'{gap.max():.3f}', 'KL': f'{kl:.2e}',
                'same best token': f'{same:.1%}',
            }  # fmt: skip


@functools.partial(jax.jit, static_argnums=0)
def _logits(model: Transformer, params: Any, tokens: np.ndarray) -> jax.Array:
    """f32[N, V] after each prompt."""
    length = jnp.full(len(tokens), tokens.shape[1])
    _, last = models.apply(model, params, tokens, length, method='prefill')
    return models.apply(model, params, last, method='logits')


def _random_params(model: Transformer) -> Any:
    """Matrices of scale 1 / sqrt(fan_in) in all places, so that no layer is small."""
    params = models.init_params(model, jax.random.key(0))
    small = (2 * model.config.layers) ** 0.5 / 0.02
    fan_in = {'out': model.config.heads * model.config.head_dim, 'down': model.config.mlp_width}
    for name, inputs in fan_in.items():
        params['blocks'][name] = params['blocks'][name] * small * inputs**-0.5
    return params


def memory() -> Iterator[Row]:
    """The update of a 1.5B shape in bfloat16 with adapters of rank 16, compiled for this device."""
    groups, group_size, prompt, length = 1, 2, 64, 64
    array: Any = jax.ShapeDtypeStruct
    rollout = Rollout(
        Prompts(array((groups, prompt), jnp.int32), *[array((groups,), jnp.int32)] * 2),
        array((groups, group_size, length), jnp.int32),
        array((groups, group_size, length), jnp.bool),
        array((groups, group_size, length), jnp.float32),
        array((groups, group_size), jnp.bool),
    )
    optimizer, _ = adamw(learning_rate=1e-4, steps=10)
    for name, dtype, kind in (
        ('float32', 'float32', 'model'), ('bfloat16', 'bfloat16', 'model'),
        ('int8', 'bfloat16', 'int8'), ('nf4', 'bfloat16', 'nf4'),
    ):  # fmt: skip
        model = make_model(workloads.QWEN_1_5B)
        options: dict[str, Any] = {'dtype': 'bfloat16', 'param_dtype': dtype, 'remat': True}
        config = dataclasses.replace(model.config, **options, lora=Lora(rank=16, base=kind))
        model = model.clone(config=config)
        shapes = jax.eval_shape(functools.partial(models.init_params, model), jax.random.key(0))
        base, adapters = models.split_adapters(shapes)
        base = jax.eval_shape(functools.partial(models.quantize_base, kind=kind), base)
        state = jax.eval_shape(functools.partial(init_state, model, optimizer), adapters)
        step: Any = make_train_step(
            model, optimizer, Algorithm(beta=0.04), compute=Compute(widths=1)
        )
        lowered = step.lower(state, base, rollout, array((groups, group_size), jnp.float32))
        found = lowered.compile().memory_analysis()
        yield {
            'base': name, 'bytes of the base': f'{_bytes(base) / 2**30:.2f} GiB',
            'arguments': f'{found.argument_size_in_bytes / 2**30:.2f} GiB',
        }  # fmt: skip


def _bytes(tree: Any) -> int:
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))


if __name__ == '__main__':
    app.run(main)
