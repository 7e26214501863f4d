"""Stops a run whose numbers have gone wrong, with the batch of that step on disk.

Two things are watched: optimizer updates that are skipped one after the other because their
gradients are not finite, and a gradient norm far outside of its own history. The history is that of
the stage's records, so a resumed run stops where an unbroken one does.
"""

import io
import json
import math
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from ml_collections import ConfigDict

from grpo_jax.run import hosts, report
from grpo_jax.run.errors import naming_file
from grpo_jax.run.graded_texts import without_records
from grpo_jax.run.rollouts import CollectedBatch

FOLDER = 'stopped'  # in the run's folder: the batches of steps at which it stopped

_NORM = 'grad_norm'  # of the policy; 'critic/grad_norm', 'reward_model/grad_norm'


class UnhealthyError(ValueError):
    """The numbers of a step have gone wrong.

    Attributes:
      poisoned: the parameters are those after a bad update, and are not worth saving.
    """

    def __init__(self, message: str, *, poisoned: bool) -> None:
        super().__init__(message)
        self.poisoned = poisoned


class Finding(NamedTuple):
    """What is wrong with a step."""

    text: str
    poisoned: bool  # whether the update was made


class Watch:
    """Finds steps whose numbers have gone wrong, from the metrics of one step after the other.

    Args:
      updates: optimizer updates per step.
      skipped_updates: how many updates in a row may be skipped; 0: any number.
      grad_norm: how many times the median of the steps before a gradient norm may be; 0: any.
      history: how many steps before it. At least half of them need a gradient that is not zero.
      earlier: the metrics of the steps before the first one, oldest first.
    """

    def __init__(
        self,
        updates: int,
        *,
        skipped_updates: int,
        grad_norm: float,
        history: int,
        earlier: Sequence[Mapping[str, float | None]] = (),
    ) -> None:
        self.updates, self.most_skipped = updates, skipped_updates
        self.factor, self.history = grad_norm, history
        self.skipped = self.in_row = 0
        self.norms: dict[str, list[float]] = {}
        for row in earlier:
            self._follow(row)

    def add(self, metrics: Mapping[str, float]) -> Finding | None:
        """Adds the metrics of a step; returns what is wrong with it."""
        found = self._sudden(metrics)
        self._follow(metrics)
        if self.most_skipped and self.in_row >= self.most_skipped:
            return Finding(
                f'the last {self.in_row} updates were skipped, one after the other, because their '
                f'gradients were not finite (health.skipped_updates={self.most_skipped})',
                poisoned=False,
            )
        return found

    def _sudden(self, metrics: Mapping[str, float]) -> Finding | None:
        for name, norms in self.norms.items() if self.factor else ():
            value, positive = metrics[name], [norm for norm in norms if norm > 0]
            full = len(norms) == self.history and 2 * len(positive) >= self.history
            if not full or not math.isfinite(value):
                continue
            median = float(np.median(positive))
            if value > self.factor * median:
                return Finding(
                    f'{name}={value:.4g} is {value / median:.4g} times {median:.4g}, the median of '
                    f'the {len(norms)} steps before it (health.grad_norm={self.factor:g})',
                    poisoned=True,
                )
        return None

    def _follow(self, metrics: Mapping[str, float | None]) -> None:
        total = int(metrics['skipped_updates'] or 0)
        skipped, self.skipped = total - self.skipped, total
        # Where only some updates of a step were skipped, their order is not known.
        self.in_row = self.in_row + skipped if skipped == self.updates else 0
        for name, value in metrics.items():
            if name.rpartition('/')[2] == _NORM and value is not None and math.isfinite(value):
                self.norms[name] = [*self.norms.get(name, []), value][-self.history :]


class Health:
    """Stops a stage at a step whose numbers have gone wrong.

    Every process comes to the same decision, because it is made from replicated metrics.

    Args:
      config: of the run; its section `health`.
      workdir: the run's folder.
      stage: its name.
      updates: optimizer updates per step.
      start: the first step.
    """

    def __init__(
        self, config: ConfigDict, workdir: pathlib.Path, stage: str, updates: int, start: int
    ) -> None:
        self.workdir, self.stage = workdir, stage
        self.batches: dict[int, Any] = {}
        options = dict(config.health)
        self.watch: Watch | None = None
        if options['skipped_updates'] or options['grad_norm']:
            count = 1 + max(options['history'], options['skipped_updates'])
            earlier = hosts.from_first(lambda: self._earlier(start, count), 'the metrics')
            self.watch = Watch(updates, earlier=earlier, **options)

    def keep(self, step: int, batch: CollectedBatch) -> None:
        """Keeps the batch of a step until its metrics are checked, without what was recorded."""
        if self.watch is not None:
            self.batches[step] = without_records(batch.rollout), batch.rewards

    def check(self, step: int, metrics: Mapping[str, float]) -> None:
        """Checks the metrics of a step, in the order of the steps.

        Raises:
          UnhealthyError: they have gone wrong. The batch has been written.
        """
        batch = self.batches.pop(step, None)
        finding = None if self.watch is None else self.watch.add(metrics)
        if finding is None:
            return
        self.watch = None  # the steps after it have been dispatched, and are not judged by it
        path = self._write(step, batch, metrics)
        raise hosts.in_all_processes(
            UnhealthyError(self._message(step, finding, path), poisoned=finding.poisoned)
        )

    def _message(self, step: int, finding: Finding, path: pathlib.Path) -> str:
        if finding.poisoned:
            rest = (
                'Nothing after the step before it is saved: the same command computes it again, '
                'and goes on with --override --config.health.grad_norm=0'
            )
        else:
            rest = 'The state is saved, and the same command goes on with the next step'
        return (
            f'{self.stage} step {step}: {finding.text}: the run is stopped. {rest}. The batch is '
            f'in {path}; python -m grpo_jax.replay --workdir={self.workdir} --stage={self.stage} '
            f'--step={step} shows what the update did with its tokens'
        )

    def _write(self, step: int, batch: Any, metrics: Mapping[str, float]) -> pathlib.Path:
        """Writes the batch and the metrics of a step; all processes call it."""
        path = self.workdir / FOLDER / f'{self.stage}-{step}.npz'
        arrays: dict[str, Any] = batch_arrays(*hosts.fetch(batch))
        if hosts.is_first():
            path.parent.mkdir(exist_ok=True)
            written = io.BytesIO()
            np.savez(written, metrics=np.array(json.dumps(dict(metrics))), **arrays)
            partial = path.with_name(path.name + '.partial')
            with naming_file(path):
                partial.write_bytes(written.getvalue())
            partial.replace(path)
        return path

    def _earlier(self, start: int, count: int) -> list[dict[str, float | None]]:
        """What is watched of the last `count` steps before `start`."""
        path = self.workdir / 'metrics.jsonl'
        rows = report.read(path, self.stage) if path.exists() else []
        return [
            {k: v for k, v in row.items() if k.rpartition('/')[2] in (_NORM, 'skipped_updates')}
            for row in [row for row in rows if row['step'] < start][-count:]
        ]


def batch_arrays(rollout: Any, rewards: Any) -> dict[str, np.ndarray]:
    """The arrays of a batch on the host by name, such as 'rollout/prompts/tokens' and 'rewards'."""
    leaves = jax.tree_util.tree_leaves_with_path({'rollout': rollout, 'rewards': rewards})
    return {
        jax.tree_util.keystr(path, simple=True, separator='/'): np.asarray(leaf)
        for path, leaf in leaves
    }
