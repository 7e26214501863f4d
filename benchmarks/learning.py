"""Learning with options that save memory: held-out accuracy of `configs/arithmetic.py`.

    python -m benchmarks.learning --compare=base --output=runs/base --seeds=5 --steps=24
    python -m benchmarks.learning --compare=moments --output=runs/moments --seeds=5 --steps=24

- base: SFT is run once, and GRPO trains adapters of rank 16 over its parameters in floats, in int8
  and in nf4.
- moments: SFT and GRPO train all parameters, with AdamW's moments in float32, in bfloat16 and in
  float8.

Prints Markdown, a line for each value and seed, and draws `learning.png` in the output folder. The
same command resumes.
"""

import pathlib
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from absl import app, flags

ROOT = pathlib.Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # the configs are not part of the package

from benchmarks import parts  # noqa: E402
from grpo_jax.algorithm.stored_moments import DTYPES  # noqa: E402
from grpo_jax.models.config import BASES  # noqa: E402
from grpo_jax.run import config as grpo_config  # noqa: E402
from grpo_jax.run import report  # noqa: E402
from grpo_jax.run.training import train  # noqa: E402

VALUES: dict[str, Sequence[str]] = {'base': BASES, 'moments': DTYPES}
EVALUATIONS = 6  # besides that before GRPO

COMPARE = flags.DEFINE_enum('compare', None, list(VALUES), 'what is compared', required=True)
OUTPUT = flags.DEFINE_string('output', 'runs/learning', 'folder of the runs')
SEEDS = flags.DEFINE_integer('seeds', 1, 'how many seeds, from 0')
SFT_STEPS = flags.DEFINE_integer('sft_steps', 450, 'steps of SFT')
STEPS = flags.DEFINE_integer('steps', 120, 'steps of GRPO')

Curves = Mapping[str, Sequence[Mapping[int, float]]]  # value -> step -> accuracy, for each seed


def main(arguments: list[str]) -> None:
    """Trains what is not yet trained, and prints a line for each run and the means."""
    parts.check(arguments, [COMPARE.value], VALUES)
    output = pathlib.Path(OUTPUT.value).absolute()
    jax.config.update('jax_compilation_cache_dir', str(output / 'compiled'))
    curves: dict[str, list[dict[int, float]]] = {value: [] for value in VALUES[COMPARE.value]}
    for seed in range(SEEDS.value):
        for value in curves:
            config = _config(output, seed, grpo_steps=STEPS.value)
            _OPTIONS[COMPARE.value](config, value, output)
            workdir = _run(output / f'{value}-{seed}', config)
            rows = report.read_policy(workdir / 'heldout.jsonl', STEPS.value)
            curve = {row['step']: row['metrics']['eval/accuracy'] for row in rows}
            points = {f'step {step}': f'{accuracy:.1%}' for step, accuracy in curve.items()}
            row = {COMPARE.value: value, 'seed': str(seed)} | _loss_of_sft(workdir) | points
            parts.print_row(row, first=not any(curves.values()))
            curves[value].append(curve)
    _print_means(curves)
    _draw(curves, output / 'learning.png')


def _with_base(config: Any, base: str, output: pathlib.Path) -> None:
    start = _run(output / 'sft', _config(output, 0, grpo_steps=0))
    config.start, config.sft.steps = f'{start}:sft', 0
    config.model.lora.update(rank=16, alpha=32.0, base=base)
    config.grpo.optimizer.learning_rate = 1e-3


def _with_moments(config: Any, moments: str, output: pathlib.Path) -> None:
    del output
    config.sft.optimizer.moments = config.grpo.optimizer.moments = moments


_OPTIONS = {'base': _with_base, 'moments': _with_moments}


def _loss_of_sft(workdir: pathlib.Path) -> dict[str, str]:
    """The mean loss of the last 50 steps of SFT, if the run has any."""
    losses = [row['loss'] for row in report.read(workdir / 'metrics.jsonl', 'sft')[-50:]]
    return {'SFT loss': f'{np.mean(losses):.4f}'} if losses else {}


def _print_means(curves: Curves) -> None:
    for value, runs in curves.items():
        values = np.array([list(run.values()) for run in runs])
        cells = (
            f'{mean:.1%} ± {deviation:.1%}'
            for mean, deviation in zip(values.mean(0), values.std(0), strict=True)
        )
        points = dict(zip((f'step {step}' for step in runs[0]), cells, strict=True))
        parts.print_row({COMPARE.value: value, 'seed': 'mean ± std'} | points, first=False)


def _draw(curves: Curves, path: pathlib.Path) -> None:
    """A thin line for each run, and a thick one for the mean of each value."""
    import matplotlib

    matplotlib.use('Agg')
    from matplotlib import pyplot as plt

    figure, axis = plt.subplots(figsize=(7, 4.4), layout='constrained')
    for number, (value, runs) in enumerate(curves.items()):
        steps, color = list(runs[0]), f'C{number}'
        values = 100 * np.array([list(run.values()) for run in runs])
        axis.plot(steps, values.T, color=color, linewidth=0.7, alpha=0.4)
        axis.plot(
            steps, values.mean(0), color=color, marker='.', label=f'{COMPARE.value}={value!r}'
        )
    axis.set(xlabel='GRPO step', ylabel='held-out accuracy (%)')
    axis.set_title('mean and seeds')
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
