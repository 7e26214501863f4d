"""The records in a run's folder: metrics, completions, held-out answers and a plot.

Lines of the `.jsonl` files hold the stage and the step. A resumed run first removes the lines after
its checkpoint, so that the files of an interrupted run equal those of an uninterrupted one.
"""

import math
import os
import pathlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from grpo_jax.run import json_lines, signals
from grpo_jax.run.curves import Curves
from grpo_jax.run.errors import naming_file
from grpo_jax.run.json_lines import Appender, Line, unreadable
from grpo_jax.run.layout import stage_order


class Records:
    """Appends to `<workdir>/{metrics,completions,heldout}.jsonl` and to TensorBoard event files.

    Args:
      workdir: the run's folder.
      stage: its name, see `layout.stage_order`.
      step: the first step of this process; lines of it and later are removed.
      log: also gets the metrics of steps and evaluations, (step, metrics).
    """

    def __init__(
        self,
        workdir: pathlib.Path,
        stage: str,
        step: int,
        log: Callable[[int, Mapping[str, float]], None] | None = None,
    ) -> None:
        self.workdir, self.stage, self.log = workdir, stage, log
        self.files: dict[str, Appender] = {}
        for name in ('metrics', 'completions', 'heldout'):
            self._open(name, step)
        self.curves = Curves(workdir / 'tensorboard' / stage, step)

    def metrics(self, step: int, values: Mapping[str, float]) -> None:
        """Writes one line, and a point per curve. A value that is not finite is written as null."""
        finite = {k: v if math.isfinite(v) else None for k, v in values.items()}
        self._line('metrics', step, finite)
        self._curves(step, {name: value for name, value in finite.items() if value is not None})

    def completions(self, step: int, rows: Iterable[Mapping[str, Any]]) -> None:
        """Writes one line for each sampled completion."""
        for row in rows:
            self._line('completions', step, row)

    def heldout(self, step: int, evaluation: Any) -> None:
        """Writes all greedy answers to the held-out problems in one line, and a point per curve.

        Args:
          step: the number of training steps before it.
          evaluation: an `evaluation.Evaluation`; its empty fields are left out.
        """
        fields = {name: value for name, value in evaluation._asdict().items() if value != ()}
        self._line('heldout', step, fields)
        self._curves(step, evaluation.metrics)

    def remove_from(self, step: int) -> None:
        """Removes the metrics and completions of a step and later, to write them again."""
        for name in ('metrics', 'completions'):
            self.files[name].close()
            self._open(name, step)
        self.curves.remove_from(step)

    def sync(self) -> None:
        """Waits until what has been written would survive the machine, as a checkpoint does."""
        for file in self.files.values():
            file.sync()

    def _open(self, name: str, step: int) -> None:
        path = self.workdir / f'{name}.jsonl'
        remove_lines(path, self.stage, step)
        self.files[name] = Appender(path)

    def close(self) -> None:
        for file in self.files.values():
            file.close()
        self.curves.close()

    def _curves(self, step: int, values: Mapping[str, float]) -> None:
        with signals.delayed():
            self.curves.add(step, values)
        if self.log is not None:
            self.log(step, values)

    def _line(self, name: str, step: int, row: Mapping[str, Any]) -> None:
        row = {'stage': self.stage, 'step': step, **row}
        with signals.delayed():
            self.files[name].write(json_lines.line(row))


class NoRecords(Records):
    """The records of a process that writes none, because the first one does."""

    def __init__(self) -> None:
        pass

    def metrics(self, step: int, values: Mapping[str, float]) -> None:
        pass

    def completions(self, step: int, rows: Iterable[Mapping[str, Any]]) -> None:
        pass

    def heldout(self, step: int, evaluation: Any) -> None:
        pass

    def remove_from(self, step: int) -> None:
        pass

    def sync(self) -> None:
        pass

    def close(self) -> None:
        pass


def read(path: pathlib.Path, stage: str) -> list[dict[str, Any]]:
    """The rows of one stage, oldest first."""
    return [line.row for line in _lines(path) if line.row['stage'] == stage]


def read_policy(path: pathlib.Path, steps: int) -> list[dict[str, Any]]:
    """The rows of all GRPO iterations, oldest first, with steps counted over iterations.

    If there are none, the rows of SFT.

    Args:
      path: one of the `.jsonl` files.
      steps: number of steps of an iteration.
    """
    rows = [line.row for line in _lines(path)]
    policy_rows = [row for row in rows if row['stage'].startswith('grpo')]
    for row in policy_rows:
        row['step'] += (stage_order(row['stage'])[0] - 1) * steps
    return policy_rows or [row for row in rows if row['stage'] == 'sft']


