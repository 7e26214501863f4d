"""What a quantized base of adapters costs in accuracy, in memory and in learning.

    python -m benchmarks.quantized_base --parts=logits,memory
    python -m benchmarks.quantized_base --parts=learning --output=runs/quantized --seeds=5

Prints Markdown:

- logits: those of random decoders with the options of three families, compared with float32.
- memory: bytes that the compiled update takes and needs besides, of a 1.5B shape (nothing is
  allocated).
- learning: held-out accuracy of `configs/arithmetic.py`, whose GRPO stage trains adapters. SFT
  trains all parameters once, and for each seed GRPO begins from it with each kind of base. Draws
  `learning.png`. The same command resumes; `--sft_steps` and `--steps` shorten it.
"""

import dataclasses
import functools
import pathlib
import sys
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags

ROOT = pathlib.Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # the configs are not part of the package

from benchmarks import parts, workloads  # noqa: E402
from benchmarks.ours import make_model  # noqa: E402
from grpo_jax import models  # noqa: E402
from grpo_jax.algorithm.config import Algorithm  # noqa: E402
from grpo_jax.algorithm.optimizer import adamw  # noqa: E402
from grpo_jax.algorithm.program import init_state, make_train_step  # noqa: E402
from grpo_jax.engine.compute import Compute  # noqa: E402
from grpo_jax.models import Lora, ModelConfig, Transformer  # noqa: E402
from grpo_jax.models.config import BASES  # noqa: E402
from grpo_jax.run import config as grpo_config  # noqa: E402
from grpo_jax.run import report  # noqa: E402
from grpo_jax.run.training import train  # noqa: E402
from grpo_jax.types import Prompts, Rollout  # noqa: E402

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

PARTS = flags.DEFINE_list('parts', ['logits', 'memory'], 'logits, memory, learning')
OUTPUT = flags.DEFINE_string('output', 'runs/quantized', 'folder of the runs of `learning`')
SEEDS = flags.DEFINE_integer('seeds', 1, 'how many seeds of `learning`, from 0')
SFT_STEPS = flags.DEFINE_integer('sft_steps', 450, 'steps of SFT')
STEPS = flags.DEFINE_integer('steps', 120, 'steps of GRPO')

EVALUATIONS = 6  # besides that of the base
Row = dict[str, str]


def main(arguments: list[str]) -> None:
    """Prints the tables that the flags name."""
    tables = {'logits': logits, 'memory': memory, 'learning': learning}
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


def learning() -> Iterator[Row]:
    """Held-out accuracy over the steps, one line for each base and seed, and their means."""
    output = pathlib.Path(OUTPUT.value).absolute()
    jax.config.update('jax_compilation_cache_dir', str(output / 'compiled'))
    start = _run(output / 'sft', _config(output, 0, grpo_steps=0))
    curves: dict[str, list[dict[int, float]]] = {kind: [] for kind in BASES}
    for seed in range(SEEDS.value):
        for kind in BASES:
            config = _config(output, seed, grpo_steps=STEPS.value)
            config.sft.steps = 0
            config.start = f'{start}:sft'
            config.model.lora.update(rank=16, alpha=32.0, base=kind)
            config.grpo.optimizer.learning_rate = 1e-3
            workdir = _run(output / f'{kind}-{seed}', config)
            rows = report.read_policy(workdir / 'heldout.jsonl', STEPS.value)
            curve = {row['step']: row['metrics']['eval/accuracy'] for row in rows}
            curves[kind].append(curve)
            points = {f'step {step}': f'{accuracy:.1%}' for step, accuracy in curve.items()}
            yield {'base': kind, 'seed': str(seed)} | points
    for kind, runs in curves.items():
        values = np.array([list(run.values()) for run in runs])
        cells = (
            f'{mean:.1%} ± {deviation:.1%}'
            for mean, deviation in zip(values.mean(0), values.std(0), strict=True)
        )
        points = dict(zip((f'step {step}' for step in runs[0]), cells, strict=True))
        yield {'base': kind, 'seed': 'mean ± std'} | points
    _draw(curves, output / 'learning.png')


def _draw(curves: dict[str, list[dict[int, float]]], path: pathlib.Path) -> None:
    """A thin line for each run, and a thick one for the mean of each base."""
    import matplotlib

    matplotlib.use('Agg')
    from matplotlib import pyplot as plt

    figure, axis = plt.subplots(figsize=(7, 4.4), layout='constrained')
    for number, (kind, runs) in enumerate(curves.items()):
        steps, color = list(runs[0]), f'C{number}'
        values = 100 * np.array([list(run.values()) for run in runs])
        axis.plot(steps, values.T, color=color, linewidth=0.7, alpha=0.4)
        axis.plot(steps, values.mean(0), color=color, marker='.', label=f'base={kind!r}')
    axis.set(xlabel='GRPO step', ylabel='held-out accuracy (%)')
    axis.set_title('Adapters over one base of SFT: mean and seeds')
    axis.grid(alpha=0.3)
    axis.legend(loc='lower right')
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _config(output: pathlib.Path, seed: int, *, grpo_steps: int) -> Any:
    config = grpo_config.load(f'{ROOT}/configs/arithmetic.py')
    config.seed = seed
    config.data.cache_dir = str(output / 'data')
    config.sft.steps = SFT_STEPS.value
    config.sft.optimizer.hold_steps = min(300, SFT_STEPS.value * 2 // 3)
    config.grpo.steps = grpo_steps
    config.grpo.optimizer.warmup_steps = min(20, STEPS.value // 6)
    config.eval.update(every=max(1, STEPS.value // EVALUATIONS), samples=0)
    return config


def _run(workdir: pathlib.Path, config: Any) -> pathlib.Path:
    """Trains the run unless it is already finished."""
    if not (workdir / 'finished').exists():
        train(config, str(workdir))
        (workdir / 'finished').touch()
    return workdir


if __name__ == '__main__':
    app.run(main)
