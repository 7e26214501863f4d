"""The unified table on one task: methods compared at equal numbers of samples, over several seeds.

    python benchmarks/study.py --output=runs/study

For each seed one SFT model is trained, from which every method starts. Measures held-out accuracy
against the completions generated; maj@k and pass@k before and after GRPO; iterations 1, 2 and 3 of
iterative GRPO, with a reward model that is retrained before each. Writes `study.json`, `study.md`
and `study.png`. The same command resumes.
"""

import json
import pathlib
import shutil
import sys
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from absl import app, flags
from scipy import stats

ROOT = pathlib.Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # the configs are not part of the package

from grpo_jax.run import config as grpo_config  # noqa: E402
from grpo_jax.run import evaluation, parameters, problems, report, saved_config, setup  # noqa: E402
from grpo_jax.run.training import train  # noqa: E402

METHODS = {
    'rft': 'RFT',
    'online_rft': 'Online RFT',
    'ppo': 'PPO',
    'grpo': 'GRPO+OS',
    'grpo_process': 'GRPO+PS',
}
OTHERS = {'dpo': 'DPO', 'trpo': 'TRPO', 'sft': 'SFT, continued'}
SIZES = (1, 2, 4, 8, 16, 32, 64)

OUTPUT = flags.DEFINE_string('output', None, 'folder of the runs and results', required=True)
SEEDS = flags.DEFINE_integer('seeds', 5, 'how many seeds, from 0')
ROWS = flags.DEFINE_list('methods', [*METHODS, 'grpo_iterative', *OTHERS], 'which methods')


def main(arguments: list[str]) -> None:
    """Runs what is missing and draws everything."""
    if arguments[1:]:
        raise app.UsageError(f'unexpected arguments: {arguments[1:]}')
    output = pathlib.Path(OUTPUT.value).absolute()
    output.mkdir(parents=True, exist_ok=True)
    jax.config.update('jax_compilation_cache_dir', str(output / 'compiled'))
    results: dict[str, Any] = {'curves': {}, 'votes': {'before': [], 'after': []}}
    for seed in range(SEEDS.value):
        base = run(output, 'start', seed)
        for method in ROWS.value:
            workdir = output / f'{method}-{seed}'
            if not (workdir / 'checkpoints').exists():
                shutil.copytree(base / 'checkpoints' / 'sft', workdir / 'checkpoints' / 'sft')
            run(output, method, seed)
            results['curves'].setdefault(method, []).append(curve(workdir))
        if 'grpo' in ROWS.value:
            for when, workdir in (('before', base), ('after', output / f'grpo-{seed}')):
                results['votes'][when].append(votes(workdir))
        (output / 'study.json').write_text(json.dumps(results, indent=1) + '\n')
        (output / 'study.md').write_text(tables(results))
        draw(results, output / 'study.png')
    print((output / 'study.md').read_text())


def settings(output: pathlib.Path, method: str, seed: int) -> Any:
    """The config of one run."""
    config = grpo_config.load(f'{ROOT}/configs/study.py:{method}')
    config.seed = seed
    config.data.cache_dir = str(output / 'data')
    return config


def run(output: pathlib.Path, method: str, seed: int) -> pathlib.Path:
    """Trains the run unless it is already finished."""
    workdir = output / f'{method}-{seed}'
    if not (workdir / 'finished').exists():
        print(f'== {method}, seed {seed}', flush=True)
        train(settings(output, method, seed), str(workdir))
        (workdir / 'finished').touch()
    return workdir


def curve(workdir: pathlib.Path) -> list[tuple[int, float]]:
    """(completions generated, held-out accuracy) of a run; of SFT, demonstrations read."""
    config = saved_config.read(workdir / 'config.json')
    rows = report.read_policy(workdir / 'heldout.jsonl', config.grpo.steps)
    each = config.grpo.batch_size * config.grpo.group_size * (1 + config.grpo.refill)
    if rows[0]['stage'] == 'sft':
        each = config.sft.batch_size
    return [(row['step'] * each, row['metrics']['eval/accuracy']) for row in rows]


def votes(workdir: pathlib.Path) -> dict[str, list[float]]:
    """maj@k and pass@k of a run's newest policy, cached in the run's folder."""
    path = workdir / 'votes.json'
    if not path.exists():
        config = saved_config.read(workdir / 'config.json')
        made = setup.prepare(config, workdir)
        heldout = problems.heldout_problems(made)
        assert heldout is not None  # all configs of the study have a held-out split
        asked = evaluation.evaluation_options(config.eval) | {'samples': max(SIZES), 'k': SIZES}
        policy = parameters.newest_policy(made).params
        found = evaluation.evaluate(made.sampler, policy, heldout, **asked).metrics
        table = {name: [found[f'eval/{name}@{size}'] for size in SIZES] for name in ('maj', 'pass')}
        path.write_text(json.dumps(table))
    return json.loads(path.read_text())