def has_heldout(workdir: pathlib.Path, stage: str, step: int) -> bool:
    """Whether `heldout.jsonl` has a complete line for a step of a stage."""
    path = workdir / 'heldout.jsonl'
    if not path.exists():
        return False
    rows = (line.row for line in _lines(path))
    return any((row['stage'], row['step']) == (stage, step) for row in rows)


def remove_lines(path: pathlib.Path, stage: str, step: int) -> None:
    """Removes lines of this stage from `step` on, of later stages, and a torn last line."""
    if not path.exists():
        return
    partial, end = path.with_suffix('.partial'), (stage_order(stage), step)
    try:
        with naming_file(path), partial.open('wb') as file:
            for line in _lines(path):
                if (stage_order(line.row['stage']), line.row['step']) < end:
                    file.write(line.text)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def _lines(path: pathlib.Path) -> Iterator[Line]:
    """Yields the lines of a file of records.

    Raises:
      ValueError: a line is no record; names the file and the line.
    """
    for line in json_lines.read(path):
        try:
            stage_order(line.row['stage'])
            line.row['step'] < 0  # noqa: B015  # a number
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise unreadable(path, line.number, 'has no stage and step of a run') from error
        yield line


def plot(workdir: pathlib.Path, steps: int) -> pathlib.Path:
    """Draws `reward.png`: reward, accuracy, completion length and KL against the step.

    Args:
      workdir: the run's folder.
      steps: number of steps of an iteration.
    """
    import matplotlib

    matplotlib.use('Agg')
    from matplotlib import pyplot as plt

    rows = read_policy(workdir / 'metrics.jsonl', steps)
    tests = read_policy(workdir / 'heldout.jsonl', steps)
    figure, axes = plt.subplots(2, 2, figsize=(9, 6), sharex=True, layout='constrained')
    panels = (
        ('reward', 'reward', axes[0, 0]),
        ('accuracy', 'accuracy', axes[0, 1]),
        ('completions/mean_length', 'completion length (tokens)', axes[1, 0]),
        ('kl', 'KL to the reference (nats per token)', axes[1, 1]),
    )
    for name, title, axis in panels:
        points = [(row['step'], row[name]) for row in rows if row.get(name) is not None]
        axis.set_title(title, fontsize=10)
        axis.grid(alpha=0.3)
        if points:
            axis.plot(*zip(*points, strict=True), linewidth=0.8, label='sampled, training problems')
        else:
            axis.text(0.5, 0.5, 'not computed', ha='center', transform=axis.transAxes)
    for name, axis in (('eval/reward', axes[0, 0]), ('eval/accuracy', axes[0, 1])):
        points = [(row['step'], row['metrics'][name]) for row in tests if name in row['metrics']]
        if points:
            axis.plot(*zip(*points, strict=True), 'o-', markersize=4, label='greedy, held-out')
            axis.legend(fontsize=8, loc='lower right')
    axes[0, 1].set_ylim(0, 1)
    for axis in axes[1]:
        axis.set_xlabel('step')
    path = workdir / 'reward.png'
    with naming_file(path):
        figure.savefig(path, dpi=120)
    plt.close(figure)
    return path


def before_and_after(workdir: pathlib.Path, steps: int, count: int = 8) -> str:
    """A table of the first held-out prompts with the greedy answers before and after training.

    An answer is marked as right (+) or wrong (-), or with its reward. Empty without evaluations.
    """
    tests = read_policy(workdir / 'heldout.jsonl', steps)
    if not tests:
        return ''
    first, last = tests[0], tests[-1]

    def cell(row: Mapping[str, Any], i: int) -> str:
        text = _on_one_line(row['completions'][i])
        text = text if len(text) <= 40 else text[:37] + '...'
        if 'correct' not in row:
            return f'{row["rewards"][i]:.3g}: {text}'
        return ('+ ' if row['correct'][i] else '- ') + text

    table = [('prompt', f'before (step {first["step"]})', f'after (step {last["step"]})')]
    for i in range(min(count, len(first['prompts']))):
        table.append((_on_one_line(first['prompts'][i])[-30:], cell(first, i), cell(last, i)))
    widths = [max(len(row[column]) for row in table) for column in range(3)]
    lines = ['  '.join(text.ljust(w) for text, w in zip(row, widths, strict=True)) for row in table]
    return '\n'.join([lines[0], '-' * len(lines[0]), *lines[1:]])


def _on_one_line(text: str) -> str:
    """The text with single spaces, and characters that a terminal would obey as their escapes."""
    line = ' '.join(text.split())
    return ''.join(c if c.isprintable() else repr(c)[1:-1] for c in line)
