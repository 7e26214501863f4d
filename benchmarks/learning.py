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

LOSS = 'SFT loss'
Results = Mapping[str, Sequence[Mapping[str, float]]]  # value -> for each seed its columns


def main(arguments: list[str]) -> None:
    """Trains what is not yet trained, and prints a line for each run and the means."""
    parts.check(arguments, [COMPARE.value], VALUES)
    output = pathlib.Path(OUTPUT.value).absolute()
    jax.config.update('jax_compilation_cache_dir', str(output / 'compiled'))
    results: dict[str, list[dict[str, float]]] = {value: [] for value in VALUES[COMPARE.value]}
    for seed in range(SEEDS.value):
        for value, runs in results.items():
            config = _config(output, seed, grpo_steps=STEPS.value)
            _OPTIONS[COMPARE.value](config, value, output)
            workdir = _run(output / f'{value}-{seed}', config)
            found = _loss_of_sft(workdir) | _accuracies(workdir)
            cells = {name: format(x, _form(name)) for name, x in found.items()}
            row = {COMPARE.value: value, 'seed': str(seed)} | cells
            parts.print_row(row, first=not any(results.values()))
            runs.append(found)
    _print_means(results)
    _draw(results, output / 'learning.png')


def _with_base(config: Any, base: str, output: pathlib.Path) -> None:
    start = _run(output / 'sft', _config(output, 0, grpo_steps=0))
    config.start, config.sft.steps = f'{start}:sft', 0
    config.model.lora.update(rank=16, alpha=32.0, base=base)
    config.grpo.optimizer.learning_rate = 1e-3


def _with_moments(config: Any, moments: str, output: pathlib.Path) -> None:
    del output
    config.sft.optimizer.moments = config.grpo.optimizer.moments = moments


_OPTIONS = {'base': _with_base, 'moments': _with_moments}


def _loss_of_sft(workdir: pathlib.Path) -> dict[str, float]:
    """The mean loss of the last 50 steps of SFT, if the run has any."""
    losses = [row['loss'] for row in report.read(workdir / 'metrics.jsonl', 'sft')[-50:]]
    return {LOSS: float(np.mean(losses))} if losses else {}


def _accuracies(workdir: pathlib.Path) -> dict[str, float]:
    rows = report.read_policy(workdir / 'heldout.jsonl', STEPS.value)
    return {f'step {row["step"]}': row['metrics']['eval/accuracy'] for row in rows}


def _form(name: str) -> str:
    return '.4f' if name == LOSS else '.1%'


def _print_means(results: Results) -> None:
    for value, runs in results.items():
        row = {COMPARE.value: value, 'seed': 'mean ± std'}
        for name in runs[0]:
            column, form = np.array([run[name] for run in runs]), _form(name)
            row[name] = f'{format(column.mean(), form)} ± {format(column.std(), form)}'
        parts.print_row(row, first=False)


def _draw(results: Results, path: pathlib.Path) -> None:
    """A thin line for each run, and a thick one for the mean of each value."""
    import matplotlib

    matplotlib.use('Agg')
    from matplotlib import pyplot as plt

    figure, axis = plt.subplots(figsize=(7, 4.4), layout='constrained')
    for number, (value, runs) in enumerate(results.items()):
        names, color = [name for name in runs[0] if name != LOSS], f'C{number}'
        steps = [int(name.removeprefix('step ')) for name in names]
        values = 100 * np.array([[run[name] for name in names] for run in runs])
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