def interval(values: Sequence[Sequence[float]]) -> tuple[np.ndarray, np.ndarray]:
    """Mean over seeds, and half the width of its 95 % interval (Student's t)."""
    table = np.array(values, float)
    n = len(table)
    if n < 2:
        return table[0], np.zeros(table.shape[1])
    spread = table.std(0, ddof=1) / np.sqrt(n)
    return table.mean(0), stats.t.ppf(0.975, n - 1) * spread


def tables(results: dict[str, Any]) -> str:
    """Markdown."""
    curves, votes = results['curves'], results['votes']
    seeds = len(next(iter(curves.values())))
    text = f'Mean over {seeds} seeds ± half the 95 % interval (Student), held-out accuracy in %.\n'
    for method, runs in curves.items():
        points = [point[0] for point in runs[0]]
        mean, half = interval([[point[1] for point in run] for run in runs])
        name = {**METHODS, **OTHERS, 'grpo_iterative': 'Iterative GRPO, learned reward'}[method]
        text += f'\n**{name}**\n\n| completions | ' + ' | '.join(map(str, points)) + ' |\n'
        text += '|---' * (len(points) + 1) + '|\n| accuracy | '
        text += ' | '.join(percent(m, h) for m, h in zip(mean, half, strict=True)) + ' |\n'
    text += differences(curves)
    for name in ('maj', 'pass') if votes['after'] else ():
        text += f'\n| {name}@k | ' + ' | '.join(map(str, SIZES)) + ' |\n'
        text += '|---' * (len(SIZES) + 1) + '|\n'
        for when in ('before', 'after'):
            mean, half = interval([run[name] for run in votes[when]])
            text += f'| {when} GRPO | '
            text += ' | '.join(percent(m, h) for m, h in zip(mean, half, strict=True)) + ' |\n'
    return text


def differences(curves: dict[str, Any]) -> str:
    """Differences to GRPO+OS with the same seeds, which start from the same SFT model."""
    others = [name for name in METHODS if name in curves and name != 'grpo']
    if 'grpo' not in curves or not others:
        return ''
    base = np.array([[point[1] for point in run] for run in curves['grpo']])
    points = [point[0] for point in curves['grpo'][0]][1:]
    text = '\n| difference to GRPO+OS, same seeds | ' + ' | '.join(map(str, points)) + ' |\n'
    text += '|---' * (len(points) + 1) + '|\n'
    for name in others:
        runs = np.array([[point[1] for point in run] for run in curves[name]])
        mean, half = interval((runs - base)[:, 1:])
        cells = (percent(m, h) for m, h in zip(mean, half, strict=True))
        text += f'| {METHODS[name]} | ' + ' | '.join(cells) + ' |\n'
    return text


def percent(mean: float, half: float) -> str:
    """`81.2 ± 1.4`."""
    return f'{100 * mean:.1f} ± {100 * half:.1f}'


def draw(results: dict[str, Any], path: pathlib.Path) -> None:
    """One panel for the methods, one for votes and one for the iterations."""
    import matplotlib

    matplotlib.use('Agg')
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, 3, figsize=(15, 4.6), layout='constrained')

    def band(axis: Any, points: Sequence[float], values: Any, label: str, **style: Any) -> None:
        mean, half = interval(values)
        (line,) = axis.plot(points, 100 * mean, label=label, **style)
        low, high = 100 * (mean - half), np.minimum(100 * (mean + half), 100)
        axis.fill_between(points, low, high, alpha=0.15, color=line.get_color(), linewidth=0)

    def curve_of(axis: Any, method: str, label: str) -> None:
        runs = results['curves'].get(method)
        if runs:
            points = [point[0] for point in runs[0]]
            band(axis, points, [[p[1] for p in run] for run in runs], label, marker='.')

    for method, label in METHODS.items():
        curve_of(axes[0], method, label)
    axes[0].set(title='Methods', xlabel='completions generated', ylabel='held-out accuracy (%)')
    for name, style in (('maj', '-'), ('pass', '--')):
        for when, color in (('before', 'tab:gray'), ('after', 'tab:blue')):
            if results['votes'][when]:
                values = [run[name] for run in results['votes'][when]]
                label = f'{name}@k {when} GRPO'
                band(axes[1], SIZES, values, label, linestyle=style, color=color, marker='.')
    axes[1].set_xscale('log', base=2)
    axes[1].set(title='Votes', xlabel='k', ylabel='held-out problems (%)', xticks=SIZES)
    axes[1].set_xticklabels(SIZES)
    curve_of(axes[2], 'grpo_iterative', 'learned reward, 3 iterations')
    curve_of(axes[2], 'grpo', 'rule, one iteration')
    axes[2].set(title='Iterative GRPO', xlabel='completions generated')
    runs = results['curves'].get('grpo_iterative')
    for share in (1, 2) if runs else ():
        axes[2].axvline(runs[0][-1][0] * share / 3, color='gray', linewidth=0.8, linestyle=':')
    for axis in axes:
        axis.grid(alpha=0.3)
        if axis.get_legend_handles_labels()[0]:
            axis.legend(fontsize=8, loc='center right' if axis is axes[1] else 'lower right')
    figure.savefig(path, dpi=110)
    plt.close(figure)


if __name__ == '__main__':
    app.run(main)
