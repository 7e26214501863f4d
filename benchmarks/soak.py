"""A long run of tiny steps in one process, which has to be as large at its end as at its begin.

    python benchmarks/soak.py --workdir=FOLDER [--steps=5000] [--every=50] [--picture=FILE]

GRPO with rewards in this process, in a pool of workers and in an isolated one, with evaluations,
checkpoints and all records. Every so many steps it counts the memory that this process and its
children hold, open files, threads, children and JAX's arrays. Prints them for each tenth of the
run, draws them, and ends with status 1 if the median of the last quarter is more than 3 % above
that of the second one. Threads and files of a save that is being written come and go.
"""

import argparse
import gc
import json
import os
import pathlib
import statistics
import sys
from collections.abc import Iterator, Mapping, Sequence

ROOT = pathlib.Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / 'benchmarks')]  # the configs are not part of the package

import jax  # noqa: E402
from ml_collections import ConfigDict  # noqa: E402

from configs import smoke  # noqa: E402

NAMES = {
    'memory': 'memory of the process (MiB)',
    'children_memory': 'memory of its children (MiB)',
    'files': 'open files',
    'threads': 'threads',
    'children': 'child processes',
    'arrays': 'arrays of JAX',
}
GROWTH = 0.03  # of the second quarter that the last one may be larger

samples: list[dict[str, float]] = []
every = 50


def get_config(steps: int) -> ConfigDict:
    """The config of the run."""
    config = smoke.get_config()
    config.model.update(width=16, layers=1, heads=2, kv_heads=1, mlp_width=16, qk_norm='')
    config.sft.steps = 0
    config.grpo.update(steps=steps, batch_size=4, group_size=4)
    config.grpo.algorithm.update(inner_updates=1, entropy=False)
    config.grpo.rewards = {
        'exact_answer': 1.0,
        'math_answer': 0.1,
        'soak:digits': {'weight': 0.1, 'call': {'isolated': True, 'memory': 2.0}},
    }
    config.eval.update(every=100, samples=2, k=(1, 2))
    config.checkpoint.update(every=50, keep=2)
    config.log.update(to=('soak:observe',), completions=4)
    return config


def digits(prompts: Sequence[str], completions: Sequence[str], **columns: object) -> list[float]:
    """A reward of the user's own: the share of digits."""
    return [sum(map(str.isdigit, text)) / max(len(text), 1) for text in completions]


def observe(step: int, metrics: Mapping[str, float]) -> None:
    """Counts what the process holds after every so many steps; called with all metrics."""
    if step % every or (samples and samples[-1]['step'] == step):
        return
    gc.collect()
    children = list(_children(os.getpid()))
    samples.append({
        'step': step,
        'memory': _resident(os.getpid()),
        'children_memory': sum(map(_resident, children)),
        'files': len(os.listdir('/proc/self/fd')),
        'threads': len(os.listdir('/proc/self/task')),
        'children': len(children),
        'arrays': len(jax.live_arrays()),
    })  # fmt: skip


def _resident(process: int) -> float:
    """Resident memory in MiB; 0 if the process has ended."""
    try:
        pages = int(pathlib.Path(f'/proc/{process}/statm').read_text().split()[1])
    except OSError:
        return 0.0
    return pages * os.sysconf('SC_PAGE_SIZE') / 2**20


def _children(process: int) -> Iterator[int]:
    """Yields the numbers of the children of a process, and of theirs."""
    for path in pathlib.Path(f'/proc/{process}/task').glob('*/children'):
        try:
            found = [int(text) for text in path.read_text().split()]
        except OSError:  # the thread has ended
            continue
        for child in found:
            yield child
            yield from _children(child)


def grown(rows: Sequence[Mapping[str, float]]) -> list[str]:
    """What the last quarter of the samples holds more of than the second one."""
    size = len(rows) // 4
    found = []
    for name in NAMES:
        before = statistics.median(row[name] for row in rows[size : 2 * size])
        after = statistics.median(row[name] for row in rows[-size:])
        if after > before * (1 + GROWTH):
            found.append(f'{name}: {before:g} in the second quarter, {after:g} in the last')
    return found


def draw(rows: Sequence[Mapping[str, float]], path: pathlib.Path) -> None:
    """Draws all counts against the step."""
    import matplotlib

    matplotlib.use('Agg')
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(2, 3, figsize=(11, 5), sharex=True, layout='constrained')
    for axis, (name, title) in zip(axes.flat, NAMES.items(), strict=True):
        axis.plot([row['step'] for row in rows], [row[name] for row in rows], linewidth=0.8)
        axis.set_title(title, fontsize=10)
        axis.set_ylim(bottom=0)
        axis.grid(alpha=0.3)
    for axis in axes[1]:
        axis.set_xlabel('step')
    figure.savefig(path, dpi=110)


def main() -> None:
    """Runs the steps, prints and draws what was counted."""
    global every
    parser = argparse.ArgumentParser(usage=__doc__.replace('%', '%%'))
    parser.add_argument('--workdir', required=True)
    parser.add_argument('--steps', type=int, default=5000)
    parser.add_argument('--every', type=int, default=50)
    parser.add_argument('--picture', type=pathlib.Path)
    options = parser.parse_args()
    every = options.every
    from grpo_jax.run.training import train

    try:
        train(get_config(options.steps), options.workdir)
    finally:
        (pathlib.Path(options.workdir) / 'soak.json').write_text(json.dumps(samples))
        _report(options.picture)


def _report(picture: pathlib.Path | None) -> None:
    """Prints and draws the samples; ends with status 1 if something has grown."""
    names = ('step', *NAMES)
    print('  '.join(names))
    for row in samples[:: max(len(samples) // 10, 1)]:
        print('  '.join(f'{row[name]:{len(name)}.0f}' for name in names))
    if picture:
        draw(samples, picture)
    problems = grown(samples)
    print('\n'.join(problems) or 'nothing has grown')
    sys.exit(bool(problems))


if __name__ == '__main__':
    sys.modules['soak'] = sys.modules['__main__']  # the config names functions of this file
    main()
